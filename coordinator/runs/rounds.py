"""Federated learning on one page: the same loop over emulated clients and real devices."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

from coordinator.aggregation.staleness import rebase_late_updates
from coordinator.cohorts.base import Absence, Client, ClientUpdate, Cohort
from coordinator.cohorts.sampling import sample
from coordinator.config import RunConfig
from coordinator.methods.base import Method, Metrics
from coordinator.runs.evaluate import accuracy_per_exit
from coordinator.store.status import RunPhase
from coordinator.store.store import RoundTotals, Store
from edge_sdk.data.loading import Examples
from edge_sdk.errors import ShapeError, StoreError, TrainerError
from edge_sdk.models import build
from edge_sdk.protocol.timing import clock, since

log = logging.getLogger(__name__)


def is_evaluated(config: RunConfig, round: int) -> bool:
    return round % config.eval_every == 0 or round > config.rounds - config.eval_tail


@dataclass(frozen=True)
class RoundReport:
    """One finished round, for whoever watches. Accuracies: exit 1 first; empty if not evaluated."""

    round: int
    accuracy: list[float]
    accuracy_served: list[float]
    metrics: Metrics
    totals: RoundTotals


def run_rounds(
    store: Store,
    method: Method,
    cohort: Cohort,
    test: Examples | None,
    *,
    device: str | torch.device = "cpu",
    should_stop: Callable[[], bool] = lambda: False,
    report: Callable[[RoundReport], None] = lambda _: None,
    phase: Callable[[RunPhase, int], None] = lambda *_: None,
) -> None:
    """Run the rounds that the store's run still lacks. `phase` is told what the run does from now
    on, and its round. Raises what store and cohort raise, and TrainerError when nobody returns
    anything; every finished round is kept then."""
    config = store.config
    state = store.load_checkpoint()
    if state is not None:
        try:
            method.load_state_dict(state)
        except ShapeError as error:
            raise StoreError(
                f"the checkpoint of round {store.next_round() - 1} in {store.folder} is not this "
                f"run's: {error}; put back the run's own file or start another --run-dir"
            ) from error
    parameters = {name for name, _ in build(method.spec).named_parameters()}
    while (round := store.next_round()) <= config.rounds and not should_stop():
        phase("waiting for devices", round)
        chosen, num_chosen = store.participants_of(round)  # of a round that was cut short
        cohort.expect(chosen, num_chosen)
        chosen = chosen or choose_first(cohort, config, round)  # may wait for devices
        num_chosen = num_chosen or len(chosen)
        started, started_utc = time.monotonic(), datetime.now(timezone.utc).isoformat()
        phase("round open", round)
        arriving = _closing(gather(store, method, cohort, round, chosen, num_chosen), round, phase)
        results = store.record_results(round, arriving)
        updates = rebase_late_updates(
            results, method.current(), parameters, config.staleness_half_life
        )
        metrics = method.aggregate(round, updates)
        accuracy: list[float] = []
        served: list[float] = []
        if test is not None and is_evaluated(config, round):
            phase("evaluating", round)
            start = clock()
            accuracy = accuracy_per_exit(method.spec, method.current(), test, device=device)
            served = accuracy
            if method.served() is not method.current():
                served = accuracy_per_exit(method.spec, method.served(), test, device=device)
            metrics.phases["evaluate"] = since(start)
            for exit, (last, kept) in enumerate(zip(accuracy, served, strict=True), 1):
                metrics.values[f"accuracy_exit_{exit}"] = last
                metrics.values[f"accuracy_served_exit_{exit}"] = kept
        wall_s = time.monotonic() - started
        phase("saving", round)
        state = method.state_dict()
        totals = store.commit(round, metrics, state, started_utc, wall_s)
        report(RoundReport(round, accuracy, served, metrics, totals))


def _closing(
    results: Iterator[ClientUpdate | Absence], round: int, phase: Callable[[RunPhase, int], None]
) -> Iterator[ClientUpdate | Absence]:
    """The results; after the last one the method has only its own work left."""
    yield from results
    phase("aggregating", round)


def choose(
    cohort: Cohort, config: RunConfig, round: int, counted: Collection[str] = (),
    failed: Collection[str] = (), most: int | None = None,
) -> list[Client]:  # fmt: skip
    """Participants for a round, or more of them for one that lacks updates: first who have not
    failed in it. Nobody who has a job, or has returned one, is asked again."""
    places = config.participants if most is None else most
    if places is not None and config.mode == "async":
        places = max(0, places - cohort.num_busy)
    clients = [client for client in cohort.clients() if client.id not in counted]
    return sample(clients, places, seed=config.seed, round=round, failed=failed)


def choose_first(cohort: Cohort, config: RunConfig, round: int) -> list[Client]:
    """Participants for a round, of whom a share will be needed: not of nobody, where all who are
    there are late with the job of a round before. Asynchronous: those count."""
    tries = 0
    while not (chosen := choose(cohort, config, round)):
        tries += 1
        if (config.mode == "async" and cohort.num_busy) or not cohort.rest(tries):
            break
    return chosen


def gather(
    store: Store, method: Method, cohort: Cohort, round: int, chosen: Sequence[Client],
    num_chosen: int,
) -> Iterator[ClientUpdate | Absence]:  # fmt: skip
    """One round's results; the quorum is of num_chosen. A round that lacks updates is no round:
    others are asked, and those who failed again, until it has enough or waiting is in vain."""
    config, tries = store.config, 0
    needed = max(1, math.ceil(config.quorum * num_chosen), min(config.min_updates, num_chosen))
    counted: set[str] = set()
    failed: set[str] = set()
    while True:
        store.begin(round, chosen)
        store.record_clients(chosen)
        work = {client.id: method.assign(client, round) for client in chosen}
        before = len(counted)
        for result in cohort.train(work, round, config.deadline_s):
            if isinstance(result, Absence):
                failed.add(result.client.id)
            elif config.mode == "async" or not result.staleness:
                counted.add(result.client.id)
            yield result
            del result
        if config.mode == "async":  # the cohort knows who else was at work
            needed = cohort.needed
        if len(counted) >= needed:
            return
        tries = 0 if len(counted) > before else tries + 1
        log.warning("round %d: %d of %d needed returned", round, len(counted), needed)
        if not cohort.rest(tries):
            if counted:
                return
            raise TrainerError(
                f"round {round}: none of {len(failed)} participants returned an update, "
                f"{tries} times in a row; see the lines above for why; {store.way_on()}"
            )
        chosen = choose(cohort, config, round, counted, failed, needed - len(counted))


def check_folder(folder: Path | None, resume: bool) -> None:
    """Raise StoreError now rather than after data was read: a run is there, or none to resume."""
    if folder is None:
        return
    if resume:
        Store.resume(folder).close()
    else:
        Store.check_free(folder)


def print_round(report: RoundReport) -> None:
    """One progress line."""
    totals = report.totals
    last = " / ".join(f"{100 * share:.1f}" for share in report.accuracy) or "-"
    served = " / ".join(f"{100 * share:.1f}" for share in report.accuracy_served) or "-"
    stale = f" and {totals.stale} late" if totals.stale else ""
    print(
        f"round {report.round}: {totals.returned} of {totals.chosen}{stale} returned, "
        f"accuracy per exit {last} %, served {served} %, {totals.wall_s:.1f} s",
        flush=True,
    )
