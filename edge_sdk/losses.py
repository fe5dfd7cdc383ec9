"""Training losses, functions of tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edge_sdk.errors import ShapeError


def joint_exit_loss(logits: Sequence[Tensor], labels: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted sum of the exits' cross entropies (HypeMeFed, section 4.2).

    logits: one (B, K) per exit; labels: (B,) int64. Returns a scalar in nats.
    Raises ShapeError if the number of weights is not the number of exits."""
    if len(weights) != len(logits):
        raise ShapeError(f"{len(weights)} exit weights for {len(logits)} exits; give one each")
    total = torch.zeros((), device=labels.device)
    for weight, logit in zip(weights, logits, strict=True):
        if weight:
            total = total + weight * functional.cross_entropy(logit, labels)
    return total


def proximal_term(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Tensor:
    """|w - w_received|^2 over trainable tensors (FedProx, 2020); the caller applies mu / 2."""
    return torch.stack([(w - anchor[name]).square().sum() for name, w in parameters.items()]).sum()
