"""Exits for features of any form: of maps the mean over positions, of sequences of tokens a
normalised token or the mean of all, and behind it a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

import torch
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models.cutting.recording import record_once
from edge_sdk.models.cutting.stages import Cut

# From the features' shape (without the examples) and the number of outputs to an exit.
MakeExit: TypeAlias = Callable[[tuple[int, ...], int], nn.Module]
KINDS = ("pool-linear", "class-token", "last-token")
POOLS = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
ON_THE_SECOND = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)


class Tokens(nn.Module):
    """(B, ..., D) to (B, K): LayerNorm, then the mean of all tokens, the first one or the last one,
    then a linear layer; "each": (B, T, K), every token by itself."""

    def __init__(self, features: int, outputs: int, which: str) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.linear = nn.Linear(features, outputs)
        self._which = which

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        if self._which == "class-token":
            x = x[:, 0]
        elif self._which == "last-token":
            x = x[:, -1]
        elif self._which == "pool-linear":
            x = x.flatten(1, -2).mean(1)
        logits: Tensor = self.linear(x)
        return logits


def exit_for(cut: Cut, axis: int, kind: str, num_classes: int, task: str) -> nn.Module:
    """axis: of the channels in the features. Raises ConfigError for a kind that is not known, or
    does not go with the features."""
    shape = cut.features.shape[1:]
    if kind not in KINDS:
        raise ConfigError(f"exits {kind!r}, expected one of {', '.join(KINDS)}, or a function")
    is_sequence = len(shape) > 1 and axis == len(shape)
    if (task == "tokens" and len(shape) != 2) or (kind != KINDS[0] and not is_sequence):
        what = "the task tokens" if task == "tokens" else f"exits {kind!r}"
        raise ConfigError(
            f"{what}: behind the cut {cut.name!r} are {shape} per example, expected (tokens, "
            "features); cut elsewhere, or take other exits"
        )
    features = shape[axis - 1]
    if task == "tokens" or is_sequence:
        return Tokens(features, num_classes, "each" if task == "tokens" else kind)
    if len(shape) == 1:
        return nn.Linear(features, num_classes)
    pool = POOLS.get(len(shape) - 1)
    if pool is None or axis != 1:
        raise ConfigError(
            f"behind the cut {cut.name!r} are {shape} per example with the channels on axis {axis};"
            " give exits= a function from that shape and the number of outputs to a module"
        )
    return nn.Sequential(pool(1), nn.Flatten(), nn.Linear(features, num_classes))


def channel_axes(
    module: nn.Module, x: Tensor, is_open: Callable[[str, nn.Module], bool], cuts: Sequence[Cut]
) -> list[int]:
    """The axis of the channels in the features of each cut, counted with the examples: 1 behind a
    convolution or BatchNorm; else the one that stays when the input has twice the positions, and
    where the module takes one size only, the last. x: (B, *input_shape)."""
    is_clear = [_ends_in(module.get_submodule(cut.name), ON_THE_SECOND) for cut in cuts]
    larger = None
    is_ids = not x.is_floating_point()
    if not all(is_clear) and (x.ndim > 2 or is_ids):
        sizes = [2 * n if axis >= 2 - is_ids else n for axis, n in enumerate(x.shape)]
        with suppress(Exception):  # another size than the module's own
            larger = record_once(module, torch.zeros(sizes, dtype=x.dtype), is_open)
    axes = []
    for cut, clear in zip(cuts, is_clear, strict=True):
        shape = cut.features.shape
        made = larger.calls[cut.ref.call].made.get(cut.ref.path) if larger else None
        same = [a for a in range(1, len(shape)) if made and made.shape[a] == shape[a]]
        axes.append(1 if clear else same[0] if len(same) == 1 else len(shape) - 1)
    return axes


def _ends_in(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether the last of its layers that have weights is of such a kind."""
    layers = [layer for layer in module.modules() if any(True for _ in layer.parameters(False))]
    return bool(layers) and isinstance(layers[-1], kinds)
