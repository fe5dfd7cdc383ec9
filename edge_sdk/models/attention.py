"""Layers of the transformer families. Between them features are (B, T, dim): T positions, which are
patches of an image, steps of a series or tokens.

A position that is padding is zero in all features, and no other one is: that is how a stage knows
it, which is handed features alone."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional

from edge_sdk.errors import ConfigError
from edge_sdk.models.layers import CONV
from edge_sdk.models.options import MOST, FamilyOptions, Size, Sizes, sizes, widths
from edge_sdk.protocol.messages import ModelSpec

FAR = -1e9  # added to the score of a padded position; finite, as an example may be all padding
KNOWN_POSITIONS = 8192  # of Llama 3 before its context was made longer
OFTEN = 4  # turns in these: rates from there on stay
INITIAL = 0.02  # standard deviation of embeddings at the start (Devlin et al. 2019)


class BlockOptions(FamilyOptions, frozen=True):
    """What the families share; their files give the defaults' reasons."""

    layers: Annotated[Sizes, Meta(description="blocks of each stage (1)")] = 1
    dim: Annotated[Size, Meta(description="features of a position (64)")] = 64
    heads: Annotated[Size, Meta(description="of attention in each block (4)")] = 4
    ffn: Annotated[
        int, Meta(ge=0, le=MOST, description="features inside a block (4 dim, llama: 8/3 dim)")
    ] = 0
    patch: Annotated[
        Size, Meta(description="of an image its side, of a series its steps, in one position (4)")
    ] = 4


class Heads(NamedTuple):
    """Of one attention layer: `kv` heads of keys and values, which number // kv heads share."""

    number: int
    kv: int
    size: int


def heads_of(spec: ModelSpec, options: BlockOptions, kv: int = 0) -> Heads:
    """Those of the spec's width: it takes heads that share keys and values away together. kv: 0 for
    as many as heads. Raises ConfigError for numbers that do not divide each other."""
    kv = kv or options.heads
    if options.dim % options.heads:
        wanted = f"expected a divisor of dim {options.dim}"
        raise ConfigError(f"model option heads is {options.heads}, {wanted}")
    if options.heads % kv:
        wanted = f"expected a divisor of heads {options.heads}"
        raise ConfigError(f"model option kv_heads is {kv}, {wanted}")
    kept = widths(spec, "kv_heads", kv, (), 1)[0]
    return Heads(kept * (options.heads // kv), kept, options.dim // options.heads)


def layers_of(spec: ModelSpec, options: BlockOptions) -> list[int]:
    """Blocks of each stage; one number holds for all. Raises ConfigError for too few."""
    given = options.layers
    if isinstance(given, int):
        return [given] * spec.exit
    return sizes(spec, "layers", given, [1] * spec.exit, spec.exit)[: spec.exit]


class Rotary(NamedTuple):
    """How far positions turn features. base: of the angles' geometric row. factor: by so much
    slower where a pair turns less than once in 8192 positions, by less where it turns up to 4 times
    (Llama 3.1, Grattafiori et al. 2024); 1: none."""

    base: float
    factor: float = 1.0


class RMSNorm(nn.Module):
    """Features over the root of their mean square (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt())


class Attention(nn.Module):
    """(B, T, dim) to the same: scaled dot products of heads (Vaswani et al. 2017), of which groups
    may share keys and values (Ainslie et al. 2023).

    rotary: turns pairs of a query's and a key's features by their position (Su et al. 2021)."""

    def __init__(
        self,
        dim: int,
        heads: Heads,
        *,
        bias: bool,
        is_causal: bool = False,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.is_causal, self.rotary = heads, is_causal, rotary
        self.q = nn.Linear(dim, heads.number * heads.size, bias=bias)
        self.k = nn.Linear(dim, heads.kv * heads.size, bias=bias)
        self.v = nn.Linear(dim, heads.kv * heads.size, bias=bias)
        self.o = nn.Linear(heads.number * heads.size, dim, bias=bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """bias: added to the scores of positions, (B, 1, 1, T)."""
        split = (
            layer(x).unflatten(-1, (-1, self.heads.size)) for layer in (self.q, self.k, self.v)
        )
        q, k, v = (part.transpose(1, 2) for part in split)  # (B, heads, T, size)
        if self.rotary is not None:
            angles = rotary_angles(x.shape[1], self.heads.size, self.rotary, x.device)
            q, k = turned(q, angles), turned(k, angles)
        if (shared := self.heads.number // self.heads.kv) > 1:
            k, v = repeated(k, shared), repeated(v, shared)
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, is_causal=self.is_causal
        )
        made: Tensor = self.o(out.transpose(1, 2).flatten(2))
        return made


def rotary_angles(
    positions: int, size: int, rotary: Rotary, device: torch.device | str = "cpu"
) -> Tensor:
    """(T, size): position times base^(-2i / size), of feature i and i + size / 2."""
    rates = rotary.base ** (torch.arange(size // 2, device=device) * (-2 / size))
    if rotary.factor > 1:
        turns = rates * KNOWN_POSITIONS / (2 * math.pi)
        kept = ((turns - 1) / (OFTEN - 1)).clamp(0, 1)
        rates = rates * (kept + (1 - kept) / rotary.factor)
    angles = torch.arange(positions, device=device)[:, None] * rates
    return torch.cat([angles, angles], 1)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """x (B, heads, T, size) with features i and i + size / 2 turned as the plane's axes."""
    first, second = x.chunk(2, -1)
    return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()


def repeated(x: Tensor, times: int) -> Tensor:
    """(B, kv, T, size) to (B, kv times, T, size), each head so many times in a row."""
    return x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


class SwiGLU(nn.Module):
    """(B, T, dim) to the same over `inner` features, one half the other's gate (Shazeer 2020)."""

    def __init__(self, dim: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, inner, bias=False)
        self.up = nn.Linear(dim, inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return made


class Block(nn.Module):
    """Attention and a feed-forward network, each over normalised features and added to them (Xiong
    et al. 2020). has_padding: positions of zeros are not attended to, and stay zero."""

    def __init__(
        self,
        norms: Sequence[nn.Module],
        attention: Attention,
        feed_forward: nn.Module,
        *,
        has_padding: bool = False,
    ) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = norms
        self.attention, self.feed_forward = attention, feed_forward
        self.has_padding = has_padding

    def forward(self, x: Tensor) -> Tensor:
        there = is_there(x) if self.has_padding else None  # (B, T, 1), 0 or 1
        bias = None if there is None else (1 - there).mul(FAR).transpose(1, 2)[:, None]
        x = x + self.attention(self.norm_1(x), bias)
        x = x + self.feed_forward(self.norm_2(x))
        return x if there is None else x * there


def is_there(x: Tensor) -> Tensor:
    """(B, T, 1) of 0 where a position is padding, else 1."""
    return x.ne(0).any(-1, keepdim=True).to(x.dtype)


def encoder_block(
    spec: ModelSpec, options: BlockOptions, heads: Heads, *, has_padding: bool = False
) -> Block:
    """LayerNorm, attention to all positions and two linear layers with a GELU between them."""
    dim = options.dim
    inner = widths(spec, "ffn", options.ffn or 4 * dim, (), 1)[0]
    between = nn.Sequential(nn.Linear(dim, inner), nn.GELU(), nn.Linear(inner, dim))
    attention = Attention(dim, heads, bias=True)
    norms = nn.LayerNorm(dim), nn.LayerNorm(dim)
    return Block(norms, attention, between, has_padding=has_padding)


class Patches(nn.Module):
    """An image (B, C, H, W) or a series (B, C, window) to (B, T, dim): a position for each patch,
    row by row, zeros where the last one of a row is not full. positions: T where each has learnt
    features of its own added, 0: none."""

    def __init__(self, channels: int, dim: int, patch: int, sides: Sequence[int], positions: int):
        super().__init__()
        self.project = CONV[len(sides)](channels, dim, patch, stride=patch)
        self.positions = learnt(positions, dim)
        lacking = [-side % patch for side in sides]
        self.padding = [size for lack in reversed(lacking) for size in (0, lack)]  # last axis first

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, self.padding) if any(self.padding) else x
        # Made contiguous here, once: else every linear layer of every block makes and keeps a copy.
        features: Tensor = self.project(x).flatten(2).transpose(1, 2).contiguous()
        return features if self.positions is None else features + self.positions


def learnt(positions: int, dim: int) -> nn.Parameter | None:
    return nn.Parameter(INITIAL * torch.randn(positions, dim)) if positions else None


class Tokens(nn.Module):
    """Token ids (B, T) int64 to (B, T, dim). positions: as of Patches; padding: the id of positions
    that are zero, -1: none."""

    def __init__(self, vocabulary: int, dim: int, positions: int, padding: int = -1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        nn.init.normal_(self.embedding.weight, std=INITIAL)
        self.positions = learnt(positions, dim)
        self.padding = padding

    def forward(self, ids: Tensor) -> Tensor:
        features: Tensor = self.embedding(ids)
        features = features if self.positions is None else features + self.positions
        return features * ids.ne(self.padding)[..., None] if self.padding >= 0 else features


def token_axes(spec: ModelSpec) -> None:
    """Raises ConfigError unless the input is (T,) token ids."""
    if len(spec.input_shape) != 1:
        got = f"takes token ids (T,), got {spec.input_shape} of vocabulary {spec.vocabulary}"
        raise ConfigError(f"family {spec.family!r} {got}; a vocabulary of 0 is for floats")


def patches(spec: ModelSpec, options: BlockOptions, *, has_positions: bool) -> Patches:
    """Of an image or a series, whichever the spec's input is."""
    channels, *sides = spec.input_shape
    count = math.prod(-(-side // options.patch) for side in sides)
    return Patches(channels, options.dim, options.patch, sides, count * has_positions)


def stages_of(
    first: nn.Module, layers: Sequence[int], block: Callable[[], Block]
) -> list[nn.Module]:
    """So many blocks in each; the first begins with `first`."""
    return [
        nn.Sequential(*([first] if number == 0 else []), *(block() for _ in range(count)))
        for number, count in enumerate(layers)
    ]


class Mean(nn.Module):
    """(B, T, dim) to (B, dim), over the positions that are no padding."""

    def __init__(self, *, has_padding: bool = False) -> None:
        super().__init__()
        self.has_padding = has_padding

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1) / is_there(x).sum(1).clamp(min=1) if self.has_padding else x.mean(1)


class LastPosition(nn.Module):
    """(B, T, dim) to (B, dim)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


def exit_of(
    spec: ModelSpec, dim: int, pool: nn.Module, norm: nn.Module, *, bias: bool
) -> nn.Module:
    """Linear on normalised features. pool: (B, T, dim) to (B, dim), but where the task asks for an
    answer at each position."""
    pool = nn.Identity() if spec.task == "tokens" else pool
    head = nn.Linear(dim, spec.num_classes, bias=bias)
    return nn.Sequential(OrderedDict(pool=pool, norm=norm, head=head))
