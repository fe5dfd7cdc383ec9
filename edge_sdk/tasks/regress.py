"""`regress`: K numbers. Outputs (B, K) values, y (n, K) float32; (n,) is taken as (n, 1)."""

from __future__ import annotations

import math
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

MOST = 1e15  # beyond it lie marks of missing values, and squares that float32 has not


class Regress:
    metric = METRICS["regress"]

    def check(self, spec: ModelSpec) -> None:
        """Any number of values."""

    def output_shape(self, spec: ModelSpec) -> tuple[int, ...]:
        return (spec.num_classes,)

    @np.errstate(all="ignore")  # what becomes infinite is found by check_labels
    def labels(self, y: Array, names: tuple[str, ...], where: str) -> Array:
        if y.ndim not in (1, 2) or y.dtype.kind not in "iuf":
            wanted = "numbers (n,), or (n, K) of K values for each example"
            raise bad(where, f"y of shape {y.shape}, {y.dtype}", wanted)
        return np.ascontiguousarray(y.reshape(len(y), -1), dtype=np.float32)

    def num_outputs(self, y: Array) -> int:
        return int(y.shape[1])

    def check_labels(self, y: Array, x: Array, num_outputs: int, where: str) -> None:
        if y.shape != (len(x), num_outputs) or y.dtype != np.float32:
            wanted = f"({len(x)}, {num_outputs}) of float32, a row for each example in x"
            raise bad(where, f"y of shape {y.shape}, {y.dtype}", wanted)
        is_bad = ~(np.abs(y) < MOST).all(-1)  # NaN too
        if is_bad.any():
            got = f"y that is no number below {MOST:g} in {is_bad.sum()} examples"
            got += f", first at {is_bad.argmax()}"
            raise bad(where, got, "finite numbers", "remove or repair these examples")

    def strata(self, y: Array) -> npt.NDArray[np.int64]:
        return np.zeros(len(y), np.int64)

    def some_labels(self, shape: Sequence[int]) -> Array:
        return np.linspace(-1, 1, math.prod(shape), dtype=np.float32).reshape(shape)

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """Squared error, averaged over examples and values."""
        from torch.nn import functional

        return functional.mse_loss(outputs, labels)

    def weight(self, labels: Tensor) -> float:
        return len(labels)

    def softened(self, outputs: Tensor, temperature: float) -> Tensor:
        return outputs / temperature

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Squared distance of the values, averaged as the loss is; the temperature cancels."""
        return (student - teacher).square().mean()

    def answers(self, outputs: Any) -> Any:
        return outputs

    def counts(self, answers: Array, y: Array) -> Sums:
        """The sum of squared errors, and how many values there are."""
        squares = np.square(answers.astype(np.float64) - y).sum(-1)
        return np.stack([squares, np.full(len(y), y.shape[1], np.float64)], -1)

    def figure(self, sums: Sums) -> float:
        """RMSE: the root of the mean squared error, in the unit of y."""
        squares, count = sums.tolist()
        return float(np.sqrt(squares / count))

    def confidence(
        self, outputs: Floats, measure: Measure, before: Floats | None, spread: Floats
    ) -> Floats:
        """agreement with the exit before: 1 / (1 + d), d the root mean square of the differences,
        each over the spread of its output; 0 at exit 1, which has none before it."""
        if before is None:
            return np.zeros(len(outputs), np.float32)
        apart = np.sqrt(np.square((outputs - before) / spread).mean(-1))
        found: Floats = 1 / (1 + apart)
        return found
