"""How well a round's participants did on what they trained on, as they told it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

from coordinator.cohorts.base import ClientUpdate


class TrainingMeans:
    """Of each exit, loss (nats) and accuracy in the last local epoch: means over the updates that
    were watched, weighted by their examples."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._weights: defaultdict[str, float] = defaultdict(float)

    def watched(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Pass the updates on."""
        for update in updates:
            for result in update.message.exits:
                for what, value in (("loss", result.loss), ("train_accuracy", result.accuracy)):
                    name = f"{what}_exit_{result.exit}"
                    self._sums[name] += update.num_examples * value
                    self._weights[name] += update.num_examples
            yield update

    def values(self) -> dict[str, float]:
        """`loss_exit_1`, `train_accuracy_exit_1` and so on, of the exits that were trained."""
        return {name: total / self._weights[name] for name, total in self._sums.items()}
