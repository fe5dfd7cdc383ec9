"""Federated learning on one page: the same loop over emulated clients and real devices."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import torch

from coordinator.aggregation.border import Border
from coordinator.cohorts.base import Absence, ClientUpdate, Cohort, KeepsState
from coordinator.config import RunConfig
from coordinator.methods.base import Method, Metrics, families_of
from coordinator.runs.asking import Asking
from coordinator.runs.beginning import load_state
from coordinator.runs.evaluate import PERPLEXITY, figures_of, perplexity
from coordinator.runs.families import brought_forward, evaluate_families
from coordinator.runs.training_means import TrainingMeans
from coordinator.store.checkpoints import unsound
from coordinator.store.lock import RunLock
from coordinator.store.status import RunPhase
from coordinator.store.store import Store
from coordinator.store.tables import RoundTotals
from edge_sdk.data.loading import Examples
from edge_sdk.models import build
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.timing import clock, since
from edge_sdk.tasks.metrics import METRICS

log = logging.getLogger(__name__)
HOLDOUTS = {  # figures of a round, but for the metric's key, and how its line calls them
    "holdout": "on hold-outs as received",
    "personal": "each client's own model on its hold-out",
}


def is_evaluated(config: RunConfig, round: int) -> bool:
    return round % config.eval_every == 0 or round > config.rounds - config.eval_tail


@dataclass(frozen=True)
class RoundReport:
    """One finished round, for whoever watches. By exit, exit 1 first: the task's metric on the test
    set, and e^loss where the task tells that, empty if not evaluated; loss and metric of the
    participants on what they trained on. families: of a method that has several, the served model's
    metric by name."""

    round: int
    metric: list[float]
    metric_served: list[float]
    metrics: Metrics
    totals: RoundTotals
    loss: list[float | None] = field(default_factory=list)
    train_metric: list[float | None] = field(default_factory=list)
    task: Task = "classify"
    families: dict[str, list[float]] = field(default_factory=dict)

    def alone(self, kind: str) -> float | None:
        """A figure of hold-outs, one of HOLDOUTS."""
        return self.metrics.values.get(f"{kind}_{METRICS[self.task].key}")


def run_rounds(
    store: Store,
    method: Method,
    cohort: Cohort,
    test: Examples | None,
    *,
    own: Callable[[Method], dict[str, float]] | None = None,
    device: str | torch.device = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[RoundReport], None] = lambda _: None,
    phase: Callable[[RunPhase, int], None] = lambda *_: None,
) -> None:
    """Run the rounds that the store's run still lacks. own: figures of the clients' own models,
    asked for where the test set is; of a method without a model for all they are the only ones.
    `phase` is told what the run does from now on, and its round. Raises what store and cohort
    raise, and TrainerError when nobody returns anything; every finished round is kept then."""
    config = store.config
    families = families_of(method)
    models = [build(spec) for spec in ([f.spec for f in families.values()] or [method.spec])]
    parameters = [{name for name, _ in model.named_parameters()} for model in models]
    border = Border(
        models[0],
        config.aggregation.refuse_above,
        epochs=config.epochs,
        seed=config.seed,
        others=models[1:],
    )
    load_state(store, method, border)
    before = method.state_dict() if store.next_round() == 1 else None
    _accept_state(store, cohort)  # again, after a kill between a commit and that
    while (round := store.next_round()) <= config.rounds and not should_stop():
        phase("waiting for devices", round)
        asking = Asking(store, method, cohort, border, round)  # draws who takes part; may wait
        started, started_utc = time.monotonic(), datetime.now(timezone.utc).isoformat()
        phase("round open", round)
        results = store.record_results(round, _closing(asking.results(), round, phase))
        updates = brought_forward(results, method, parameters, config.staleness_half_life)
        training = TrainingMeans(method.spec.task, families)
        metrics = method.aggregate(round, training.watched(updates))
        metrics.values |= training.values()
        if why := unsound(method.state_dict()):
            log.error("round %d: %s; the state stays as it was", round, why)
            metrics.values["aggregate_refused"] = 1.0
            if before:
                method.load_state_dict(before)
            else:
                load_state(store, method)
        last: list[float] = []
        served: list[float] = []
        by_family: dict[str, list[float]] = {}
        if is_evaluated(config, round) and (test is not None or own):
            phase("evaluating", round)
            if test is not None and method.current():
                last, served = evaluate(method, test, metrics, device)
            if test is not None and families:
                by_family = evaluate_families(method, test, metrics, device)
            if own:
                metrics.values |= own(method)
        wall_s = time.monotonic() - started
        phase("saving", round)
        state = method.state_dict() | border.state_dict()
        metrics.values["state_bytes"] = float(sum(tensor.nbytes for tensor in state.values()))
        totals = store.commit(round, metrics, state, started_utc, wall_s)
        _accept_state(store, cohort)
        del state  # up to four models and a generator's memory
        before = None
        found = training.by_exit()
        task = method.spec.task
        report(RoundReport(round, last, served, metrics, totals, *found, task, by_family))


def _accept_state(store: Store, cohort: Cohort) -> None:
    """What emulated clients keep of the last committed round counts."""
    if isinstance(cohort, KeepsState):
        last = store.next_round() - 1
        cohort.accept(last, store.counted(last))


def evaluate(
    method: Method, test: Examples, metrics: Metrics, device: str | torch.device
) -> tuple[list[float], list[float]]:
    """The task's metric per exit on the test set, of the current model and of the one that is
    served; told to `metrics` too, with that of the mean of the exits' logits, and the time that it
    took."""
    start, metric = clock(), METRICS[method.spec.task]
    last = served = figures_of(method.spec, method.current(), test, device=device)
    if method.served() is not method.current():
        served = figures_of(method.spec, method.served(), test, device=device)
    metrics.phases["evaluate"] = since(start)
    for kind, found in ((metric.key, last), (f"{metric.key}_served", served)):
        for exit, value in enumerate(found.by_exit, 1):
            metrics.values[f"{kind}_exit_{exit}"] = value
        if method.spec.exit > 1:
            metrics.values[f"{kind}_mean_of_exits"] = found.of_mean
    for exit, loss in enumerate(served.losses if metric.has_perplexity else (), 1):
        metrics.values[f"{PERPLEXITY}_exit_{exit}"] = perplexity(loss)
    return last.by_exit, served.by_exit


def _closing(
    results: Iterator[ClientUpdate | Absence], round: int, phase: Callable[[RunPhase, int], None]
) -> Iterator[ClientUpdate | Absence]:
    """Pass the results on; after the last one the method has only its own work left."""
    yield from results
    phase("aggregating", round)


def check_folder(folder: Path | None, resume: bool) -> None:
    """Raise StoreError now rather than after data was read: a run is there, or none to resume."""
    if folder is None:
        return
    if resume:
        Store.resume(folder).close()
        RunLock(folder).release()  # before a port that it also has is the error
    else:
        Store.check_free(folder)


def print_round(report: RoundReport) -> None:
    """One progress line."""
    totals, metric = report.totals, METRICS[report.task]
    tested = "".join(
        f", {said} {' / '.join(map(metric.shown, values))}{' %' * metric.is_share}"
        for said, values in {
            f"{metric.name} per exit": report.metric,
            "served": report.metric_served,
        }.items()
        if values
    )
    for name, values in report.families.items():
        tested += f", {name} {' / '.join(map(metric.shown, values))}{' %' * metric.is_share}"
    exits = range(1, len(report.metric_served) + 1)
    if metric.has_perplexity and report.metric_served:
        found = (report.metrics.values[f"{PERPLEXITY}_exit_{exit}"] for exit in exits)
        tested += f", its {PERPLEXITY} {' / '.join(f'{value:.4g}' for value in found)}"
    stale = f" and {totals.stale} late" if totals.stale else ""
    own = "".join(
        f", {metric.name} {said} {metric.said(value)}"
        for kind, said in HOLDOUTS.items()
        if (value := report.alone(kind)) is not None
    )
    print(
        f"round {report.round}: {totals.returned} of {totals.chosen}{stale} returned"
        f"{tested}{own}, {totals.wall_s:.1f} s",
        flush=True,
    )
