"""`tokens`: a class for each place of a text. Outputs (B, T, K) logits, y (n, T) int64 from 0, or
IGNORED where nothing counts. The next token is such a class: y is x moved on by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.text import bad
from edge_sdk.protocol.fields import MAX_OUTPUTS, Measure
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.base import Array, Floats, Sums, of_softmax
from edge_sdk.tasks.classify import check_range
from edge_sdk.tasks.metrics import METRICS

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


class Tokens:
    metric = METRICS["tokens"]

    def check(self, spec: ModelSpec) -> None:
        if spec.num_classes < 2:
            raise ConfigError("got 1 class of tokens, expected at least 2; give other data")

    def output_shape(self, spec: ModelSpec) -> tuple[int, ...]:
        return (spec.input_shape[-1], spec.num_classes)

    def labels(self, y: Array, names: tuple[str, ...], where: str) -> Array:
        if y.ndim != 2 or y.dtype.kind not in "iu":
            wanted = f"integers (n, T), {IGNORED} where nothing counts"
            raise bad(where, f"y of shape {y.shape}, {y.dtype}", wanted)
        if y.max(initial=0) > MAX_OUTPUTS:
            raise bad(where, f"labels up to {y.max()}", f"at most {MAX_OUTPUTS}")
        return y.astype(np.int64)

    def num_outputs(self, y: Array) -> int:
        return max(0, int(y.max(initial=0))) + 1

    def check_labels(self, y: Array, x: Array, num_outputs: int, where: str) -> None:
        places = (len(x), x.shape[-1])
        if y.shape != places or y.dtype != np.int64:
            wanted = f"{places} of int64, one for each place of x"
            raise bad(where, f"y of shape {y.shape}, {y.dtype}", wanted)
        if not (is_counted := y != IGNORED).any():
            step = "is it the whole text that is left out?"
            raise bad(where, f"y of {IGNORED} alone", "a label at some place", step)
        check_range(y[is_counted], num_outputs, where)

    def strata(self, y: Array) -> npt.NDArray[np.int64]:
        return np.zeros(len(y), np.int64)

    def some_labels(self, shape: Sequence[int]) -> Array:
        *places, num_classes = shape
        return (np.arange(math.prod(places)) % num_classes).reshape(places)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy in nats, averaged over the places that count; 0 where none does."""
        from torch.nn import functional

        total = functional.cross_entropy(
            outputs.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        return total / max(1.0, self.weight(labels))

    def weight(self, labels: Tensor) -> float:
        return int((labels != IGNORED).sum())

    def softened(self, outputs: Tensor, temperature: float) -> Tensor:
        return (outputs / temperature).log_softmax(-1)

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """KL(teacher || student) in nats, averaged over all places: padding has answers, too."""
        from torch.nn import functional

        apart = functional.kl_div(student, teacher, reduction="sum", log_target=True)
        return apart / (student.numel() // student.shape[-1])

    def answers(self, outputs: Any) -> Any:
        return outputs.argmax(-1)

    def counts(self, answers: Array, y: Array) -> Sums:
        """Places that are right, and that count."""
        is_counted = y != IGNORED
        sums = (((answers == y) & is_counted).sum(-1), is_counted.sum(-1))
        return np.stack(sums, -1).astype(np.float64)

    def figure(self, sums: Sums) -> float:
        """Accuracy: the share of the places that count which is right; 0 where none counts."""
        right, seen = sums.tolist()
        return float(right / seen) if seen else 0.0

    def confidence(
        self, outputs: Floats, measure: Measure, before: Floats | None, spread: Floats
    ) -> Floats:
        """The mean over the places."""
        found: Floats = of_softmax(outputs, measure).mean(-1)
        return found
