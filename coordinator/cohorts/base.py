"""Clients, what they are given and what they return: the seam between rounds and who trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from edge_sdk.protocol.fields import Struct
from edge_sdk.protocol.messages import (
    DeviceProfile,
    ModelSpec,
    Phase,
    Plan,
    Segment,
    TensorSpec,
    Update,
)
from edge_sdk.protocol.tensors import Tensors


@dataclass(frozen=True)
class Client:
    """A device known to the coordinator. exit: the deepest it can train, its group; stages: deeper
    ones that it could train alone over a frozen prefix. prefix_s, stage_s: predicted seconds of the
    prefix's job and of each of `stages`; 0 and () where unknown. variant: the place, from 1, of its
    model among those that the method offers; 0: none. num_weights: see messages.Ready."""

    id: str
    exit: int
    stages: tuple[int, ...] = ()
    prefix_s: float = 0.0
    stage_s: tuple[float, ...] = ()
    num_examples: int = 0
    profile: DeviceProfile | None = None
    variant: int = 0
    num_weights: int = 0


@dataclass(frozen=True)
class Offer:
    """What devices count with before they say what they can train. model: the whole one. plan: with
    all that any job may ask for, at its largest. variants: models to choose among, cheapest first,
    each trained as one segment up to its exit; (): `model`, cut at any exit."""

    model: ModelSpec
    plan: Plan
    variants: tuple[ModelSpec, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """One job: what to build, how to train, what travels down, and what must come back. Tensors
    that are no weights of the model are named by their role, see fields.Role; of "packed" ones at
    most as many values as `returns` says."""

    model: ModelSpec
    plan: Plan
    tensors: Tensors
    returns: tuple[TensorSpec, ...]


BLANK = Update(  # where no message travelled; what is known is filled in with replace()
    job="",
    digest="",
    round=0,
    num_examples=0,
    num_steps=0,
    exits=(),
    phases={},
    peak_memory_bytes=0,
    tensors=(),
)


class ArrivedUpdate(Struct, frozen=True, kw_only=True):
    """A whole update but for its tensors: the participant's own message, and how it came. That of
    an emulated client names no round (0), job ("") or digest (""), and was not uploaded (None).

    segments, model: of its job, the model None where an older program kept it; bytes_down,
    bytes_up: moved for the job and for the update."""

    update: Update
    segments: tuple[Segment, ...]
    model: ModelSpec | None = None
    upload_s: float | None = None
    bytes_down: int = 0
    bytes_up: int = 0


@dataclass(frozen=True)
class ClientUpdate:
    """What a participant returned, checked against its assignment. Whoever keeps a tensor over the
    round copies it: it may lie in a file that the next round writes over.

    staleness: rounds that have ended since that of its job; sent: what the job began from, where
    they are more than none. most_examples: that it may count with."""

    client: Client
    arrived: ArrivedUpdate
    tensors: Tensors
    staleness: int = 0
    sent: Tensors = field(default_factory=dict)
    most_examples: float = math.inf

    @property
    def message(self) -> Update:
        """The participant's own message."""
        return self.arrived.update

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.arrived.segments

    @property
    def model(self) -> ModelSpec | None:
        return self.arrived.model

    @property
    def num_examples(self) -> int:
        """What it counts with."""
        return int(min(self.message.num_examples, self.most_examples))

    def weight(self, weighting: str) -> float:
        """In a mean over clients, by their "examples" or "equal"."""
        return float(self.num_examples) if weighting == "examples" else 1.0

    @property
    def round(self) -> int:
        return self.message.round

    @property
    def bytes_down(self) -> int:
        return self.arrived.bytes_down

    @property
    def bytes_up(self) -> int:
        return self.arrived.bytes_up

    @property
    def phases(self) -> Mapping[str, Phase]:
        """The times that the participant told, and that of the upload."""
        upload_s = self.arrived.upload_s
        upload = {} if upload_s is None else {"upload": Phase(wall_s=upload_s)}
        return dict(self.message.phases) | upload


# Raises ShapeError for an update that may not count, by what its job began from.
Check: TypeAlias = Callable[[ClientUpdate, Mapping[str, Tensor]], None]


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
    """Clients behind one interface."""

    def clients(self) -> Sequence[Client]:
        """The clients that could be given a job now."""

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]:
        """Give these clients these jobs; yield results as they arrive, in any order."""

    def rest(self, tries: int) -> bool:
        """Wait before a round that lacks updates is tried again, after so many tries in vain. False
        if the next try would end like the last."""


@runtime_checkable
class KeepsState(Protocol):
    """A cohort that keeps for its clients what real devices keep themselves between rounds."""

    def accept(self, round: int, client_ids: Iterable[str]) -> None:
        """The round is committed with the updates of these clients: what they keep of it counts.
        May be said again. Raises StoreError."""


@runtime_checkable
class Fleet(Cohort, Protocol):
    """A cohort of real devices, which may be at work beyond the end of a round and over a restart
    of the coordinator: it knows of each, and is asked."""

    @property
    def needed(self) -> int:
        """Updates that the round needs."""

    @property
    def num_busy(self) -> int:
        """Clients with a job in hand."""

    def expect(self, clients: Iterable[Client], num_chosen: int, check: Check) -> None:
        """A round begins. These clients had been asked in it before a restart, the first num_chosen
        because they were chosen. Updates that `check` refuses do not count, and are told so."""
