"""`classify`: one of K classes. Outputs (B, K) logits, labels (n,) int64 from 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.text import bad
from edge_sdk.protocol.fields import MAX_OUTPUTS, Measure
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.base import Array, Floats, Sums, of_softmax
from edge_sdk.tasks.metrics import METRICS, NAMES_STEP

if TYPE_CHECKING:
    from torch import Tensor

# By the kind of a dtype, what to do about labels of it.
STEPS = {
    "f": 'give y.astype(int), if all are whole numbers, or say the task "regress"',
    "b": "give y.astype(int)",
    "S": "give y.astype(str) with class_names",
} | dict.fromkeys("OUT", NAMES_STEP)


class Classify:
    metric = METRICS["classify"]

    def check(self, spec: ModelSpec) -> None:
        if spec.num_classes < 2:
            raise ConfigError("got 1 class, expected at least 2 to tell apart; give other data")

    def output_shape(self, spec: ModelSpec) -> tuple[int, ...]:
        return (spec.num_classes,)

    def labels(self, y: Array, names: tuple[str, ...], where: str) -> Array:
        """(n,) int64, those of text by their place in names."""
        if y.ndim == 2:
            step = "give y[:, 0]" if y.shape[1] == 1 else "of one-hot rows give y.argmax(1)"
            other = ', or say the task, e.g. "multilabel" or "regress" (docs/tasks.md)'
            wanted = f"({len(y)},), a label for each example"
            raise bad(where, f"y of shape {y.shape}", wanted, step + other)
        is_text = y.dtype.kind in "UT" or (
            y.dtype.kind == "O" and all(isinstance(label, str) for label in y.flat)
        )
        if is_text and names:
            numbers = {label: number for number, label in enumerate(names)}
            unknown = sorted({str(label) for label in y.flat} - numbers.keys())
            if unknown:
                step = "add it there on every device, or correct the data"
                raise bad(where, f"the label {unknown[0]!r:.60}", "a name of class_names", step)
            return np.array([numbers[str(label)] for label in y.flat], np.int64).reshape(y.shape)
        if y.dtype.kind not in "iu":
            step = STEPS.get(y.dtype.kind, "correct the data")
            raise bad(where, f"y of dtype {'text' if is_text else y.dtype}", "integers", step)
        if y.max() > MAX_OUTPUTS:  # before it becomes another number
            step = "number the classes from 0, e.g. by np.unique(y, return_inverse=True)[1]"
            raise bad(where, f"labels up to {y.max()}", f"at most {MAX_OUTPUTS}", step)
        return y.astype(np.int64)

    def num_outputs(self, y: Array) -> int:
        return int(y.max(initial=0)) + 1

    def check_labels(self, y: Array, x: Array, num_outputs: int, where: str) -> None:
        if y.shape != x.shape[:1] or y.dtype != np.int64:
            wanted = f"{x.shape[:1]} of int64, one for each example in x"
            raise bad(where, f"y of shape {y.shape}, {y.dtype}", wanted)
        check_range(y, num_outputs, where)

    def strata(self, y: Array) -> npt.NDArray[np.int64]:
        return y

    def some_labels(self, shape: Sequence[int]) -> Array:
        return np.arange(shape[0]) % shape[-1]

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy in nats."""
        from torch.nn import functional

        return functional.cross_entropy(outputs, labels)

    def weight(self, labels: Tensor) -> float:
        return len(labels)

    def softened(self, outputs: Tensor, temperature: float) -> Tensor:
        return (outputs / temperature).log_softmax(-1)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher || student) in nats, averaged over the batch."""
        from torch.nn import functional

        return functional.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def answers(self, outputs: Any) -> Any:
        return outputs.argmax(-1)

    def counts(self, answers: Array, y: Array) -> Sums:
        """Whether it is right, and 1."""
        right = (answers == y).astype(np.float64)
        return np.stack([right, np.ones_like(right)], -1)

    def figure(self, sums: Sums) -> float:
        """Accuracy: the share that is right."""
        right, seen = sums.tolist()
        return float(right / seen)

    def confidence(
        self, outputs: Floats, measure: Measure, before: Floats | None, spread: Floats
    ) -> Floats:
        return of_softmax(outputs, measure)


def check_range(y: Array, num_classes: int, where: str) -> None:
    """Raise DataError unless labels are of 0..num_classes - 1."""
    if y.min() < 0 or y.max() >= num_classes:
        got, step = f"labels from {y.min()} to {y.max()}", "correct the data"
        if (y.min(), y.max()) == (1, num_classes):
            step = "labels count from 0, so give y - 1"
        raise bad(where, got, f"0 to {num_classes - 1}", step)
