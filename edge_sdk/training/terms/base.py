"""The seam between the training loop and the fields of a plan that change it.

The loop (trainer.py, segment.py) calls the hooks of every term in the order of table.py and knows
none by name. A term is made for one job and forgotten with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edge_sdk.models import StagedModel
from edge_sdk.protocol.messages import Holdout, ModelSpec, Plan, Segment
from edge_sdk.protocol.tensors import Tensors


@dataclass(frozen=True)
class Context:
    """The job that terms are made for. labels (n, ...): of the examples that are trained on. kept:
    what this client keeps from earlier rounds, by name; no term writes into it. should_stop() is
    asked before every batch, note_epoch() told after every epoch of a segment."""

    spec: ModelSpec
    plan: Plan
    model: StagedModel
    labels: Tensor
    kept: Tensors = field(default_factory=dict)
    device: str | torch.device = "cpu"
    should_stop: Callable[[], bool] = lambda: False
    note_epoch: Callable[[], None] = lambda: None


class Trained(NamedTuple):
    """What a segment trains. named: its parameters by their names in the model, without those that
    are frozen. num_frozen: how many of its first stages are frozen as a whole. inputs: from places
    among the examples that are trained on, (B,), to what each of these stages makes; where there
    are none, to what the first stage takes alone."""

    segment: Segment
    stages: nn.ModuleList
    heads: nn.ModuleList
    named: dict[str, nn.Parameter]
    num_frozen: int
    inputs: Callable[[Tensor], list[Tensor]]


class Batch(NamedTuple):
    """A batch, or a part of one, as it went through a segment. features: what its first stage that
    is not frozen took; logits: one per exit, shallow first; labels of the batch."""

    features: Tensor
    logits: list[Tensor]
    labels: Tensor


class Term:
    """The hooks of one field of the plan, in the order in which a job calls them. Each does nothing
    unless a term overrides it. Raises ConfigError when made for a plan that it cannot follow."""

    def __init__(self, context: Context) -> None:
        self.plan = context.plan

    def received(self, tensors: Tensors) -> Tensors:
        """The model's own tensors, of all that travelled. Raises ShapeError."""
        return tensors

    def loaded_(self, holdout: Holdout | None) -> None:
        """The model has its tensors, and answered the examples set aside like this."""

    def begin_(self, trained: Trained) -> None:
        """A segment is about to be trained."""

    def adjusted(self, logits: Tensor) -> Tensor:
        """The logits of an exit as the labels' loss sees them."""
        return logits

    def loss(self, loss: Tensor, batch: Batch) -> Tensor:
        """The loss of a batch, of the one so far."""
        return loss

    def before_step_(self) -> None:
        """The gradients of a whole batch are there; those of parameters without any are None."""

    def end_(self, num_steps: int) -> None:
        """The segment is trained, and finite."""

    def returned(self, tensors: Tensors) -> Tensors:
        """What travels back, of the trained tensors (on the CPU) by their names in the model."""
        return tensors

    def kept(self) -> Tensors:
        """What the client keeps for the next round, on the CPU."""
        return {}


class Terms(Term):
    """All terms of a job as one."""

    def __init__(self, terms: list[Term]) -> None:
        self._terms = terms

    def received(self, tensors: Tensors) -> Tensors:
        for term in self._terms:
            tensors = term.received(tensors)
        return tensors

    def loaded_(self, holdout: Holdout | None) -> None:
        for term in self._terms:
            term.loaded_(holdout)

    def begin_(self, trained: Trained) -> None:
        for term in self._terms:
            term.begin_(trained)

    def adjusted(self, logits: Tensor) -> Tensor:
        for term in self._terms:
            logits = term.adjusted(logits)
        return logits

    def loss(self, loss: Tensor, batch: Batch) -> Tensor:
        for term in self._terms:
            loss = term.loss(loss, batch)
        return loss

    def before_step_(self) -> None:
        for term in self._terms:
            term.before_step_()

    def end_(self, num_steps: int) -> None:
        for term in self._terms:
            term.end_(num_steps)

    def returned(self, tensors: Tensors) -> Tensors:
        for term in self._terms:
            tensors = term.returned(tensors)
        return tensors

    def kept(self) -> Tensors:
        return {name: tensor for term in self._terms for name, tensor in term.kept().items()}
