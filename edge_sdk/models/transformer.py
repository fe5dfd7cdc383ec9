"""`transformer`: an encoder (Vaswani et al. 2017, normalised before each part) for series (C,
window), with an exit after each group of blocks.

Stage 1 begins with linear features of every `patch` steps and learnt positions. An exit is linear
on the normalised mean of all positions. A width below 1 takes heads and inner features away and
leaves what lies between blocks whole (Hou et al. 2020)."""

from __future__ import annotations

from torch import nn

from edge_sdk.models import register_family
from edge_sdk.models.attention import (
    BlockOptions,
    Mean,
    encoder_block,
    exit_of,
    heads_of,
    layers_of,
    patches,
    stages_of,
)
from edge_sdk.models.layers import input_axes
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec


class TransformerOptions(BlockOptions, frozen=True):
    pass


def build_transformer(spec: ModelSpec, options: TransformerOptions) -> StagedModel:
    """Raises ConfigError for other inputs than series, and for heads that do not divide dim."""
    input_axes(spec, 2)
    heads, dim = heads_of(spec, options), options.dim
    first = patches(spec, options, has_positions=True)
    stages = stages_of(first, layers_of(spec, options), lambda: encoder_block(spec, options, heads))
    exits = [exit_of(spec, dim, Mean(), nn.LayerNorm(dim), bias=True) for _ in stages]
    return StagedModel(stages, exits)


register_family("transformer", build_transformer, TransformerOptions)
