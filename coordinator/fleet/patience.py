"""How long one device may hold up everybody else: no longer than its own job may take, and its own
bytes move.

Heartbeats say that a device is there, not that it gets on. So they keep a run from giving up only
while it trains, up to a bound; whoever should ask, send or be ready and does not is not waited for.
"""

from __future__ import annotations

import time

from coordinator.config import RunConfig
from coordinator.fleet.job_phases import JobPhase
from coordinator.fleet.jobs import Jobs
from coordinator.fleet.open_job import OpenJob
from coordinator.fleet.sessions import Sessions
from edge_sdk.errors import QuorumError

IDLE_S = 300.0  # without a new part, at the turn of the device
SLOWER = 10.0  # times as long as it predicted may a device train
LEAST_TRAIN_S, MOST_TRAIN_S = 600.0, 86_400.0  # MOST: of one that predicts nothing, or too much
HELD_UP = ("late", "stalled")  # absences of those who held others up
AT_WORK = (JobPhase.TRAIN, JobPhase.LATE)


class Patience:
    """Of a run with its participants. give_up_after_s: how long nothing may change while there are
    too few devices, 0: without end."""

    def __init__(
        self, config: RunConfig, jobs: Jobs, sessions: Sessions, give_up_after_s: float
    ) -> None:
        self.since = time.monotonic()  # when something changed last, but for what open jobs tell
        self._config = config
        self._jobs, self._sessions = jobs, sessions
        self._limit_s = give_up_after_s
        self._held_up: set[str] = set()  # since then

    def note_change(self) -> None:
        self.since = time.monotonic()
        self._held_up.clear()

    def note_absence(self, name: str, code: str) -> None:
        """A participant returned nothing. Who held the others up does not count when it is asked
        again, until something changes."""
        if code in HELD_UP:
            self._held_up.add(name)

    def forgive_pause(self, seconds: float) -> None:
        self.since += seconds

    def check(self, what: str) -> None:
        """Raise QuorumError if nothing has changed for too long. what: its beginning."""
        now, limit = time.monotonic(), self._limit_s
        if not limit or now - self.since <= limit:
            return
        told = [self._last_sign(job) for job in self._jobs.open.values() if self._counts(job)]
        if now - max([self.since, *told]) > limit:
            raise QuorumError(
                f"{what}, and nothing changed for {limit:.0f} s (--give-up-after)"
                f"{self._sessions.lacking()}; nothing is lost: go on with --resume when the "
                "devices are back"
            )

    def end_holdups(self, elapsed_s: float) -> None:
        """Wait no longer for participants that do not get on. elapsed_s: since the last look."""
        now, jobs = time.monotonic(), self._jobs
        for name in sorted(jobs.awaited):
            job = jobs.open[name]
            if jobs.budget.is_waiting(name):  # for others
                job.progressed = min(now, job.progressed + elapsed_s)
            took_s, limit_s = now - job.progressed, self.limit_s(job)
            if took_s <= limit_s:
                continue
            if job.phase is JobPhase.TRAIN:
                jobs.let_go(name, f"trains for {took_s:.0f} s, {limit_s:.0f} were to be expected")
            else:
                jobs.give_up(name, f"did nothing for {took_s:.0f} s to get on with its job")

    def limit_s(self, job: OpenJob) -> float:
        """How long this job may be in its phase without a new part."""
        if job.phase in AT_WORK:
            return training_limit_s(job, self._config)
        if job.is_lost:
            return LEAST_TRAIN_S
        return max(IDLE_S, job.patience_s(max(1, self._jobs.budget.held(job.name))))

    def _counts(self, job: OpenJob) -> bool:
        return job.name not in self._held_up

    def _last_sign(self, job: OpenJob) -> float:
        """When the device got on, or was heard of while it trained."""
        session = self._sessions.all.get(job.name)
        if session is None or job.phase not in AT_WORK:
            return job.progressed
        return max(job.progressed, min(session.seen, job.progressed + self.limit_s(job)))


def training_limit_s(job: OpenJob, config: RunConfig) -> float:
    """Seconds that a device may train from its last part on: the round's time, or a multiple of
    what it predicted."""
    predicted_s = predicted_of(job)
    by_itself = min(MOST_TRAIN_S, SLOWER * predicted_s) if predicted_s else MOST_TRAIN_S
    if config.deadline_s:
        by_itself = min(by_itself, SLOWER * config.deadline_s)
    return max(LEAST_TRAIN_S, config.deadline_s + config.grace_s, by_itself)


def predicted_of(job: OpenJob) -> float:
    """Seconds that the device said such a job takes; 0: not known."""
    client, total = job.client, 0.0
    stage_s = dict(zip(client.stages, client.stage_s, strict=False))
    for segment in job.job.plan.segments:
        found = client.prefix_s if segment.first == 1 else stage_s.get(segment.first, 0.0)
        if not found:
            return 0.0
        total += found
    return total
