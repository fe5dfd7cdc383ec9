"""The families of transformers once more, as reference_families.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Weights = dict[str, Array]


def linear(w: Weights, name: str, x: Array) -> Array:
    """Over the last axis."""
    y = x @ w[f"{name}.weight"].T
    return y + w[f"{name}.bias"] if f"{name}.bias" in w else y


def layer_norm(w: Weights, name: str, x: Array) -> Array:
    apart = x - x.mean(-1, keepdims=True)
    spread = np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-5)
    return apart / spread * w[f"{name}.weight"] + w[f"{name}.bias"]


def rms_norm(w: Weights, name: str, x: Array) -> Array:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu(w: Weights, name: str, x: Array) -> Array:
    inner = linear(w, f"{name}.0", x)
    return linear(w, f"{name}.2", inner * (1 + np.vectorize(math.erf)(inner / math.sqrt(2))) / 2)


def swiglu(w: Weights, name: str, x: Array) -> Array:
    gate = linear(w, f"{name}.gate", x)
    return linear(w, f"{name}.down", gate * sigmoid(gate) * linear(w, f"{name}.up", x))


def turned(x: Array, base: float) -> Array:
    """One head's features, (B, T, size), each pair i, i + size / 2 turned by an angle."""
    size, y = x.shape[2], x.copy()
    for t in range(x.shape[1]):
        for i in range(size // 2):
            angle = t * base ** (-2 * i / size)
            a, b = x[:, t, i], x[:, t, i + size // 2]
            y[:, t, i] = a * math.cos(angle) - b * math.sin(angle)
            y[:, t, i + size // 2] = b * math.cos(angle) + a * math.sin(angle)
    return y


def attention(w: Weights, name: str, x: Array, heads: int, kv_heads: int, is_causal: bool) -> Array:
    """Head by head; causal ones are turned by their positions."""
    q, k, v = (linear(w, f"{name}.{part}", x) for part in "qkv")
    size, made = q.shape[2] // heads, []
    for head in range(heads):
        at = head // (heads // kv_heads) * size
        one, key = q[..., head * size :][..., :size], k[..., at : at + size]
        if is_causal:
            one, key = turned(one, 10_000.0), turned(key, 10_000.0)
        scores = np.exp(one @ key.transpose(0, 2, 1) / math.sqrt(size))  # (B, T, T)
        if is_causal:
            scores = np.tril(scores)
        shares = scores / scores.sum(2, keepdims=True)
        made.append(shares @ v[..., at : at + size])
    return linear(w, f"{name}.o", np.concatenate(made, 2))


def patches(w: Weights, name: str, x: Array, patch: int) -> Array:
    """(B, C, *sides) to (B, T, dim); what lacks in the last patch of a side is zero."""
    sides = x.shape[2:]
    padded = np.pad(x, [(0, 0), (0, 0), *((0, -side % patch) for side in sides)])
    kernel, found = w[f"{name}.project.weight"], []
    for place in np.ndindex(*(-(-side // patch) for side in sides)):
        cut = padded[(..., *(slice(p * patch, (p + 1) * patch) for p in place))]
        flat = cut.reshape(len(x), -1) @ kernel.reshape(len(kernel), -1).T
        found.append(flat + w[f"{name}.project.bias"])
    y = np.stack(found, 1)
    return y + w[f"{name}.positions"] if f"{name}.positions" in w else y


def forward(
    norm: Callable[[Weights, str, Array], Array],
    feed_forward: Callable[[Weights, str, Array], Array],
    pool: Callable[[Array], Array],
    is_causal: bool,
) -> Callable[..., list[Array]]:
    def logits(
        w: Weights, x: Array, training: bool, after: Weights, spec: dict[str, Any]
    ) -> list[Array]:
        options, found = spec["options"], []
        heads = options["heads"]
        for s in range(spec["exit"]):
            if s == 0:
                x = patches(w, "stages.0.0", x, options["patch"])
            for number in range(options["layers"][s]):
                name = f"stages.{s}.{number + (s == 0)}"
                normed = norm(w, f"{name}.norm_1", x)
                kv_heads = options.get("kv_heads", heads)
                x = x + attention(w, f"{name}.attention", normed, heads, kv_heads, is_causal)
                x = x + feed_forward(w, f"{name}.feed_forward", norm(w, f"{name}.norm_2", x))
            found.append(linear(w, f"exits.{s}.head", norm(w, f"exits.{s}.norm", pool(x))))
        return found

    return logits


encoder = forward(layer_norm, gelu, lambda x: x.mean(1), is_causal=False)
llama = forward(rms_norm, swiglu, lambda x: x[:, -1], is_causal=True)
