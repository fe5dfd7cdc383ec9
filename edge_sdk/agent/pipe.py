"""Between the agent and its training process: framed messages over a socket pair, on one machine.

The agent passes Part, Fetch and Update through unchanged, so tensors never lie in the agent; the
messages here are the rest. Each message is two lengths, the msgpack of the message, a payload.
"""

from __future__ import annotations

import socket
import struct
from typing import TypeAlias

import msgspec

from edge_sdk.capacity.costs import SegmentCost
from edge_sdk.protocol.messages import (
    Count,
    Fault,
    Fetch,
    Index,
    Job,
    ModelSpec,
    Part,
    Plan,
    Struct,
    Update,
)

_LENGTHS = struct.Struct("<II")


class TrainerOptions(Struct, frozen=True, kw_only=True, tag="start"):
    """Agent, first of all: how to train, and on what. threads 0: torch's default. measure_compute:
    measure this machine's speed first. calibration: the file that keeps this device's memory
    calibration, saved_updates: the folder that keeps a finished update until it is accepted; "":
    neither is kept. imports: modules of the user's that register model families."""

    data: str
    threads: Count = 0
    device: str = "cpu"
    measure_compute: bool = True
    calibration: str = ""
    saved_updates: str = ""
    imports: tuple[str, ...] = ()


class Inspected(Struct, frozen=True, kw_only=True, tag="inspected"):
    """Trainer: my data and myself. gflops, layer_s 0: not measured; runtime: resident after
    the imports and a first step. finished: a job whose update was not accepted before a restart."""

    num_examples: Index
    input_shape: tuple[Index, ...]
    num_classes: Index
    num_labels: Index  # classes that occur
    runtime_bytes: Count
    gflops: float
    layer_s: float = 0.0
    finished: Job | None = None


class Estimate(Struct, frozen=True, kw_only=True, tag="estimate"):
    """Agent: what would training this model cost?"""

    model: ModelSpec
    plan: Plan


class Estimated(Struct, frozen=True, kw_only=True, tag="estimated"):
    """Trainer: this, for every segment of the model."""

    model: ModelSpec
    costs: tuple[SegmentCost, ...]


class Train(Struct, frozen=True, kw_only=True, tag="train"):
    """Agent: this job. cache_bytes: how much of frozen features may be kept over its epochs."""

    job: Job
    cache_bytes: Count


class Cancel(Struct, frozen=True, kw_only=True, tag="cancel"):
    """Agent: drop the job in hand. Trainer: it is; nothing of it comes after this."""


class Resume(Struct, frozen=True, kw_only=True, tag="resume"):
    """Agent: the link is back; ask again for what lacks, or announce the update again."""


class Progress(Struct, frozen=True, kw_only=True, tag="progress"):
    """Trainer: I am alive; of this round (0: no job) I have done so many batches."""

    round: Count = 0
    batches: Count = 0


PipeMessage: TypeAlias = (
    TrainerOptions
    | Inspected
    | Estimate
    | Estimated
    | Train
    | Cancel
    | Resume
    | Progress
    | Fetch
    | Part
    | Update
    | Fault
)
_DECODER: msgspec.msgpack.Decoder[PipeMessage] = msgspec.msgpack.Decoder(PipeMessage)
_ENCODER = msgspec.msgpack.Encoder()


class Pipe:
    """One end. receive raises EOFError when the other end is gone."""

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
