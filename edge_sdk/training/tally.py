"""Loss and metric of an exit over batches, by the task of the model."""

from __future__ import annotations

import math

from torch import Tensor

from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.base import Sums
from edge_sdk.tasks.table import task_of

AT_ONCE = 100  # examples that a model answers without training
MOST_OUTPUTS = 2**22  # of an exit that answers them: 16 MiB; a text has K at each of its places


def answered_at_once(spec: ModelSpec) -> int:
    """How many examples go through a model together when it is only asked."""
    an_example = math.prod(task_of(spec.task).output_shape(spec))
    return max(1, min(AT_ONCE, MOST_OUTPUTS // an_example))


class Tally:
    """loss: the mean over what counts of all batches; metric: of all their answers together."""

    def __init__(self, task: Task) -> None:
        self._task = task_of(task)
        self._loss = self._weight = 0.0
        self._sums: Sums | float = 0.0

    def weight(self, labels: Tensor) -> float:
        return self._task.weight(labels)

    def add_(self, outputs: Tensor, labels: Tensor) -> None:
        """Outputs without a graph, and labels where they are."""
        weight = self._task.weight(labels)
        self._loss += float(self._task.loss(outputs, labels)) * weight
        self._weight += weight
        answers = self._task.answers(outputs).cpu().numpy()
        self._sums = self._sums + self._task.counts(answers, labels.cpu().numpy()).sum(0)

    @property
    def loss(self) -> float:
        return self._loss / max(1.0, self._weight)

    @property
    def metric(self) -> float:
        assert not isinstance(self._sums, float), "a batch is added first"
        return self._task.figure(self._sums)
