"""`mlp`: a multilayer perceptron with up to 100 exits, for features (C,), series (C, window) and
images (C, H, W), which it flattens.

Stage e is linear, BatchNorm, ReLU; each exit is linear. The stages' linear layers have no bias: the
BatchNorm after them takes it out again.
Options: widths (features after each stage, default 128 each).
"""

from __future__ import annotations

import math

from torch import nn

from edge_sdk.models.layers import batch_norm, check_options, input_axes, widths_option
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec


def build_mlp(spec: ModelSpec) -> StagedModel:
    """Raises ConfigError for an input of more than three axes or too few widths."""
    check_options(spec, ["widths"])
    input_axes(spec, 1, 2, 3)
    widths = widths_option(spec, "widths", [128] * spec.exit, spec.exit)[: spec.exit]
    stages: list[nn.Module] = []
    inputs = math.prod(spec.input_shape)
    for number, outputs in enumerate(widths):
        flatten = [nn.Flatten()] if number == 0 else []  # (B, *input_shape) -> (B, inputs)
        linear = nn.Linear(inputs, outputs, bias=False)
        stages.append(nn.Sequential(*flatten, linear, batch_norm(outputs, 1), nn.ReLU()))
        inputs = outputs
    exits = [nn.Linear(width, spec.num_classes) for width in widths]
    return StagedModel(stages, exits)
