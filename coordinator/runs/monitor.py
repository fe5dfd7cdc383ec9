"""Tells what the run does, while it does it: to RUN/status.json, to the log, to the metrics.

By the thread that runs the rounds, every TELL_S and at every change of phase. While that thread
aggregates or evaluates nothing is told, but that it does.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from msgspec.structs import replace

from coordinator.fleet.cohort import Stopped
from coordinator.runs.rounds import RoundReport
from coordinator.store.status import (
    FILE,
    CohortState,
    RunPhase,
    Snapshot,
    StatusFile,
    identity,
    utc,
)
from edge_sdk.errors import QuorumError, StoreError
from edge_sdk.helpers.logs import event

log = logging.getLogger(__name__)
TELL_S = 2.0


class Monitor:
    """Keeps `latest`, which other threads may read, and the file. look: the cohort's state now;
    asked in the caller's thread only. clock: seconds that only grow. check_held: raises StoreError
    when the folder is not the run's any more; then nothing is written there."""

    def __init__(
        self,
        folder: Path,
        run: str,
        rounds: int,
        look: Callable[[], CohortState],
        clock: Callable[[], float] = time.monotonic,
        check_held: Callable[[], None] = lambda: None,
    ) -> None:
        now, pid = utc(), os.getpid()
        self.latest = Snapshot(
            run=run,
            phase="starting",
            round=0,
            rounds=rounds,
            pid=pid,
            host=socket.gethostname(),
            process=identity(pid),
            started_utc=now,
            phase_utc=now,
            written_utc=now,
        )
        self._file = StatusFile(folder / FILE)
        self._look = look
        self._clock = clock
        self._check_held = check_held
        self._publish()

    def tick(self) -> None:
        """Tell again if it is time; to be called at every message. Raises StoreError."""
        self._check_held()
        if self._clock() >= self._due:
            self._publish()

    def phase(self, phase: RunPhase, round: int | None = None, reason: str = "") -> None:
        """The run does something else now. round: None where it is the same."""
        number = self.latest.round if round is None else round
        now = utc()
        self.latest = replace(self.latest, phase=phase, round=number, reason=reason, phase_utc=now)
        self._publish()
        if phase == "round open":  # who is asked is known at the next message
            self._due = self._clock()

    def round_done(self, report: RoundReport) -> None:
        last, totals = self.latest, report.totals
        self.latest = replace(
            last,
            rounds_done=last.rounds_done + 1,
            rounds_s=last.rounds_s + totals.wall_s,
            last_round_s=totals.wall_s,
            task=report.task,
            metric=tuple(report.metric),
            loss=tuple(report.loss),
            train_metric=tuple(report.train_metric),
            holdout_metric=report.alone("holdout"),
            personal_metric=report.alone("personal"),
        )
        fields = event(
            "round_closed",
            round=report.round,
            chosen=totals.chosen,
            returned=totals.returned,
            stale=totals.stale,
            seconds=totals.wall_s,
            bytes_down=totals.bytes_down,
            bytes_up=totals.bytes_up,
        )
        log.info("round %d is saved after %.1f s", report.round, totals.wall_s, extra=fields)

    @contextmanager
    def until_end(self, is_finished: Callable[[], bool]) -> Iterator[None]:
        """Around the run: tells how it ended. A Stopped goes no further."""
        try:
            yield
        except (Stopped, KeyboardInterrupt) as stop:
            self.phase("stopped")
            if not isinstance(stop, Stopped):
                raise
        except QuorumError as error:
            self.phase("gave up", reason=str(error))
            raise
        except BaseException as error:
            with suppress(StoreError):  # the folder is another's
                self.phase("failed", reason=f"{type(error).__name__}: {error}")
            raise
        else:
            self.phase("finished" if is_finished() else "stopped")

    def _publish(self) -> None:
        self.latest = replace(self.latest, cohort=self._look(), written_utc=utc())
        self._check_held()
        self._file.write(self.latest)
        self._due = self._clock() + TELL_S
