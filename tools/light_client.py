"""A device that trains nothing: the whole protocol without torch, a message in, messages out.

It keeps nothing of what it downloads, only counts it and compares the beginning, and all clients of
a process send their updates from one buffer. What is known of the wire is here; light_fleet.py
runs hundreds of them over sockets.

The update of round r is value_of(r) everywhere, so the mean over any number of clients is that
value to the last bit, and what round r + 1 sends down shows whether round r's updates counted.
"""

from __future__ import annotations

import functools
import struct
import time
from collections import Counter
from collections.abc import Sequence
from typing import TypeAlias
from uuid import uuid4

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.fields import ITEM_BYTES
from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Accepted,
    Bye,
    DeviceProfile,
    ExitResult,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Job,
    Message,
    Part,
    Phase,
    Probe,
    Ready,
    Specs,
    Update,
    Welcome,
)
from edge_sdk.protocol.stream import PART_BYTES, digest_of, layout, num_parts

WINDOW = 8  # parts under way, as real devices have it
HELLO_S, HELLO_MAX_S = 2.0, 15.0  # between tries while there is no answer, as real devices have it
NUM_EXAMPLES = 100
COMPARED_BYTES = 64
PROFILE = DeviceProfile(
    platform="light-client",
    memory_total_bytes=2**32,
    memory_available_bytes=2**31,
    cores=4,
    gflops=10,
)
Outgoing: TypeAlias = tuple[Message, Payload | None]


def value_of(round: int) -> float:
    """What every float of a round's update is: exact in float16, never 0."""
    return 1.0 + (round % 64) / 64


@functools.lru_cache(maxsize=2)
def update_bytes(specs: Specs, round: int) -> memoryview:
    """The stream of an update: value_of(round) in every float, 0 in everything else."""
    offsets, total, _ = layout(specs)
    stream = bytearray(total)
    for spec, offset in zip(specs, offsets, strict=True):
        code = {"float16": "<e", "float32": "<f", "float64": "<d"}.get(spec.dtype)
        if code:
            count = spec.num_bytes // ITEM_BYTES[spec.dtype]
            values = struct.pack(code, value_of(round)) * count
            stream[offset : offset + spec.num_bytes] = values
    return memoryview(bytes(stream))


@functools.lru_cache(maxsize=2)
def update_digest(specs: Specs, round: int) -> str:
    return digest_of([update_bytes(specs, round)])


class LightClient:
    """One device without training. counts: what happened, by name, a fault as "fault CODE".
    given_at, accepted_at: time.monotonic() by round."""

    def __init__(self, client_id: str, input_shape: Sequence[int], num_classes: int) -> None:
        self.client_id = client_id
        self.counts: Counter[str] = Counter()
        self.given_at: dict[int, float] = {}
        self.accepted_at: dict[int, float] = {}
        self.welcome: Welcome | None = None  # None while the coordinator has not answered
        self.is_over = False  # the coordinator's run is
        self.hello_pause_s = HELLO_S  # grows until the coordinator answers
        self._session = uuid4().hex
        self._input_shape = tuple(input_shape)
        self._num_classes = num_classes
        self._job: Job | None = None
        self._update: Update | None = None
        self._layout = layout(())
        self._received: set[int] = set()  # indices of parts
        self._asked = 0
        self._last_accepted = 0  # round

    @property
    def round(self) -> int:
        """Of the job in hand, 0: none."""
        return self._job.round if self._job else 0

    def hello(self) -> Hello:
        """The first message of every connection."""
        self.welcome = None
        return Hello(
            protocol=PROTOCOL,
            client_id=self.client_id,
            session=self._session,
            profile=PROFILE,
            num_examples=NUM_EXAMPLES,
            input_shape=self._input_shape,
            num_classes=self._num_classes,
            round=self.round,
            job=self._job.id if self._job else None,
        )

    def heartbeat(self) -> Heartbeat:
        return Heartbeat(round=self.round)

    def on_message(self, message: Message, payload: Payload | None = None) -> list[Outgoing]:
        """What the device answers. Raises ProtocolError for what no coordinator may say."""
        if isinstance(message, Part):
            return self._on_part(message, payload or b"")
        if isinstance(message, Fetch):
            return self._on_fetch(message)
        if isinstance(message, Job):
            return self._on_job(message)
        if isinstance(message, Accepted):
            return self._on_accepted(message)
        if isinstance(message, Welcome):
            return self._on_welcome(message)
        if isinstance(message, Fault):
            return self._on_fault(message)
        if isinstance(message, Heartbeat):
            return []
        if isinstance(message, Probe):
            return [(self.heartbeat(), None)]
        if isinstance(message, Bye):
            self.welcome, self.is_over = None, message.is_final
            return [(Bye(reason="bye"), None)]
        raise ProtocolError(f"{self.client_id}: {type(message).__name__} is not for devices")

    def _on_welcome(self, welcome: Welcome) -> list[Outgoing]:
        is_first, self.welcome = self.welcome is None, welcome
        self.hello_pause_s = HELLO_S
        if self._job is None:
            return self._ready()
        return self._resume() if is_first else []

    def _resume(self) -> list[Outgoing]:
        """The link broke: what was under way is asked for, or told, again."""
        self.counts["resumed"] += 1
        if self._update:
            return [(self._update, None)]
        self._asked = len(self._received)  # parts come in order
        return self._ask()

    def _ready(self) -> list[Outgoing]:
        return [(Ready(exit=self.welcome.model.exit), None)] if self.welcome else []

    def _on_job(self, job: Job) -> list[Outgoing]:
        if self._job and self._job.id == job.id:  # given again by a coordinator that was restarted
            return self._resume()
        self.counts["jobs"] += 1
        self.given_at.setdefault(job.round, time.monotonic())
        self._job, self._update, self._received, self._asked = job, None, set(), 0
        self._layout = layout(job.tensors)
        return self._ask()

    def _on_part(self, part: Part, payload: Payload) -> list[Outgoing]:
        job = self._job
        if job is None or part.round != job.round or part.index in self._received:
            self.counts["parts unasked"] += 1
            return []
        if len(payload) != self._layout.part_size(part.index):
            raise ProtocolError(f"{self.client_id}: part {part.index} has {len(payload)} bytes")
        self.counts["bytes down"] += len(payload)
        if part.index == 0 and self._last_accepted == job.round - 1 > 0:
            want = update_bytes(trained(job), self._last_accepted)[:COMPARED_BYTES]
            self.counts["models compared"] += 1
            self.counts["models wrong"] += payload[:COMPARED_BYTES] != want
        self._received.add(part.index)
        return self._ask()

    def _ask(self) -> list[Outgoing]:
        """Fetch what the window allows; the finished update when everything is here."""
        job, num_received = self._job, len(self._received)
        assert job is not None
        if num_received == self._layout.num_parts:
            self._update = finished(job)
            return [(self._fetch(job, 0), None), (self._update, None)]
        under_way = self._asked - num_received
        count = min(WINDOW - under_way, self._layout.num_parts - self._asked)
        if under_way > WINDOW // 2 or count < 1:
            return []
        return [(self._fetch(job, count), None)]

    def _fetch(self, job: Job, count: int) -> Fetch:
        first, self._asked = self._asked, self._asked + count
        return Fetch(round=job.round, have=len(self._received), first=first, count=count)

    def _on_fetch(self, fetch: Fetch) -> list[Outgoing]:
        job = self._job
        if job is None or self._update is None or fetch.round != job.round:
            self.counts["fetches unasked"] += 1
            return []
        stream = update_bytes(trained(job), job.round)
        parts: list[Outgoing] = []
        last = min(fetch.first + fetch.count, num_parts(len(stream)))
        for index in range(fetch.first, last):
            payload = stream[index * PART_BYTES : (index + 1) * PART_BYTES]
            self.counts["bytes up"] += len(payload)
            parts.append((Part(round=job.round, index=index), payload))
        return parts

    def _on_accepted(self, accepted: Accepted) -> list[Outgoing]:
        if accepted.round != self.round:
            self.counts["accepted twice"] += 1
            return []
        self.counts["accepted"] += 1
        self.accepted_at[accepted.round] = time.monotonic()
        self._last_accepted = accepted.round
        self._job = self._update = None
        return self._ready()

    def _on_fault(self, fault: Fault) -> list[Outgoing]:
        self.counts[f"fault {fault.code}"] += 1
        if fault.code == "hello":
            return [(self.hello(), None)]
        if not self._job or fault.round != self._job.round:
            return []
        self._job = self._update = None
        return self._ready()


def trained(job: Job) -> Specs:
    """The job's tensors but for those that are frozen, which have a digest."""
    return tuple(spec for spec in job.tensors if spec.digest is None)


def finished(job: Job) -> Update:
    """As if trained: every tensor that came goes back, unless it is frozen, which is right for jobs
    of whole models."""
    exits = {e for part in job.plan.segments for e in range(part.first, part.last + 1)}
    return Update(
        job=job.id,
        digest=update_digest(trained(job), job.round),
        round=job.round,
        num_examples=NUM_EXAMPLES,
        num_steps=1,
        exits=tuple(ExitResult(exit=e, loss=0.0, metric=0.0) for e in sorted(exits)),
        phases={"train": Phase(wall_s=0.0)},
        peak_memory_bytes=0,
        tensors=trained(job),
    )
