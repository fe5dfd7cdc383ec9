"""`cnn`: a small network with any number of exits, for images of any size and for series.

Stage e is conv3-BatchNorm-ReLU, with a halving max pool before the ReLU while at least 4 positions
a side are left; stage 1 begins with a stem of the same kind (a source convolution with one input
channel would give a factorised hypernetwork rank 3 at most). Each exit average-pools to 2 a side
and is linear."""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta
from torch import nn

from edge_sdk.models import register_family
from edge_sdk.models.layers import conv_block, spatial_dims
from edge_sdk.models.options import FamilyOptions, Sizes, widths
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec


class CnnOptions(FamilyOptions, frozen=True):
    channels: Annotated[Sizes, Meta(description="of each stage (16, 32, 64, 64, ...)")] = ()


def build_cnn(spec: ModelSpec, options: CnnOptions) -> StagedModel:
    dims = spatial_dims(spec)
    default = [16, 32] + [64] * max(0, spec.exit - 2)
    channels = widths(spec, "channels", options.channels, default, spec.exit)
    side = min(spec.input_shape[1:])
    pooled = nn.AdaptiveAvgPool2d if dims == 2 else nn.AdaptiveAvgPool1d
    stages: list[nn.Module] = []
    exits: list[nn.Module] = []
    inputs = spec.input_shape[0]
    for number in range(spec.exit):
        outputs = channels[number]
        layers = conv_block(inputs, outputs, dims, bias=False) if number == 0 else []
        halve = side >= 4
        source = outputs if number == 0 else inputs
        layers += conv_block(source, outputs, dims, bias=False, halve=halve)
        side = side // 2 if halve else side
        stages.append(nn.Sequential(*layers))
        features = outputs * math.prod([2] * dims)
        exits.append(nn.Sequential(pooled(2), nn.Flatten(), nn.Linear(features, spec.num_classes)))
        inputs = outputs
    return StagedModel(stages, exits)


register_family("cnn", build_cnn, CnnOptions)
