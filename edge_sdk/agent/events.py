"""What a device tells of its training: one line of log each, and a call of the program's own."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

from edge_sdk.capacity.choice import Choice
from edge_sdk.helpers import logs
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import ExitResult, Job, Segment, Update, Welcome
from edge_sdk.tasks.metrics import METRICS

EventKind: TypeAlias = Literal[
    "connected", "chosen", "job", "trained", "accepted", "failed", "lost", "finished", "ended"
]
REPEATED = ("failed", "lost")  # kinds that a coordinator can cause without end
SAME_S = 10.0  # between two lines that are alike


@dataclass(frozen=True)
class Event:
    """`kind` says which of the other fields are set; `detail` is always one line for a person.

    connected: welcomed to a run. chosen: exit (0: none, too small or, for now, too hot or the
    battery too low) and stages, again when memory or conditions change. job: round, segments.
    trained: round, exits, seconds; the update is on its way. accepted: round; it counts. failed:
    code, of a job also round; the device goes on. lost: the coordinator is gone or has said bye;
    the device waits for it. finished: the coordinator's run is over; the device waits for another.
    ended: the last one, unless run() raises."""

    kind: EventKind
    detail: str
    round: int = 0  # from 1; 0: not about a round
    exit: int = 0  # the deepest that this device trains
    stages: tuple[int, ...] = ()  # deeper ones that it can train alone
    segments: tuple[Segment, ...] = ()  # what a job trains: stages first .. last of each
    exits: tuple[ExitResult, ...] = ()  # exit, loss, metric on the local training data
    metric: str = ""  # what that is: accuracy, F1, RMSE
    seconds: float = 0.0  # of training, wall clock
    code: str = ""  # of errors.py
    level: int = logging.INFO  # of logging


class EventLog:
    """Logs each event and hands it to the callback, whose own errors end nothing. A coordinator
    that says the same again and again fills no log: of its like lines one in SAME_S is written,
    with how many were not. clock: seconds, of any beginning."""

    def __init__(
        self,
        log: logging.Logger,
        on_event: Callable[[Event], object] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._log, self._clock = log, clock
        self._told: dict[Event, tuple[float, int]] = {}  # since when, lines that were left out
        self._on_event = on_event
        self._has_failed = False

    def __call__(self, event: Event) -> None:
        if (behind := self._behind(event)) is not None:
            self._write(event, behind)
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:
            if not self._has_failed:
                self._log.exception(
                    "on_event raised at %r; the device goes on, later errors are not logged",
                    event.kind,
                )
            self._has_failed = True

    def _behind(self, event: Event) -> str | None:
        """What to write behind the line, mostly ""; None: the line is left out."""
        if event.kind not in REPEATED:
            return ""
        now = self._clock()
        since, num_left_out = self._told.get(event, (-math.inf, 0))
        if now - since < SAME_S:
            self._told[event] = since, num_left_out + 1
            return None
        self._told = {e: told for e, told in self._told.items() if now - told[0] < SAME_S}
        self._told[event] = now, 0
        return f" ({num_left_out} more like it since)" if num_left_out else ""

    def _write(self, event: Event, behind: str) -> None:
        where = f"round {event.round}: " if event.round else ""
        fields = logs.event(
            event.kind,
            round=event.round or None,
            code=event.code or None,
            exit=event.exit or None,
            seconds=event.seconds or None,
        )
        self._log.log(event.level, "%s%s%s", where, event.detail, behind, extra=fields)


def connected(welcome: Welcome) -> Event:
    model = welcome.model
    return Event("connected", f"welcome to run {welcome.run}: {model.family}, {model.exit} exits")


def chosen(choice: Choice, *, is_resting: bool = False) -> Event:
    """A choice of exit. is_resting: none for now, as the device has to cool or to be charged."""
    if is_resting:
        return Event("chosen", choice.reason, level=logging.WARNING)
    if not choice.exit:
        least = "variant 1" if any(row.variant for row in choice.rows) else "exit 1"
        detail = f"this device is too small for {least}: {choice.reason}"
        return Event("chosen", detail, level=logging.ERROR)
    what = f"variant {choice.variant}" if choice.variant else f"up to exit {choice.exit}"
    detail = f"training {what}; {choice.reason}"
    return Event("chosen", detail, exit=choice.exit, stages=choice.stages)


def job_given(job: Job) -> Event:
    segments = job.plan.segments
    stages = ", ".join(f"{segment.first}-{segment.last}" for segment in segments)
    return Event("job", f"job for stages {stages}", job.round, segments=segments)


def trained(update: Update, task: Task, *, was_before_start: bool = False) -> Event:
    """task: of the model. was_before_start: the process before this one trained it and may not have
    lived to tell."""
    seconds = update.phases["train"].wall_s if "train" in update.phases else 0.0
    detail = f"trained{' before this start' if was_before_start else ''}, sending the update"
    metric = METRICS[task]
    for result in update.exits:
        said = f"{metric.name} {metric.said(result.metric)}"
        detail += f"; exit {result.exit}: loss {result.loss:.3g}, {said}"
    exits = update.exits
    return Event("trained", detail, update.round, exits=exits, metric=metric.name, seconds=seconds)


def failed(detail: str, code: str, round: int = 0, level: int = logging.ERROR) -> Event:
    return Event("failed", detail, round, code=code, level=level)


def lost(detail: str, level: int = logging.WARNING) -> Event:
    return Event("lost", detail, level=level)
