"""What a run does for a method of several models (methods/base.HasFamilies), where it does it for
the one model of other methods elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

import torch

from coordinator.aggregation.staleness import rebase_late_updates
from coordinator.cohorts.base import ClientUpdate
from coordinator.methods.base import Method, Metrics, families_of
from coordinator.runs.evaluate import PERPLEXITY, figures_of, perplexity
from edge_sdk.data.loading import Examples
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.timing import clock, since
from edge_sdk.tasks.metrics import METRICS


def brought_forward(
    updates: Iterable[ClientUpdate],
    method: Method,
    parameters: Sequence[set[str]],
    half_life: float,
) -> Iterator[ClientUpdate]:
    """The updates, late ones as if they had begun from the model that is there now: their family's,
    where there are several. parameters: names of those, of each model."""
    current = [family.current for family in families_of(method).values()] or [method.current()]
    for update in updates:
        place = max(update.client.variant, 1) - 1 if len(current) > 1 else 0
        yield from rebase_late_updates([update], current[place], parameters[place], half_life)
        del update  # no reference stays here


def evaluate_families(
    method: Method, test: Examples, metrics: Metrics, device: str | torch.device
) -> dict[str, list[float]]:
    """The task's metric per exit on the test set of each served model, told to `metrics` too: as
    `NAME.accuracy_exit_1` and so on, and of its last exit as `NAME.accuracy`; of tokens the
    perplexity likewise."""
    start, metric, found = clock(), METRICS[method.spec.task], {}
    for name, family in families_of(method).items():
        tested = figures_of(family.spec, family.served, test, device=device)
        found[name] = tested.by_exit
        metrics.values[f"{name}.{metric.key}"] = tested.by_exit[-1]
        for exit, value in enumerate(tested.by_exit, 1):
            metrics.values[f"{name}.{metric.key}_exit_{exit}"] = value
        for exit, loss in enumerate(tested.losses if metric.has_perplexity else (), 1):
            metrics.values[f"{name}.{PERPLEXITY}_exit_{exit}"] = perplexity(loss)
            metrics.values[f"{name}.{PERPLEXITY}"] = perplexity(loss)
    metrics.phases["evaluate"] = since(start)
    return found


def check_backbone(names: Collection[str], name: str) -> None:
    """Raise ConfigError unless a run has a backbone of this name. names: of those that it has."""
    if name not in names:
        has = f"it has {', '.join(names)}" if names else "it has one model alone; leave it out"
        raise ConfigError(f"--backbone {name}: the run has none of this name; {has}")
