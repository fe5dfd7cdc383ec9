"""`llama`: a causal transformer (Touvron et al. 2023) with an exit after each group of blocks:
RMSNorm before each part, rotary positions, feed-forward networks with gates, and keys and values
that groups of heads share.

Stage 1 begins with an embedding of each token id (T,) or, of a series (C, window), linear features
of every `patch` steps. An exit is linear on the normalised last position, which has seen all others
or, where the task asks for an answer at each token, on each: with the next tokens as labels it is a
language model. A width below 1 takes heads, with the keys and values that they share, and inner
features away and leaves what lies between blocks whole."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta
from torch import nn

from edge_sdk.errors import ConfigError
from edge_sdk.models import register_family
from edge_sdk.models.attention import (
    Attention,
    Block,
    BlockOptions,
    LastPosition,
    RMSNorm,
    Rotary,
    SwiGLU,
    Tokens,
    exit_of,
    heads_of,
    layers_of,
    patches,
    stages_of,
    token_axes,
)
from edge_sdk.models.layers import input_axes
from edge_sdk.models.options import MOST, widths
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.metrics import METRICS


class LlamaOptions(BlockOptions, frozen=True):
    kv_heads: Annotated[
        int, Meta(ge=0, le=MOST, description="of keys and values (as many as heads)")
    ] = 0
    rotary: Annotated[float, Meta(gt=1, description="base of the positions' angles (10000)")] = 1e4
    rotary_factor: Annotated[
        float, Meta(ge=1, description="slows slow angles down: 8 in Llama 3.1, 32 in 3.2 (1)")
    ] = 1.0
    norm_eps: Annotated[float, Meta(gt=0, lt=1, description="of RMSNorm (1e-5)")] = 1e-5
    tied: Annotated[
        bool, Meta(description="in weights to begin from the embedding is the output layer (no)")
    ] = False


def build_llama(spec: ModelSpec, options: LlamaOptions) -> StagedModel:
    """Raises ConfigError for other inputs than series and ids, for heads that do not divide dim,
    and for an odd number of features in one, which rotary positions take in pairs."""
    heads, dim = heads_of(spec, options, options.kv_heads), options.dim
    if heads.size % 2:
        got = f"heads of {heads.size} of dim {dim} features"
        raise ConfigError(f"model option heads gives {got}, expected an even number in each")
    inner = widths(spec, "ffn", options.ffn or -(-8 * dim // 3), (), 1)[0]

    rotary = Rotary(options.rotary, options.rotary_factor)

    def norm() -> RMSNorm:
        return RMSNorm(dim, options.norm_eps)

    def block() -> Block:
        attention = Attention(dim, heads, bias=False, is_causal=True, rotary=rotary)
        return Block((norm(), norm()), attention, SwiGLU(dim, inner))

    first: nn.Module
    if spec.vocabulary:
        token_axes(spec)
        first = Tokens(spec.vocabulary, dim, positions=0)
    else:
        input_axes(spec, 2)
        first = patches(spec, options, has_positions=False)
    stages = stages_of(first, layers_of(spec, options), block)
    exits = [exit_of(spec, dim, LastPosition(), norm(), bias=False) for _ in stages]
    return StagedModel(stages, exits)


LAYER = {
    "norm_1": "input_layernorm",
    "norm_2": "post_attention_layernorm",
    **{f"attention.{part}": f"self_attn.{part}_proj" for part in "qkvo"},
    **{f"feed_forward.{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}


def llama_names(spec: ModelSpec, options: LlamaOptions) -> dict[str, str]:
    """The names of a LlamaForCausalLM, or LlamaForSequenceClassification where the task does not
    ask for an answer at each token. Every exit begins as the last one."""
    names, layer = {}, 0
    if spec.vocabulary:
        names["stages.0.0.embedding.weight"] = "model.embed_tokens.weight"
    for stage, layers in enumerate(layers_of(spec, options)):
        for number in range(layers):
            block = f"stages.{stage}.{number + (stage == 0)}"
            for own, theirs in LAYER.items():
                names[f"{block}.{own}.weight"] = f"model.layers.{layer}.{theirs}.weight"
            layer += 1
    head = "model.embed_tokens" if options.tied else "lm_head"
    for exit in range(spec.exit):
        names[f"exits.{exit}.norm.weight"] = "model.norm.weight"
        last = head if spec.task == "tokens" else "score"
        names[f"exits.{exit}.head.weight"] = f"{last}.weight"
    return names


register_family(
    "llama", build_llama, LlamaOptions, llama_names, tasks=tuple(METRICS), takes_ids=True
)
