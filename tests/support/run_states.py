"""What a made-up coordinator tells of its run, and a small run that is finished."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from coordinator.cohorts.in_process import InProcessCohort
from coordinator.fleet.counters import OTHER
from coordinator.methods.registry import make_method
from coordinator.runs.rounds import run_rounds
from coordinator.store.status import (
    FILE,
    ClientState,
    CohortState,
    LinkCounts,
    Snapshot,
    StatusFile,
    UnfitDevice,
    identity,
    utc,
)
from coordinator.store.store import Store
from edge_sdk.protocol.messages import ExitResult
from tests.support.examples import config, examples

HOSTILE = 'a" b\\ \n c \x1b[2J {x="1"} \u2028'
COHORT = CohortState(
    clients=(
        ClientState(
            name="pi-1",
            phase="upload",
            address="10.0.0.7",
            platform="raspberry-pi-4",
            exit=2,
            round=3,
            bytes_down=5_000_000,
            bytes_up=1_234,
            last_seen_s=1.5,
            updates=2,
            exits=(
                ExitResult(exit=1, loss=1.25, metric=0.5),
                ExitResult(exit=2, loss=0.5, metric=0.875),
            ),
            faults={"tensors": 1},
            duplicates=1,
        ),
        ClientState(name="pi-2", phase="away", last_seen_s=7200.0),
    ),
    chosen=4,
    needed=2,
    returned=1,
    bytes_in_flight=10,
    budget_bytes=64,
    spool_bytes=7,
    bytes_down=100,
    bytes_up=200,
    updates_accepted=5,
    updates_late=1,
    updates_stale=3,
    updates_failed=2,
    faults={"tensors": 3, "gone": 1, OTHER: 2},
    strangers=9,
    links=LinkCounts(frames_refused=11, messages_dropped=12, peers_ended=13, connections_ended=14),
    unfit=(
        UnfitDevice(name="pi-3", code="data", reason="its examples differ", count=12, age_s=3.0),
        UnfitDevice(name="10.0.0.9", code="version", reason="speaks protocol 3"),
    ),
)


def snapshot(**changes: Any) -> Snapshot:
    """Of this process, now."""
    now, pid = utc(), os.getpid()
    fields: dict[str, Any] = {
        "run": "1a2b",
        "phase": "round open",
        "round": 3,
        "rounds": 50,
        "pid": pid,
        "host": os.uname().nodename,
        "process": identity(pid),
        "started_utc": now,
        "phase_utc": now,
        "written_utc": now,
        "cohort": COHORT,
    }
    return Snapshot(**(fields | changes))


def told(folder: Path, **changes: Any) -> Path:
    StatusFile(folder / FILE).write(snapshot(**changes))
    return folder


def in_process() -> InProcessCohort:
    return InProcessCohort({"a": examples(8), "b": examples(8)}, {"a": 1, "b": 3}, 3)


def finished_run(folder: Path) -> None:
    settings = config("owners-mean", rounds=3, eval_every=2)
    run = Store.create(folder, settings, "emulate")
    run_rounds(run, make_method(settings), in_process(), examples(6))
    run.close()
