"""Federated learning on one page: the same loop over emulated clients and real devices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone

import torch

from coordinator.cohort import Absence, ClientUpdate, Cohort
from coordinator.config import RunConfig
from coordinator.evaluate import accuracy_per_exit
from coordinator.methods.base import Method, Metrics
from coordinator.sampling import sample
from coordinator.status import RunPhase
from coordinator.store import RoundTotals, Store
from edge_sdk.data import Examples
from edge_sdk.errors import ShapeError, StoreError, TrainerError
from edge_sdk.trainer import clock, since

EMPTY_ROUNDS = 3


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
    """Run the rounds that the store's run still lacks. A round without any update is not one: it
    is tried again, first with those who have not failed in it, EMPTY_ROUNDS times in all. `phase`
    is told what the run does from now on, and its round. Raises what store and cohort raise, and
    TrainerError when nobody returns anything; every finished round is kept then."""
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
    empty = 0
    failed: set[str] = set()  # clients that returned nothing for the round at hand
    while (round := store.next_round()) <= config.rounds and not should_stop():
        phase("waiting for devices", round)
        clients = cohort.clients()  # may wait for devices
        started, started_utc = time.monotonic(), datetime.now(timezone.utc).isoformat()
        chosen = sample(clients, config.participants, seed=config.seed, round=round, failed=failed)
        work = {client.id: method.assign(client, round) for client in chosen}
        store.record_clients(chosen)
        phase("round open", round)
        results = _closing(cohort.train(work, round, config.deadline_s), round, phase)
        metrics = method.aggregate(round, store.recording(round, results))
        if metrics.num_updates == 0:
            store.rollback()
            empty += 1
            failed |= set(work)
            if empty == EMPTY_ROUNDS:
                raise TrainerError(
                    f"round {round}: none of {len(chosen)} participants returned an update, "
                    f"{empty} times in a row; see the lines above for why; {store.way_on()}"
                )
            continue
        empty = 0
        failed.clear()
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
        totals = store.commit(round, metrics, state, started_utc, wall_s, len(chosen))
        report(RoundReport(round, accuracy, served, metrics, totals))


def _closing(
    results: Iterator[ClientUpdate | Absence], round: int, phase: Callable[[RunPhase, int], None]
) -> Iterator[ClientUpdate | Absence]:
    """The results; after the last one the method has only its own work left."""
    yield from results
    phase("aggregating", round)
