"""One client's job in hand, and what its update must be like."""

from __future__ import annotations

import hashlib
import math
import time
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from weakref import WeakValueDictionary

import msgspec
from torch import Tensor

from coordinator.cohorts.base import Absence, ArrivedUpdate, Assignment, Client, ClientUpdate
from coordinator.fleet.declared import plausible_update
from coordinator.fleet.digests import RunningDigest
from coordinator.fleet.flow_control import SLOW_RATE, WINDOW, LinkRate, LinkRates
from coordinator.fleet.job_phases import JobEvent, JobPhase, phase_after
from edge_sdk.errors import ProtocolError, ShapeError
from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.messages import Holdout, Job, Ready, Update
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensor_lists import check_specs, is_frozen
from edge_sdk.protocol.tensors import Receiver, Sender, check_finite
from edge_sdk.tasks.metrics import METRICS

MOST_WANTED = 16  # ranges of parts that a device may have asked for and not been sent


@dataclass
class OpenJob:
    """A job that a client has in hand. phase: see job_phases.py; only advance() changes it. Times
    are of time.monotonic()."""

    client: Client
    job: Job
    assignment: Assignment
    sender: Sender
    link_rates: LinkRates
    phase: JobPhase = JobPhase.DOWNLOAD
    is_saved: bool = False  # in the spool, as one that is waited for beyond its round
    given: float = field(default_factory=time.monotonic)
    times_given: int = 1
    mismatched_since: float | None = None  # heartbeats name another round, or none
    moved: float = field(default_factory=time.monotonic)  # when parts last did
    # When the device got on: a part more than it ever had or sent, or a job or update begun.
    progressed: float = field(default_factory=time.monotonic)
    most_moved: int = 0  # parts of the transfer at hand, over all connections
    requested: deque[range] = field(default_factory=deque)  # asked for, not sent
    have: int | None = None  # parts that the device said it has, on this connection
    update: Update | None = None
    announced: float = 0.0
    receiver: Receiver | None = None
    stalls: int = 0  # without a new part since
    bytes_down: int = 0
    bytes_up: int = 0
    digest: RunningDigest | None = None  # of the update

    @property
    def name(self) -> str:
        return self.client.id

    @property
    def round(self) -> int:
        return self.job.round

    @property
    def link_rate(self) -> LinkRate:
        """That of the direction in which parts go now."""
        return self.link_rates.down if self.update is None else self.link_rates.up

    @property
    def is_late(self) -> bool:
        """Nobody waits for the update, and it is still taken."""
        return self.phase in (JobPhase.LATE, JobPhase.LATE_LOST)

    @property
    def is_lost(self) -> bool:
        """The device has not got the job, or no more, and has not said `ready` since."""
        return self.phase in (JobPhase.LOST, JobPhase.LATE_LOST)

    def advance(self, event: JobEvent) -> None:
        self.phase = phase_after(self.phase, event)

    @property
    def has_to_move(self) -> bool:
        if self.receiver is None:
            return bool(self.requested)
        return self.receiver.num_under_way <= self.link_rate.window // 2

    @property
    def most_under_way(self) -> int:
        """Parts. Of a job, down: a device's window, over a quick link the next one too."""
        rate = self.link_rate
        if self.receiver is not None:
            return rate.window
        return 2 * WINDOW if rate.rate >= SLOW_RATE else WINDOW

    @property
    def has_never_moved(self) -> bool:
        """Nothing of the job has reached the device, as far as it says."""
        return self.receiver is None and not self.most_moved

    @property
    def where_it_stopped(self) -> str:
        """For people."""
        if self.receiver is not None:
            return f"its update stopped after {self.bytes_up} bytes"
        return f"it has said of {self.most_moved} of the job's {self.sender.num_parts} parts"

    def patience_s(self, parts: int) -> float:
        """Seconds without any of so many parts under way after which something is wrong. Of a job
        of which nothing has come yet the first part is waited for."""
        return self.link_rate.patience_s((1 if self.has_never_moved else parts) * PART_BYTES)

    def note_moved(self, num_bytes: int) -> None:
        now = time.monotonic()
        self.link_rate.note_moved(num_bytes, now - self.moved)
        self.moved = now

    def confirm(self, have: int) -> int:
        """The device says how many parts it has. How many more that are than it ever said on this
        connection."""
        have = min(have, self.sender.num_parts)
        arrived = 0 if self.have is None else max(0, have - self.have)
        if arrived:
            self.stalls = 0
            self.note_moved(arrived * PART_BYTES)
        self.have = max(have, self.have or 0)
        if self.update is None:
            self._note_most(have)
        has_all = have == self.sender.num_parts
        self.advance(JobEvent.HAS_ALL_PARTS if has_all else JobEvent.LACKS_PARTS)
        return arrived

    def _note_most(self, num_parts: int) -> None:
        if num_parts > self.most_moved:
            self.most_moved, self.progressed = num_parts, time.monotonic()

    def request(self, first: int, count: int) -> bool:
        """The device asks for these parts. False if it has asked in too many pieces."""
        asked = range(first, min(first + count, self.sender.num_parts))
        if self.requested and asked and self.requested[-1].stop == first:
            self.requested[-1] = range(self.requested[-1].start, asked.stop)
        elif asked:
            self.requested.append(asked)
        if len(self.requested) <= MOST_WANTED:
            return True
        self.requested.pop()
        return False

    def next_requested(self) -> int | None:
        """Index of the part to send now, if there is one."""
        return self.requested[0].start if self.requested else None

    def mark_sent(self) -> None:
        """The part that next_requested() names is on its way: the one behind it comes next."""
        if left := self.requested.popleft()[1:]:
            self.requested.appendleft(left)

    def as_arrived(self) -> ArrivedUpdate:
        """The update that was announced, now that all of it is here. Raises ProtocolError if its
        bytes have another digest than was announced."""
        assert self.update is not None
        assert self.receiver is not None
        assert self.digest is not None
        announced = self.update.digest
        if (got := self.digest.of_whole(self.receiver.stream())) != announced:
            raise ProtocolError(
                f"update from {self.name}, round {self.round}: its bytes have the digest {got}, "
                f"announced was {announced}; nothing of it counts: look at that device's memory "
                "and disk"
            )
        return ArrivedUpdate(
            update=self.update,
            segments=self.job.plan.segments,
            model=self.job.model,
            upload_s=time.monotonic() - self.announced,
            bytes_down=self.bytes_down,
            bytes_up=self.bytes_up,
        )

    def absence(self, outcome: str, code: str, detail: str) -> Absence:
        """The participant's result, as it returns nothing that counts in its round."""
        segments, moved = self.job.plan.segments, (self.bytes_down, self.bytes_up)
        return Absence(self.client, segments, outcome, code, detail, *moved)

    def grow_examples(self, number: int) -> None:
        """The device's data may have grown with a restart of its program; its update may be of
        before or after that."""
        if number > self.client.num_examples:
            self.client = replace(self.client, num_examples=number)

    def announce(self, update: Update, receiver: Receiver, digest: RunningDigest) -> None:
        """The update is as asked for; its parts go to the receiver."""
        if self.update is None:  # one that is announced anew is no progress
            self.most_moved, self.progressed = 0, time.monotonic()
        self.update, self.receiver = plausible_update(update, self.job.model.task), receiver
        self.announced = time.monotonic()
        self.digest = digest
        self.advance(JobEvent.ANNOUNCED)

    def note_part(self, index: int, payload: Payload) -> None:
        """A new part of the update is stored."""
        self.bytes_up += len(payload)
        assert self.digest is not None
        assert self.receiver is not None
        self.digest.add(index, payload)
        self.stalls = 0
        self.note_moved(PART_BYTES)
        self._note_most(self.receiver.num_received)

    def reconnect(self) -> None:
        """The device's link is another one, or lost: nothing is under way any more."""
        self.have = None
        self.requested.clear()
        self.mismatched_since, self.stalls = None, 0
        self.advance(JobEvent.LINK_CHANGED)
        if self.receiver is not None:
            self.receiver.restart()
            self.advance(JobEvent.ANNOUNCED)

    def give_again(self) -> None:
        """The device begins its job anew."""
        self.update = self.receiver = None
        self.most_moved, self.progressed = 0, time.monotonic()
        self.advance(JobEvent.GIVEN_AGAIN)
        self.reconnect()
        self.times_given += 1

    def fits(self, ready: Ready) -> bool:
        """Whether the device can still train this."""
        if self.client.variant or self.client.num_weights:
            is_same = ready.num_weights == self.client.num_weights
            return is_same and bool(ready.exit) and ready.variant >= self.client.variant
        segments = self.job.plan.segments
        prefix = max((s.last for s in segments if s.first == 1), default=1)
        alone = {stage for s in segments if s.first > 1 for stage in range(s.first, s.last + 1)}
        return ready.exit >= prefix and all(
            stage <= ready.exit or stage in ready.stages for stage in alone
        )


class Senders:
    """Makes one Sender for all jobs that send the same tensors."""

    def __init__(self) -> None:
        # the tensors behind the ids live as long as their sender
        self._by_tensors: WeakValueDictionary[Hashable, Sender] = WeakValueDictionary()
        # of frozen tensors, by name, which are the same objects in every round
        self._digests: dict[str, tuple[Tensor, str]] = {}

    def of(self, assignment: Assignment) -> Sender:
        key = tuple((name, id(tensor)) for name, tensor in assignment.tensors.items())
        if (sender := self._by_tensors.get(key)) is None:
            digests = self._digests_of(assignment)
            sender = Sender(assignment.tensors, digests=digests, is_shared=True)
            self._by_tensors[key] = sender
        return sender

    def _digests_of(self, assignment: Assignment) -> dict[str, str]:
        found = {}
        for name, tensor in assignment.tensors.items():
            if not is_frozen(name, assignment.plan.frozen):
                continue
            known = self._digests.get(name)
            if known is None or known[0] is not tensor:
                known = self._digests[name] = tensor, Sender({name: tensor}).digest()
            found[name] = known[1]
        return found


def make_job(
    run: str, client: Client, assignment: Assignment, sender: Sender, round: int, deadline_s: float
) -> Job:
    """The job as it travels. Its id is a digest of the rest: given the state of the round before, a
    coordinator that was restarted makes the same one."""
    content = (run, round, client.id, assignment.model, assignment.plan, sender.specs)
    return Job(
        id=hashlib.blake2b(msgspec.json.encode(content), digest_size=16).hexdigest(),
        round=round,
        model=assignment.model,
        plan=assignment.plan,
        tensors=sender.specs,
        deadline_s=deadline_s,
    )


def check_values(update: ClientUpdate, sent: Mapping[str, Tensor]) -> None:
    """The Check of a round that has no other: raise ShapeError for NaN or infinite values."""
    check_finite(update.tensors, f"update from {update.client.id}, round {update.round}")


def check_update(update: Update, open_job: OpenJob) -> None:
    """Raise ShapeError unless the announced update is what the job asked for."""
    where = f"update from {open_job.name}, round {update.round}"
    check_specs(update.tensors, open_job.assignment.returns, where)
    if update.num_examples > open_job.client.num_examples:
        raise ShapeError(
            f"{where}: {update.num_examples} examples, hello said {open_job.client.num_examples}"
        )
    segments = open_job.job.plan.segments
    trained = {exit for g in segments for exit in range(g.first, g.last + 1)}
    told = [result.exit for result in update.exits]
    if sorted(told) != sorted(trained):
        raise ShapeError(f"{where}: results of exits {told}, trained were {sorted(trained)}")
    metric = METRICS[open_job.job.model.task]
    for result in update.exits:
        if not math.isfinite(result.loss):
            raise ShapeError(f"{where}: loss of exit {result.exit} is {result.loss}")
        if metric.is_share and result.metric > 1:
            raise ShapeError(f"{where}: {metric.name} of exit {result.exit} is {result.metric}")
    if update.holdout:
        _check_holdout(update.holdout, open_job, where)


def _check_holdout(told: Holdout, open_job: OpenJob, where: str) -> None:
    """Raise ShapeError for one that was not asked for, or is none."""
    if not open_job.job.plan.holdout:
        raise ShapeError(f"{where}: it tells of a hold-out, the job asked for none")
    if told.num_examples >= open_job.client.num_examples:
        got = f"{told.num_examples} examples of {open_job.client.num_examples}"
        raise ShapeError(f"{where}: a hold-out of {got}, which leaves none to train on")
    metric = METRICS[open_job.job.model.task]
    if (metric.is_share and told.metric > 1) or not math.isfinite(told.loss):
        got = f"{metric.name} {told.metric}, loss {told.loss}"
        raise ShapeError(f"{where}: a hold-out of {got}")
