"""Clients, what they are given and what they return; the seam that real and emulated rounds share.

InProcessCohort trains the same jobs in this process, one after another, for experiments.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from edge_sdk.data import Examples
from edge_sdk.errors import EdgeError
from edge_sdk.protocol.stream import layout
from edge_sdk.resident import memory_errors
from edge_sdk.tensors import Tensors, check_finite, check_specs, specs_of
from edge_sdk.trainer import train
from edge_sdk.wire import DeviceProfile, ExitResult, ModelSpec, Phase, Plan, Segment, TensorSpec

MOST_TRIES = 3  # of a round without updates, where nothing changes by waiting


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


class InProcessCohort:
    """Clients as shards in this process; a failing client is an Absence, as over the network.

    holders: who can hold any deeper stage over a frozen prefix; None: everybody."""

    def __init__(
        self,
        shards: Mapping[str, Examples],
        exits: Mapping[str, int],
        num_exits: int,
        device: str | torch.device = "cpu",
        holders: Collection[str] | None = None,
    ) -> None:
        self.shards = shards
        self._device = device
        self._clients = []
        for name, shard in sorted(shards.items()):
            can_hold = holders is None or name in holders
            deeper = tuple(range(exits[name] + 1, num_exits + 1)) if can_hold else ()
            self._clients.append(
                Client(
                    id=name,
                    exit=exits[name],
                    stages=deeper,
                    num_examples=len(shard),
                )
            )

    num_busy = 0
    needed = 1

    def clients(self) -> Sequence[Client]:
        return self._clients

    def expect(self, clients: Iterable[Client], num_chosen: int) -> None:
        """They are all here."""

    def rest(self, tries: int) -> bool:
        return tries < MOST_TRIES

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]:
        """deadline_s is not applied: one process trains for all, its clock says nothing."""
        by_id = {client.id: client for client in self._clients}
        for client_id, job in work.items():
            yield train_here(by_id[client_id], job, self.shards[client_id], self._device)


def train_here(
    client: Client, job: Assignment, shard: Examples, device: str | torch.device
) -> ClientUpdate | Absence:
    """One job in this process, its result checked as one from the network."""
    try:
        with memory_errors(f"training for {client.id}"):
            result = train(job.model, job.plan, job.tensors, shard, device=device)
        check_specs(specs_of(result.tensors), job.returns, f"update from {client.id}")
        check_finite(result.tensors, f"update from {client.id}")
    except EdgeError as error:
        return Absence(client, job.plan.segments, "failed", error.code, str(error))
    return ClientUpdate(
        client=client,
        tensors=result.tensors,
        segments=job.plan.segments,
        num_examples=result.num_examples,
        num_steps=result.num_steps,
        exits=result.exits,
        phases=result.phases,
        peak_memory_bytes=result.peak_memory_bytes,
        bytes_down=layout(specs_of(job.tensors))[1],
        bytes_up=layout(job.returns)[1],
        micro_batch=job.plan.micro_batch,
        recompute=job.plan.recompute,
    )
