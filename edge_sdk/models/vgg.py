"""`vgg`: HypeMeFed's network (2024): blocks of two conv3-BatchNorm-ReLU and a max pool, the first
block common, one exit (flatten, linear) after each other block; sizes equal the published ones.

A series (C, window) takes 1-D convolutions or, with option `fold`, becomes an image of one channel.
The published sizes for UniMiB (3 x 151, 8 classes) leave 24, 6 and 1 positions after two, three and
four halvings, which 3 x 151 as an image cannot give; 18 x 25 does, 150 steps of each axis. With
fold = 18, 25 all three sizes are exact; how the paper itself cuts the window it does not say.
Options: channels (default 32, 64, 128, 256; the paper: 64-128-256-512 for STL10 and UniMiB),
dropout before each exit's linear layer (default 0; the published code has 0.5),
fold (height, width; for series only; height * width is a multiple of C; default none).
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models.layers import (
    check_options,
    conv_block,
    integers_option,
    ratio_option,
    spatial_dims,
    widths_option,
)
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec


class Fold(nn.Module):
    """A series (B, C, window) as an image (B, 1, height, width): the first height * width / C steps
    of channel 1, then those of channel 2, ..., row by row."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.height, self.width = height, width

    def forward(self, x: Tensor) -> Tensor:
        steps = self.height * self.width // x.shape[1]
        return x[..., :steps].reshape(-1, 1, self.height, self.width)


def build_vgg(spec: ModelSpec) -> StagedModel:
    """Raises ConfigError for more than 6 exits, or a fold that the input does not fill."""
    check_options(spec, ["channels", "dropout", "fold"])
    dims = spatial_dims(spec)
    if spec.exit > 6:
        raise ConfigError(f"family 'vgg' has at most 6 exits, got {spec.exit}; use 'cnn'")
    channels = widths_option(
        spec, "channels", [32 * 2**i for i in range(spec.exit + 1)], spec.exit + 1
    )
    dropout = ratio_option(spec, "dropout", 0.0)
    inputs, *sides = spec.input_shape
    fold: list[nn.Module] = []
    if "fold" in spec.options:
        height, width = _fold_option(spec)
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
        nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(flat, spec.num_classes))
        for flat in features[1:]
    ]
    return StagedModel(stages, exits)


def _fold_option(spec: ModelSpec) -> tuple[int, int]:
    sides = integers_option(spec, "fold", (), 2)
    channels, *window = spec.input_shape
    size = math.prod(sides)
    if len(sides) != 2 or len(window) != 1 or size % channels or size > channels * window[0]:
        raise ConfigError(
            f"model option fold is {tuple(sides)}, expected a height and a width of which a series "
            f"of {spec.input_shape} fills every row, e.g. 18,25 for (3, 151)"
        )
    return sides[0], sides[1]
