"""A family of token ids, of every task: an embedding of each token, then layers for each place.
Exits of `tokens` answer each place, those of the other tasks the mean of all places."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_sdk.models import StagedModel, register_family
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.metrics import METRICS

WIDTH = 8


class MeanOfPlaces(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)  # (B, T, WIDTH) -> (B, WIDTH)


class Mixed(nn.Module):
    """Each place with the one before it, so that order matters."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return x + self.linear(torch.cat([x, before], 2)).relu()


def build_embedded(spec: ModelSpec) -> StagedModel:
    first = nn.Sequential(nn.Embedding(spec.vocabulary, WIDTH), Mixed())
    stages = [first, *(Mixed() for _ in range(1, spec.exit))]
    pooled = [] if spec.task == "tokens" else [MeanOfPlaces()]
    exits = [nn.Sequential(*pooled, nn.Linear(WIDTH, spec.num_classes)) for _ in stages]
    return StagedModel(stages, exits)


register_family("embedded", build_embedded, tasks=tuple(METRICS), takes_ids=True)
