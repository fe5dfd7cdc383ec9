"""`vit`: a vision transformer (Dosovitskiy et al. 2021) for images (C, H, W), with an exit after
each group of blocks.

Stage 1 begins with patches and learnt positions. An exit is linear on the normalised mean of all
positions (Beyer et al. 2022), not on a class token: every exit then reads what its own blocks made,
and no token has to serve all exits. A width below 1 takes heads and inner features away and leaves
what lies between blocks whole (Hou et al. 2020)."""

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


class VitOptions(BlockOptions, frozen=True):
    pass


def build_vit(spec: ModelSpec, options: VitOptions) -> StagedModel:
    """Raises ConfigError for other inputs than images, and for heads that do not divide dim."""
    input_axes(spec, 3)
    heads, dim = heads_of(spec, options), options.dim
    first = patches(spec, options, has_positions=True)
    stages = stages_of(first, layers_of(spec, options), lambda: encoder_block(spec, options, heads))
    exits = [exit_of(spec, dim, Mean(), nn.LayerNorm(dim), bias=True) for _ in stages]
    return StagedModel(stages, exits)


register_family("vit", build_vit, VitOptions)
