"""Clients, what they are given and what they return; the seam that real and emulated rounds share.

InProcessCohort trains the same jobs in this process, one after another, for experiments.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from edge_sdk.protocol.messages import (
    DeviceProfile,
    ExitResult,
    ModelSpec,
    Phase,
    Plan,
    Segment,
    TensorSpec,
)
from edge_sdk.protocol.tensors import Tensors


@dataclass(frozen=True)
class Client:
    """A device known to the coordinator. exit: the deepest it can train, its group; stages: deeper
    ones that it could train alone over a frozen prefix. prefix_s, stage_s: predicted seconds of the
    prefix's job and of each of `stages`; 0 and () where unknown."""

    id: str
    exit: int
    stages: tuple[int, ...] = ()
    prefix_s: float = 0.0
    stage_s: tuple[float, ...] = ()
    num_examples: int = 0
    profile: DeviceProfile | None = None


@dataclass(frozen=True)
class Assignment:
    """One job: what to build, how to train, what travels down, and what must come back."""

    model: ModelSpec
    plan: Plan
    tensors: Tensors
    returns: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class ClientUpdate:
    """What a participant returned, checked against its assignment. Whoever keeps a tensor over the
    round copies it: it may lie in a file that the next round writes over.

    round: of its job; staleness: rounds that have ended since. sent: what the job began from, for
    those. job, digest: by which the update is known. In this process: 0, 0, nothing, "" and ""."""

    client: Client
    tensors: Tensors
    segments: tuple[Segment, ...]
    num_examples: int
    num_steps: int
    exits: tuple[ExitResult, ...]
    phases: Mapping[str, Phase]
    peak_memory_bytes: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    retries: int = 0
    micro_batch: int = 0  # of the plan as it was trained
    recompute: bool = False
    round: int = 0
    staleness: int = 0
    sent: Tensors = field(default_factory=dict)
    job: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Absence:
    """A participant that returned nothing that counts, and why."""

    client: Client
    segments: tuple[Segment, ...]
    outcome: str  # "straggler" | "failed"
    code: str
    detail: str
    bytes_down: int = 0
    bytes_up: int = 0


class Cohort(Protocol):
    """Clients behind one interface; train yields results as they arrive, in any order."""

    def clients(self) -> Sequence[Client]:
        """Who could be given a job now."""

    def expect(self, clients: Iterable[Client], num_chosen: int) -> None:
        """A resumed round has these participants, whether they are there yet or not: the first
        num_chosen were chosen, the others asked for those who failed. No clients: nobody yet."""

    def rest(self, tries: int) -> bool:
        """Before a round that lacks updates is tried again, after so many tries in vain. False: the
        next would end like the last."""

    @property
    def num_busy(self) -> int:
        """Clients that still have the job of a round before."""

    @property
    def needed(self) -> int:
        """In asynchronous mode: updates that the round needs, of whatever age."""

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]: ...
