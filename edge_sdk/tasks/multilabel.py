"""`multilabel`: each of K labels holds or not. Outputs (B, K) logits, y (n, K) of 0 and 1, kept as
float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_sdk.helpers.text import bad
from edge_sdk.protocol.fields import Measure
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.base import Array, Floats, Sums
from edge_sdk.tasks.metrics import METRICS

if TYPE_CHECKING:
    from torch import Tensor

WANTED = "(n, K) of 0 and 1, a column for each label"


class Multilabel:
    metric = METRICS["multilabel"]

    def check(self, spec: ModelSpec) -> None:
        """Any number of labels."""

    def output_shape(self, spec: ModelSpec) -> tuple[int, ...]:
        return (spec.num_classes,)

    def labels(self, y: Array, names: tuple[str, ...], where: str) -> Array:
        if y.ndim != 2 or y.dtype.kind not in "biuf":
            raise bad(where, f"y of shape {y.shape}, {y.dtype}", WANTED)
        if not np.isin(y, (0, 1)).all():
            raise bad(where, f"y from {y.min()} to {y.max()}", WANTED)
        return y.astype(np.float32)

    def num_outputs(self, y: Array) -> int:
        return int(y.shape[1])

    def check_labels(self, y: Array, x: Array, num_outputs: int, where: str) -> None:
        if y.shape != (len(x), num_outputs) or y.dtype != np.float32:
            wanted = f"({len(x)}, {num_outputs}) of float32, a row for each example in x"
            raise bad(where, f"y of shape {y.shape}, {y.dtype}", wanted)
        wrong = np.argwhere(~np.isin(y, (0, 1)))
        if len(wrong):
            example, label = wrong[0]
            got = f"y[{example}, {label}] {y[example, label]:g}, and {len(wrong) - 1} more such"
            raise bad(where, got, "0 or 1")

    def strata(self, y: Array) -> npt.NDArray[np.int64]:
        return np.zeros(len(y), np.int64)

    def some_labels(self, shape: Sequence[int]) -> Array:
        places: Array = np.indices(shape).sum(0)
        return (places % 2).astype(np.float32)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Binary cross entropy in nats, averaged over examples and labels."""
        from torch.nn import functional

        return functional.binary_cross_entropy_with_logits(outputs, labels)

    def weight(self, labels: Tensor) -> float:
        return len(labels)

    def softened(self, outputs: Tensor, temperature: float) -> Tensor:
        return outputs / temperature

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL of the K pairs of probabilities in nats, averaged as the loss is."""
        from torch.nn import functional

        held = teacher.sigmoid() * (functional.logsigmoid(teacher) - functional.logsigmoid(student))
        other = (-teacher).sigmoid() * (
            functional.logsigmoid(-teacher) - functional.logsigmoid(-student)
        )
        return (held + other).mean()

    def answers(self, outputs: Any) -> Any:
        """The labels that are rather there than not, as float32 0 and 1."""
        return (outputs > 0) * np.float32(1)

    def counts(self, answers: Array, y: Array) -> Sums:
        """Labels that are right, told, and true."""
        sums = ((answers * y).sum(-1), answers.sum(-1), y.sum(-1))
        return np.stack(sums, -1).astype(np.float64)

    def figure(self, sums: Sums) -> float:
        """Micro F1: 2 right / (told + true), of all labels together; 1 where there is none to tell
        and none is told."""
        right, told, true = sums.tolist()
        return float(2 * right / (told + true)) if told + true else 1.0

    def confidence(
        self, outputs: Floats, measure: Measure, before: Floats | None, spread: Floats
    ) -> Floats:
        """sigmoid: how sure the least sure label is, 0 for none and 1 for quite; entropy: one minus
        the mean entropy of the labels, in bits."""
        sure = 1 / (1 + np.exp(-np.abs(outputs)))  # probability of each answer, at least a half
        if measure == "sigmoid":
            least: Floats = 2 * sure.min(-1) - 1
            return least
        other = np.clip(1 - sure, 1e-12, None)
        bits = -(sure * np.log2(sure) + other * np.log2(other)).mean(-1)
        found: Floats = np.clip(1 - bits, 0, 1).astype(np.float32)
        return found
