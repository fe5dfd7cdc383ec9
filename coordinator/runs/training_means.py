"""How well a round's participants did on what they trained on and on what they set aside, as they
told it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from coordinator.aggregation.weights import most_examples
from coordinator.cohorts.base import ClientUpdate
from coordinator.runs.holdouts import pooled
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import Holdout
from edge_sdk.tasks.metrics import METRICS


class TrainingMeans:
    """Over the updates that were watched: of each exit, loss and metric in the last local epoch,
    weighted by examples; of the models that were received, the metric on the hold-outs.
    No client counts for more than weights.most_examples, in either. families: names of the models
    of which clients train one each, in the order of their variants."""

    def __init__(self, task: Task, families: Iterable[str] = ()) -> None:
        self._metric = METRICS[task]
        self._families = {name: TrainingMeans(task) for name in families}
        self._examples: defaultdict[int, float] = defaultdict(float)
        self._loss: defaultdict[int, float] = defaultdict(float)
        self._means: defaultdict[int, float] = defaultdict(float)
        self._holdouts: list[Holdout] = []

    def watched(self, updates: Iterable[ClientUpdate]) -> Iterator[ClientUpdate]:
        """Pass the updates on."""
        for update in updates:
            self._watch(update)
            if self._families:
                list(self._families.values())[update.client.variant - 1]._watch(update)
            yield update

    def _watch(self, update: ClientUpdate) -> None:
        for result in update.message.exits:
            self._examples[result.exit] += update.num_examples
            self._loss[result.exit] += update.num_examples * result.loss
            self._means[result.exit] += update.num_examples * self._metric.to_mean(result.metric)
        if update.message.holdout:
            self._holdouts.append(update.message.holdout)

    def by_exit(self) -> tuple[list[float | None], list[float | None]]:
        """Losses and metrics, exit 1 first; None for one that nobody trained."""
        exits = range(1, max(self._examples, default=0) + 1)
        return (
            [self._mean(self._loss, exit) for exit in exits],
            [self._metric_of(exit) for exit in exits],
        )

    def values(self) -> dict[str, float]:
        """`loss_exit_1`, `train_accuracy_exit_1` and so on, of the exits that were trained, and
        `holdout_accuracy` and so on, where hold-outs were told (holdouts.pooled), by the metric's
        key; of each family too, as `NAME.loss_exit_1`."""
        names = ("loss", f"train_{self._metric.key}")
        by_exit = {
            f"{name}_exit_{exit}": value
            for name, values in zip(names, self.by_exit(), strict=True)
            for exit, value in enumerate(values, 1)
            if value is not None
        }
        most = most_examples([held.num_examples for held in self._holdouts])
        of_families = {
            f"{name}.{figure}": value
            for name, means in self._families.items()
            for figure, value in means.values().items()
        }
        return by_exit | pooled("holdout", self._holdouts, self._metric, most) | of_families

    def _metric_of(self, exit: int) -> float | None:
        mean = self._mean(self._means, exit)
        return None if mean is None else self._metric.of_mean(mean)

    def _mean(self, sums: Mapping[int, float], exit: int) -> float | None:
        examples = self._examples.get(exit)
        return sums[exit] / examples if examples else None
