"""`vgg`: HypeMeFed's network (2024): blocks of two conv3-BatchNorm-ReLU and a max pool, the first
block common, one exit (flatten, linear) after each other block; sizes equal the published ones.

A series (C, window) takes 1-D convolutions or, with option `fold`, becomes an image of one channel.
The published sizes for UniMiB (3 x 151, 8 classes) leave 24, 6 and 1 positions after two, three and
four halvings, which 3 x 151 as an image cannot give; 18 x 25 does, 150 steps of each axis. With
fold = 18, 25 all three sizes are exact; how the paper itself cuts the window it does not say.
Channels of the paper: 32-64-128-256, for STL10 and UniMiB 64-128-256-512; its code has dropout 0.5.
"""

from __future__ import annotations

import math
from typing import Annotated

from msgspec import Meta
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models import register_family
from edge_sdk.models.layers import conv_block, spatial_dims
from edge_sdk.models.options import FamilyOptions, Sizes, sizes, widths
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec


class VggOptions(FamilyOptions, frozen=True):
    channels: Annotated[Sizes, Meta(description="of each block (32, 64, 128, 256, ...)")] = ()
    dropout: Annotated[
        float, Meta(ge=0, lt=1, description="before each exit's linear layer, a share (0)")
    ] = 0.0
    fold: Annotated[
        Sizes, Meta(description="of a series: height, width; their product a multiple of C (none)")
    ] = ()


class Fold(nn.Module):
    """A series (B, C, window) as an image (B, 1, height, width): the first height * width / C steps
    of channel 1, then those of channel 2, ..., row by row."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        steps = self.height * self.width // x.shape[1]
        return x[..., :steps].reshape(-1, 1, self.height, self.width)


def build_vgg(spec: ModelSpec, options: VggOptions) -> StagedModel:
    """Raises ConfigError for more than 6 exits, or a fold that the input does not fill."""
    dims = spatial_dims(spec)
    if spec.exit > 6:
        raise ConfigError(f"family 'vgg' has at most 6 exits, got {spec.exit}; use 'cnn'")
    default = [32 * 2**i for i in range(spec.exit + 1)]
    channels = widths(spec, "channels", options.channels, default, spec.exit + 1)
    inputs, *sides = spec.input_shape
    fold: list[nn.Module] = []
    if options.fold:
        height, width = _fold(spec, options)
        fold, inputs, sides, dims = [Fold(height, width)], 1, [height, width], 2
    blocks: list[list[nn.Module]] = []
    features: list[int] = []
    for outputs in channels[: spec.exit + 1]:
        block = conv_block(inputs, outputs, dims, bias=True)
        halve = min(sides) >= 2
        block += conv_block(outputs, outputs, dims, bias=True, halve=halve)
        sides = [side // 2 for side in sides] if halve else sides
        blocks.append(block)
        flat = outputs
        for side in sides:
            flat *= side
        features.append(flat)
        inputs = outputs
    stages = [nn.Sequential(*fold, *blocks[0], *blocks[1])]
    stages += [nn.Sequential(*block) for block in blocks[2:]]
    exits = [
        nn.Sequential(nn.Flatten(), nn.Dropout(options.dropout), nn.Linear(flat, spec.num_classes))
        for flat in features[1:]
    ]
    return StagedModel(stages, exits)


def _fold(spec: ModelSpec, options: VggOptions) -> tuple[int, int]:
    sides = sizes(spec, "fold", options.fold, (), 2)
    channels, *window = spec.input_shape
    size = math.prod(sides)
    if len(sides) != 2 or len(window) != 1 or size % channels or size > channels * window[0]:
        raise ConfigError(
            f"model option fold is {tuple(sides)}, expected a height and a width of which a series "
            f"of {spec.input_shape} fills every row, e.g. 18,25 for (3, 151)"
        )
    return sides[0], sides[1]


register_family("vgg", build_vgg, VggOptions)
