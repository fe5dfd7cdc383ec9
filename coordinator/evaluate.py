"""Accuracy of every exit on the common test set."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_sdk.data import Examples
from edge_sdk.models import build
from edge_sdk.models.staged import moved
from edge_sdk.tensors import Tensors
from edge_sdk.wire import ModelSpec


@torch.no_grad()
def accuracy_per_exit(
    spec: ModelSpec,
    tensors: Tensors,
    examples: Examples,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 100,
) -> list[float]:
    """Share of `examples` that each exit gets right, exit 1 first. Every example counts."""
    model = build(spec)
    model.load(tensors)
    model.ready(device).eval()
    correct = torch.zeros(spec.exit, dtype=torch.int64)
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    for features, labels in zip(x.split(batch_size), y.split(batch_size), strict=True):
        logits: list[Tensor] = model(moved(features, device))
        for place, logit in enumerate(logits):
            correct[place] += (logit.argmax(1).cpu() == labels).sum()
    return [int(count) / len(examples) for count in correct]
