"""`vgg`: HypeMeFed's network (2024): blocks of two conv3-BatchNorm-ReLU and a max pool, the first
block common, one exit (flatten, linear) after each other block; sizes equal the published ones.

Series (3 x window accelerometer data) use 1-D convolutions; the paper folds a window into an image.
Options: channels (default 32, 64, 128, 256; the paper: 64-128-256-512 for STL10 and UniMiB),
dropout before each exit's linear layer (default 0; the published code has 0.5).
"""

from __future__ import annotations

from torch import nn

from edge_sdk.errors import ConfigError
from edge_sdk.models.layers import (
    channels_option,
    check_options,
    conv_block,
    ratio_option,
    spatial_dims,
)
from edge_sdk.models.staged import StagedModel
from edge_sdk.wire import ModelSpec


def build_vgg(spec: ModelSpec) -> StagedModel:
    check_options(spec, ["channels", "dropout"])
    dims = spatial_dims(spec)
    if spec.exit > 6:
        raise ConfigError(f"family 'vgg' has at most 6 exits, got {spec.exit}; use 'cnn'")
    channels = channels_option(spec, [32 * 2**i for i in range(spec.exit + 1)], spec.exit + 1)
    dropout = ratio_option(spec, "dropout", 0.0)
    sides = list(spec.input_shape[1:])
    blocks: list[list[nn.Module]] = []
    features: list[int] = []
    inputs = spec.input_shape[0]
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
    stages = [nn.Sequential(*blocks[0], *blocks[1])]
    stages += [nn.Sequential(*block) for block in blocks[2:]]
    exits = [
        nn.Sequential(nn.Flatten(), nn.Dropout(dropout), nn.Linear(flat, spec.num_classes))
        for flat in features[1:]
    ]
    return StagedModel(stages, exits)
