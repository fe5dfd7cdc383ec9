"""Layers that the families share, for images (C, H, W) and for series (C, window)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from edge_sdk.errors import ConfigError
from edge_sdk.wire import ModelSpec

CONV: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
POOL: dict[int, type[nn.MaxPool1d] | type[nn.MaxPool2d]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d}


def batch_norm(channels: int, dims: int) -> nn.Module:
    """BatchNorm without its integer batch counter: with a fixed momentum nothing reads it, and an
    integer has no mean over clients."""
    norm = nn.BatchNorm2d(channels) if dims == 2 else nn.BatchNorm1d(channels)
    norm.num_batches_tracked = None
    return norm


def conv_block(
    inputs: int, outputs: int, dims: int, *, bias: bool, halve: bool = False
) -> list[nn.Module]:
    """3-wide convolution that keeps the size, BatchNorm, with `halve` a max pool, ReLU.

    The pool stands before the ReLU: the same function, as both are monotone, with a quarter of the
    ReLU's work in two dimensions (our measurement: 23 % off a training step of `cnn`)."""
    conv = CONV[dims](inputs, outputs, 3, padding=1, bias=bias)
    pool = [POOL[dims](2)] if halve else []
    return [conv, batch_norm(outputs, dims), *pool, nn.ReLU()]


def spatial_dims(spec: ModelSpec) -> int:
    """1 for (C, window), 2 for (C, H, W). Raises ConfigError otherwise."""
    dims = len(spec.input_shape) - 1
    if dims not in CONV:
        raise ConfigError(
            f"family {spec.family!r} takes input (C, window) or (C, H, W), got {spec.input_shape}"
        )
    return dims


def ratio_option(spec: ModelSpec, key: str, default: float) -> float:
    value = spec.options.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ConfigError(f"model option {key} is {value!r}, expected a number in [0, 1)")
    return float(value)


def channels_option(spec: ModelSpec, default: Sequence[int], least: int) -> list[int]:
    """Channels per block as option `channels`, e.g. (32, 64, 128), scaled by the spec's width."""
    value = spec.options.get("channels", tuple(default))
    if (
        not isinstance(value, tuple | list)
        or len(value) < least
        or not all(isinstance(c, int) and not isinstance(c, bool) and c >= 1 for c in value)
    ):
        raise ConfigError(
            f"model option channels is {value!r}, expected at least {least} positive integers "
            f"for {spec.exit} exits"
        )
    return [math.ceil(c * spec.width) for c in value]


def check_options(spec: ModelSpec, known: Sequence[str]) -> None:
    unknown = sorted(set(spec.options) - set(known))
    if unknown:
        raise ConfigError(
            f"family {spec.family!r} has no option {', '.join(unknown)}; known: {', '.join(known)}"
        )
