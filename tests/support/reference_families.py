"""The model families once more, in numpy and float64 after docs/protocol.md: no torch, no layers of
ours. w: tensors by name; x: (B, *input_shape)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.reference_transformers import encoder, llama

Array = npt.NDArray[np.float64]
Weights = dict[str, Array]


def norm(w: Weights, name: str, x: Array, training: bool, after: Weights) -> Array:
    """BatchNorm over axis 1; what becomes of its statistics goes into `after`."""
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    shape = [1, -1, *[1] * (x.ndim - 2)]
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    if training:
        n = x.size // x.shape[1]
        own = x.mean(axes)
        spread = ((x - own.reshape(shape)) ** 2).sum(axes)
        after[f"{name}.running_mean"] = 0.9 * mean + 0.1 * own
        after[f"{name}.running_var"] = 0.9 * var + 0.1 * spread / (n - 1)
        mean, var = own, spread / n
    scaled = (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + 1e-5)
    return scaled * w[f"{name}.weight"].reshape(shape) + w[f"{name}.bias"].reshape(shape)


def conv(w: Weights, name: str, x: Array, stride: int = 1, padding: int = 1) -> Array:
    """A sum over the kernel's places, in one or two dimensions."""
    kernel = w[f"{name}.weight"]
    sides = kernel.shape[2:]
    padded = np.pad(x, [(0, 0), (0, 0), *[(padding, padding)] * len(sides)])
    sizes = [(n - k) // stride + 1 for n, k in zip(padded.shape[2:], sides, strict=True)]
    out = np.zeros((len(x), len(kernel), *sizes))
    for place in np.ndindex(*sides):
        cut = tuple(
            slice(p, p + stride * (n - 1) + 1, stride) for p, n in zip(place, sizes, strict=True)
        )
        out += np.einsum("bc...,oc->bo...", padded[(..., *cut)], kernel[(..., *place)])
    if f"{name}.bias" in w:
        out += w[f"{name}.bias"].reshape(1, -1, *[1] * len(sides))
    return out


def max_pool(x: Array) -> Array:
    """2 wide, stride 2: what is left over at the end is dropped."""
    for axis in range(2, x.ndim):
        half = x.shape[axis] // 2
        even, odd = (x.take(range(start, 2 * half, 2), axis=axis) for start in (0, 1))
        x = np.maximum(even, odd)
    return x


def average_pool(x: Array, bins: int) -> Array:
    """Bin i of a side of n: floor(i n / bins) up to, without, ceil((i + 1) n / bins)."""
    for axis in range(2, x.ndim):
        n = x.shape[axis]
        means = []
        for i in range(bins):
            places = range(i * n // bins, math.ceil((i + 1) * n / bins))
            means.append(x.take(places, axis=axis).mean(axis))
        x = np.stack(means, axis)
    return x


def linear(w: Weights, name: str, x: Array) -> Array:
    flat = x.reshape(len(x), -1) @ w[f"{name}.weight"].T
    return flat + w[f"{name}.bias"] if f"{name}.bias" in w else flat


def relu(x: Array) -> Array:
    return np.maximum(x, 0)


def mlp(w: Weights, x: Array, training: bool, after: Weights, spec: dict[str, Any]) -> list[Array]:
    logits = []
    for s in range(spec["exit"]):
        first = 1 if s == 0 else 0
        x = relu(
            norm(w, f"stages.{s}.{first + 1}", linear(w, f"stages.{s}.{first}", x), training, after)
        )
        logits.append(linear(w, f"exits.{s}", x))
    return logits


def cnn(w: Weights, x: Array, training: bool, after: Weights, spec: dict[str, Any]) -> list[Array]:
    logits = []
    for s in range(spec["exit"]):
        at = 0
        if s == 0:
            x = relu(norm(w, "stages.0.1", conv(w, "stages.0.0", x), training, after))
            at = 3
        x = norm(w, f"stages.{s}.{at + 1}", conv(w, f"stages.{s}.{at}", x), training, after)
        x = relu(max_pool(x) if min(x.shape[2:]) >= 4 else x)
        logits.append(linear(w, f"exits.{s}.2", average_pool(x, 2)))
    return logits


def vgg(w: Weights, x: Array, training: bool, after: Weights, spec: dict[str, Any]) -> list[Array]:
    logits = []
    for s in range(spec["exit"]):
        at = 0
        for _ in range(2 if s == 0 else 1):
            x = norm(w, f"stages.{s}.{at + 1}", conv(w, f"stages.{s}.{at}", x), training, after)
            x, at = relu(x), at + 3
            x = norm(w, f"stages.{s}.{at + 1}", conv(w, f"stages.{s}.{at}", x), training, after)
            halves = min(x.shape[2:]) >= 2
            x, at = relu(max_pool(x) if halves else x), at + (4 if halves else 3)
        logits.append(linear(w, f"exits.{s}.2", x))
    return logits


def resnet18(
    w: Weights, x: Array, training: bool, after: Weights, spec: dict[str, Any]
) -> list[Array]:
    def block(name: str, x: Array, stride: int) -> Array:
        y = norm(w, f"{name}.residual.1", conv(w, f"{name}.residual.0", x, stride), training, after)
        y = norm(w, f"{name}.residual.4", conv(w, f"{name}.residual.3", relu(y)), training, after)
        if f"{name}.shortcut.0.weight" in w:
            x = conv(w, f"{name}.shortcut.0", x, stride, padding=0)
            x = norm(w, f"{name}.shortcut.1", x, training, after)
        return relu(y + x)

    logits, blocks = [], spec["options"]["blocks"]
    for s in range(spec["exit"]):
        at, groups = 0, [s + 1]
        if s == 0:
            x = relu(norm(w, "stages.0.1", conv(w, "stages.0.0", x), training, after))
            at, groups = 3, [0, 1]
        for group in groups:
            for number in range(blocks[group]):
                x = block(f"stages.{s}.{at}", x, 2 if group and number == 0 else 1)
                at += 1
        logits.append(linear(w, f"exits.{s}.2", average_pool(x, 1)))
    return logits


def lstm(w: Weights, x: Array, training: bool, after: Weights, spec: dict[str, Any]) -> list[Array]:
    def sigmoid(z: Array) -> Array:
        return 1 / (1 + np.exp(-z))

    logits = []
    for s in range(spec["exit"]):
        name, outs = f"stages.{s}.lstm", []
        hidden = w[f"{name}.weight_hh_l0"].shape[1]
        h = c = np.zeros((len(x), hidden))
        for t in range(x.shape[2]):
            z = x[:, :, t] @ w[f"{name}.weight_ih_l0"].T + w[f"{name}.bias_ih_l0"]
            z = z + h @ w[f"{name}.weight_hh_l0"].T + w[f"{name}.bias_hh_l0"]
            i, f, g, o = np.split(z, 4, axis=1)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
            outs.append(h)
        x = np.stack(outs, 2)
        logits.append(linear(w, f"exits.{s}.1", x[:, :, -1]))
    return logits


REFERENCES: dict[str, Callable[..., list[Array]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "vgg": vgg,
    "resnet18": resnet18,
    "lstm": lstm,
    "vit": encoder,
    "transformer": encoder,
    "llama": llama,
}


def cross_entropy(logits: Array, y: npt.NDArray[np.int64]) -> float:
    """Mean over the batch, in nats."""
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return float(-log_p[np.arange(len(y)), y].mean())
