"""Distillation between the exits of a segment, see models/losses.distillation."""

from __future__ import annotations

from torch import Tensor

from edge_sdk.models.losses import exit_distillation, exit_weights
from edge_sdk.training.terms.base import Batch, Context, Term, Trained


class Distilling(Term):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._task = context.spec.task

    def begin_(self, trained: Trained) -> None:
        segment = trained.segment
        self._weights = exit_weights(self.plan, segment.first, segment.last)

    def loss(self, loss: Tensor, batch: Batch) -> Tensor:
        return loss + exit_distillation(batch.logits, self._weights, self.plan, self._task)
