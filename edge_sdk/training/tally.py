"""Loss and metric of an exit over batches, by the task of the model."""

from __future__ import annotations

from torch import Tensor

from edge_sdk.protocol.fields import Task
from edge_sdk.tasks.base import Sums
from edge_sdk.tasks.table import task_of


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
