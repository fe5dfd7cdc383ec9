"""Messages between the agent and its trainer, over a socket pair on one machine.

The agent passes Part, Fetch and Update through unchanged, so tensors never lie in the agent; the
other messages stand here. On the socket a message is two lengths, its msgpack, and a payload."""

from __future__ import annotations

import socket
import struct
from typing import TypeAlias

import msgspec

from edge_sdk.capacity.costs import SegmentCost
from edge_sdk.protocol.fields import Count, Digest, Index, JobId, Struct, Task, Vocabulary
from edge_sdk.protocol.messages import (
    Fault,
    Fetch,
    InputScaling,
    Job,
    ModelSpec,
    Part,
    Plan,
    Update,
)

_LENGTHS = struct.Struct("<II")


class TrainerOptions(Struct, frozen=True, kw_only=True, tag="start"):
    """Agent to trainer, the first message: how to train, and on what data. threads 0: torch's
    default. measure_compute: measure this machine's speed first. calibration: the file of this
    device's memory calibration; saved_updates: the folder of a saved update; "": nothing is
    written. kept_tensors: the folder beside which frozen tensors are kept; "": none are. imports:
    modules of the user's that register model families or readers. augment: MODULE:FUNCTION
    that changes the inputs of every batch; "": none."""

    data: str
    threads: Count = 0
    device: str = "cpu"
    measure_compute: bool = True
    calibration: str = ""
    saved_updates: str = ""
    kept_tensors: str = ""
    imports: tuple[str, ...] = ()
    augment: str = ""


class LastWords(Struct, frozen=True, kw_only=True, tag="last_words"):
    """Trainer to agent: why it ends by itself. code: of an error."""

    code: str
    detail: str


class Inspected(Struct, frozen=True, kw_only=True, tag="inspected"):
    """Trainer to agent: what its data are and what it takes itself. gflops, layer_s 0: not
    measured. runtime_bytes: memory needed after the imports and a first step. finished: the job of
    a saved update, which was not accepted before a restart."""

    num_examples: Index
    input_shape: tuple[Index, ...]
    num_classes: Index
    num_labels: Index  # different ones that occur
    task: Task = "classify"
    vocabulary: Vocabulary = 0
    scaling: InputScaling | None = None
    class_names: Digest | None = None
    runtime_bytes: Count
    gflops: float
    layer_s: float = 0.0
    finished: Job | None = None


class Estimate(Struct, frozen=True, kw_only=True, tag="estimate"):
    """Agent to trainer: count what training this model costs, or each of its variants instead, in
    so many bytes; 0: in any."""

    model: ModelSpec
    plan: Plan
    variants: tuple[ModelSpec, ...] = ()
    memory_bytes: Count = 0


class Estimated(Struct, frozen=True, kw_only=True, tag="estimated"):
    """Trainer to agent: the costs of every segment of the model that it had memory to count, or of
    its variants up to the first that does not fit."""

    model: ModelSpec
    costs: tuple[SegmentCost, ...]


class Keep(Struct, frozen=True, kw_only=True, tag="keep"):
    """Agent to trainer: the update of this run's job was accepted, so what the client keeps of it
    counts. The same may be said again."""

    run: str
    round: Index
    job: JobId


class Train(Struct, frozen=True, kw_only=True, tag="train"):
    """Agent to trainer: train this job of that run. cache_bytes: of features of a frozen prefix,
    the most that may stay in memory over the epochs. accepted: the last update that was, as the
    trainer may have been another one then."""

    job: Job
    run: str
    cache_bytes: Count
    accepted: Keep | None = None


class Cancel(Struct, frozen=True, kw_only=True, tag="cancel"):
    """Agent to trainer: drop the job in hand. The trainer answers with another Cancel, after which
    nothing about that job comes."""


class Resume(Struct, frozen=True, kw_only=True, tag="resume"):
    """Agent to trainer: the connection is back, so ask again for the parts that are missing, or
    announce the update again."""


class Progress(Struct, frozen=True, kw_only=True, tag="progress"):
    """Trainer to agent, a sign of life: batches and epochs done of the job of this round, 0: of
    none. Batches that run through its frozen stages count; each segment has its epochs."""

    round: Count = 0
    batches: Count = 0
    total: Count = 0  # batches that are trained
    epochs: Count = 0


ToTrainer: TypeAlias = TrainerOptions | Estimate | Train | Cancel | Resume | Keep
ToAgent: TypeAlias = LastWords | Inspected | Estimated | Progress | Update
PipeMessage: TypeAlias = ToTrainer | ToAgent | Fetch | Part | Fault
_DECODER: msgspec.msgpack.Decoder[PipeMessage] = msgspec.msgpack.Decoder(PipeMessage)
_ENCODER = msgspec.msgpack.Encoder()


class Pipe:
    """One end of the socket pair. `receive` raises EOFError when the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def fileno(self) -> int:
        return self._end.fileno()

    @staticmethod
    def blocks(message: PipeMessage, payload: bytes | memoryview = b"") -> list[bytes | memoryview]:
        """What goes over the socket for one message, in order."""
        control = _ENCODER.encode(message)
        head = _LENGTHS.pack(len(control), len(payload)) + control
        return [head, payload] if len(payload) else [head]

    def send(self, message: PipeMessage, payload: bytes | memoryview = b"") -> None:
        """Blocks until the other end has taken it. Raises OSError when it is gone."""
        for block in self.blocks(message, payload):
            self._end.sendall(block)

    def receive(self) -> tuple[PipeMessage, memoryview]:
        control_bytes, payload_bytes = _LENGTHS.unpack(self._read(_LENGTHS.size))
        message = _DECODER.decode(self._read(control_bytes))
        return message, self._read(payload_bytes)

    def close(self) -> None:
        self._end.close()

    def _read(self, size: int) -> memoryview:
        buffer = memoryview(bytearray(size))
        filled = 0
        while filled < size:
            got = self._end.recv_into(buffer[filled:])
            if got == 0:
                raise EOFError("the other process is gone")
            filled += got
        return buffer
