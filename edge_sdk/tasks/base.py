"""What a task says: of labels in numpy, of losses in torch, which is imported where it is used, as
a device that only infers has none.

Shapes: B examples, K = spec.num_classes outputs, T = spec.input_shape[0] places of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_sdk.helpers.text import bad
from edge_sdk.protocol.fields import Measure, Vocabulary
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.metrics import Metric

if TYPE_CHECKING:
    from torch import Tensor

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]
Sums: TypeAlias = npt.NDArray[np.float64]


class TaskRules(Protocol):
    """One task. Outputs are what an exit gives, labels what a data file holds as y."""

    metric: Metric

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError for a model that this task cannot have."""

    def output_shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """Of an exit's output for one example."""

    # -- labels, numpy -----------------------------------------------------------------------------

    def labels(self, y: Array, names: tuple[str, ...], where: str) -> Array:
        """y in the task's type and shape. names: of the outputs, () for none. Raises DataError for
        a type or shape that means something else."""

    def num_outputs(self, y: Array) -> int:
        """K of such labels where nothing else says it."""

    def check_labels(self, y: Array, x: Array, num_outputs: int, where: str) -> None:
        """Raise DataError unless y holds a good label for each of the examples x."""

    def strata(self, y: Array) -> npt.NDArray[np.int64]:
        """(n,) classes to share examples out by: each part gets some of each; all 0: at random."""

    def some_labels(self, shape: Sequence[int]) -> Array:
        """Good labels for outputs of this shape, to try a model on."""

    # -- training, torch ---------------------------------------------------------------------------

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The mean over what counts of a batch, a scalar."""

    def weight(self, labels: Tensor) -> float:
        """How much of a batch counts: its examples, or its tokens."""

    def softened(self, outputs: Tensor, temperature: float) -> Tensor:
        """Outputs as `distance` compares them."""

    def distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        """How far softened outputs are from a teacher's, a scalar. Times temperature^2 its
        gradients keep their size when the temperature changes (Hinton et al. 2015)."""

    # -- answers, numpy and torch alike ------------------------------------------------------------

    def answers(self, outputs: Any) -> Any:
        """What a user is told, in the shape of labels."""

    def counts(self, answers: Array, y: Array) -> Sums:
        """(n, C) of each example; sums of them over any examples give `figure`."""

    def figure(self, sums: Sums) -> float:
        """The metric of summed counts (C,)."""

    def confidence(
        self, outputs: Floats, measure: Measure, before: Floats | None, spread: Floats
    ) -> Floats:
        """(n,) from 0 to 1. before: outputs of the exit before, None at exit 1. spread: (K,), how
        far the outputs of several examples lie apart."""


def of_softmax(outputs: Floats, measure: Measure) -> Floats:
    """(..., K) logits to (...) in 0..1: the largest probability of the softmax, or one minus its
    entropy over that of K equal probabilities."""
    centred = outputs - outputs.max(-1, keepdims=True)
    powers = np.exp(centred)
    total = powers.sum(-1, keepdims=True)
    if measure == "softmax":
        found: Floats = 1 / total[..., 0]
        return found
    probabilities = powers / total
    entropy = (probabilities * (np.log(total) - centred)).sum(-1)
    clipped: Floats = np.clip(1 - entropy / np.float32(np.log(outputs.shape[-1])), 0, 1)
    return clipped


def check_ids(x: Array, vocabulary: Vocabulary, where: str) -> None:
    """Raise DataError unless x (n, T) int64 are token ids below `vocabulary`."""
    if x.ndim != 2 or x.dtype != np.int64:
        got = f"x of shape {x.shape}, {x.dtype}, with a vocabulary of {vocabulary}"
        raise bad(where, got, "token ids (n, T) of int64")
    if x.size and not 0 <= x.min() <= x.max() < vocabulary:
        got = f"token ids from {x.min()} to {x.max()}"
        raise bad(where, got, f"0 to {vocabulary - 1}", "does the tokenizer belong to the model?")
