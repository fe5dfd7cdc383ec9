"""`transformer`: an encoder (Vaswani et al. 2017, normalised before each part) for series (C,
window) and token ids (T,), with an exit after each group of blocks.

Stage 1 begins with linear features of every `patch` steps, or an embedding of each token, and
learnt positions. An exit is linear on the normalised mean of all positions or, where the task asks
for an answer at each token, on each. A width below 1 takes heads and inner features away and leaves
what lies between blocks whole (Hou et al. 2020)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta
from torch import nn

from edge_sdk.errors import ConfigError
from edge_sdk.models import register_family
from edge_sdk.models.attention import (
    Block,
    BlockOptions,
    Mean,
    Tokens,
    encoder_block,
    exit_of,
    heads_of,
    layers_of,
    patches,
    stages_of,
    token_axes,
)
from edge_sdk.models.layers import input_axes
from edge_sdk.models.options import MOST
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.metrics import METRICS


class TransformerOptions(BlockOptions, frozen=True):
    pad: Annotated[
        int, Meta(ge=-1, le=MOST, description="token id that is padding, not attended to (none)")
    ] = -1


def build_transformer(spec: ModelSpec, options: TransformerOptions) -> StagedModel:
    """Raises ConfigError for other inputs than series and ids, for heads that do not divide dim,
    and for padding that is no token."""
    heads, dim = heads_of(spec, options), options.dim
    first, has_padding = _first(spec, options), options.pad >= 0

    def block() -> Block:
        return encoder_block(spec, options, heads, has_padding=has_padding)

    stages = stages_of(first, layers_of(spec, options), block)
    pool = Mean(has_padding=has_padding)
    exits = [exit_of(spec, dim, pool, nn.LayerNorm(dim), bias=True) for _ in stages]
    return StagedModel(stages, exits)


def _first(spec: ModelSpec, options: TransformerOptions) -> nn.Module:
    if not spec.vocabulary:
        input_axes(spec, 2)
        if options.pad >= 0:
            step = "give the vocabulary, or no pad"
            raise ConfigError(f"model option pad is {options.pad}, but inputs are floats; {step}")
        return patches(spec, options, has_positions=True)
    token_axes(spec)
    if options.pad >= spec.vocabulary:
        wanted = f"expected an id below the vocabulary of {spec.vocabulary}, or -1"
        raise ConfigError(f"model option pad is {options.pad}, {wanted}")
    return Tokens(spec.vocabulary, options.dim, spec.input_shape[0], options.pad)


register_family(
    "transformer", build_transformer, TransformerOptions, tasks=tuple(METRICS), takes_ids=True
)
