"""`mlp`: a multilayer perceptron with up to 100 exits, for features (F,), series (C, window) and
images (C, H, W), which it flattens.

Stage e is linear, BatchNorm, ReLU; each exit is linear. The stages' linear layers have no bias: the
BatchNorm after them takes it out again."""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta
from torch import nn

from edge_sdk.models import register_family
from edge_sdk.models.layers import batch_norm, input_axes
from edge_sdk.models.options import FamilyOptions, Sizes, widths
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec


class MlpOptions(FamilyOptions, frozen=True):
    widths: Annotated[Sizes, Meta(description="features after each stage (128 each)")] = ()


def build_mlp(spec: ModelSpec, options: MlpOptions) -> StagedModel:
    """Raises ConfigError for an input of more than three axes or too few widths."""
    input_axes(spec, 1, 2, 3)
    default = [128] * spec.exit
    features = widths(spec, "widths", options.widths, default, spec.exit)[: spec.exit]
    stages: list[nn.Module] = []
    inputs = math.prod(spec.input_shape)
    for number, outputs in enumerate(features):
        flatten = [nn.Flatten()] if number == 0 else []  # (B, *input_shape) -> (B, inputs)
        linear = nn.Linear(inputs, outputs, bias=False)
        stages.append(nn.Sequential(*flatten, linear, batch_norm(outputs, 1), nn.ReLU()))
        inputs = outputs
    exits = [nn.Linear(width, spec.num_classes) for width in features]
    return StagedModel(stages, exits)


register_family("mlp", build_mlp, MlpOptions)
