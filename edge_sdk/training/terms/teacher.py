"""A second model that came with the job teaches (MH-pFedHNGD, after Hinton et al. 2015):

    loss = (1 - weight) of the labels' + weight T^2 KL(softmax(t / T) || softmax(z / T))

t: the teacher's answers, z: this model's, both of the last exit; the mean over a batch, in nats.
The teacher stays as it came, statistics of BatchNorm too. With is_trained a copy of it takes the
same steps on the labels alone, unclipped, and is returned. In memory: the second model, with a copy
its gradients, moments and activations too."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edge_sdk.models import StagedModel, build
from edge_sdk.protocol.messages import Teacher
from edge_sdk.protocol.tensors import Tensors, with_prefix
from edge_sdk.training.optim import Optimizer
from edge_sdk.training.terms.base import Batch, Context, Term, Trained

ROLE = "teacher/"


class Taught(Term):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        assert context.plan.teacher is not None
        self._told: Teacher = context.plan.teacher
        self._device = context.device
        self._copy: StagedModel | None = None

    def received(self, tensors: Tensors) -> Tensors:
        brought = with_prefix(tensors, ROLE)
        self._teacher = self._made(brought).eval()
        if self._told.is_trained:
            self._copy = self._made(brought)
        return {name: t for name, t in tensors.items() if not name.startswith(ROLE)}

    def _made(self, tensors: Tensors) -> StagedModel:
        model = build(self._told.model)
        model.load(tensors)
        return model.ready(self._device)

    def begin_(self, trained: Trained) -> None:
        if self._copy:
            self._optimizer = Optimizer(list(self._copy.train().parameters()), self.plan)

    def loss(self, loss: Tensor, batch: Batch) -> Tensor:
        weight, temperature = self._told.weight, self._told.temperature
        with torch.no_grad():
            answers = self._teacher(batch.features)[-1]
        taught = functional.kl_div(
            (batch.logits[-1] / temperature).log_softmax(-1),
            (answers / temperature).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        loss = (1 - weight) * loss + weight * temperature**2 * taught
        if self._copy:  # shares no parameter with the model, so neither has a part in the other's
            logits = self._copy(batch.features)[-1]
            loss = loss + functional.cross_entropy(logits, batch.labels)
        return loss

    def before_step_(self) -> None:
        if self._copy:
            self._optimizer.step_()

    def returned(self, tensors: Tensors) -> Tensors:
        if self._copy is None:
            return tensors
        return tensors | {ROLE + name: t.cpu() for name, t in self._copy.tensors().items()}
