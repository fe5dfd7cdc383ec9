"""Parts between the coordinator and everybody who has a job, as the budget lets them go."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from coordinator.fleet.flow_control import Budget
from coordinator.fleet.open_job import OpenJob
from coordinator.fleet.sessions import Sessions
from edge_sdk.protocol.messages import Fetch, Part


class Transfers:
    """Moves the parts of jobs and updates, as many at once as the budget allows. open_jobs: by
    client; whoever made the mapping changes it."""

    def __init__(
        self, open_jobs: Mapping[str, OpenJob], budget: Budget, sessions: Sessions
    ) -> None:
        self._open_jobs = open_jobs
        self._budget = budget
        self._sessions = sessions

    def pump(self) -> None:
        """Let those whose turn it is move as much as the budget allows."""
        while turn := self._budget.next():
            if open_job := self._open_jobs.get(turn[0]):
                self._move(open_job, turn[1])

    def ask(self, open_job: OpenJob) -> None:
        """Line the job up for its turn, if it has parts to move."""
        if open_job.has_to_move and self._left_to(open_job) > 0:
            self._budget.ask(open_job.name, open_job.link_rate.is_slow)

    def ask_again(self, open_job: OpenJob) -> None:
        """Its parts did not come: those of an update are asked for anew, the others may be on their
        way still."""
        if open_job.receiver is not None:
            open_job.receiver.restart()
        self.ask(open_job)

    def _left_to(self, open_job: OpenJob) -> int:
        """Parts that this device may have under way beside those that are: a share, so that nobody
        holds up all others by not moving them."""
        most = min(open_job.most_under_way, self._budget.share)
        return most - self._budget.held(open_job.name)

    def on_fetch(self, open_job: OpenJob, fetch: Fetch) -> bool:
        """The device says what it has, and wants more. False if it has asked in too many pieces."""
        if not open_job.request(fetch.first, fetch.count):
            return False
        if arrived := open_job.confirm(fetch.have):
            self._budget.release(open_job.name, arrived)
        self.ask(open_job)
        return True

    def note_part(self, open_job: OpenJob) -> None:
        """A new part of the job's update is here."""
        self._budget.release(open_job.name, 1)

    def break_off(self, open_job: OpenJob) -> None:
        """The device's connection is another one, or none: none of its parts is under way."""
        self._budget.drop(open_job.name)
        open_job.reconnect()
        if open_job.receiver is not None:
            self.ask(open_job)

    def drop_link(self, open_job: OpenJob) -> None:
        """The device is gone: its parts are not under way, and it is not asked for any."""
        if self._budget.held(open_job.name):
            open_job.link_rate.halve()
        self.break_off(open_job)
        self._budget.drop(open_job.name)

    def take_stalled(self) -> Iterator[OpenJob]:
        """Jobs whose parts would have come by now at their link's own pace."""
        now = time.monotonic()
        for name in self._budget.holders():
            open_job = self._open_jobs.get(name)
            held = self._budget.held(name)
            if open_job is None or now - open_job.moved <= open_job.patience_s(held):
                continue
            self._budget.drop(name)
            open_job.stalls += 1
            open_job.link_rate.halve()
            open_job.moved = now
            yield open_job

    def patience_s(self) -> dict[str, float]:
        """How long a device may say nothing because a part is on its way, for those of whom one
        is."""
        return {
            name: self._open_jobs[name].patience_s(self._budget.held(name))
            for name in self._budget.holders()
            if name in self._open_jobs
        }

    def _move(self, open_job: OpenJob, parts: int) -> None:
        """Ask for, or send, up to so many parts. What cannot be sent waits until the device says
        something: its connection is lost, or the queue of a slow one is full."""
        if not self._budget.held(open_job.name):
            open_job.moved = time.monotonic()
        parts = min(parts, self._left_to(open_job))
        if open_job.receiver is not None:
            under_way = open_job.receiver.num_under_way
            request = open_job.receiver.request(min(parts, open_job.link_rate.window - under_way))
            if request is None:
                return
            first, count = request
            have = open_job.receiver.num_received
            fetch = Fetch(round=open_job.round, have=have, first=first, count=count)
            if self._sessions.send(open_job.name, fetch):
                self._budget.take(open_job.name, count, open_job.link_rate.is_slow)
                self.ask(open_job)
            else:
                open_job.receiver.restart()
            return
        for _ in range(parts):
            if (index := open_job.next_requested()) is None:
                return
            part = Part(round=open_job.round, index=index)
            payload = open_job.sender.part(index)
            if not self._sessions.send(open_job.name, part, payload):
                return
            open_job.mark_sent()
            self._budget.take(open_job.name, 1, open_job.link_rate.is_slow)
            open_job.bytes_down += len(payload)
        self.ask(open_job)
