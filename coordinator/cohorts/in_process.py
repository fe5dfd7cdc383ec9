"""Clients that train one after another in this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from msgspec.structs import replace

from coordinator.cohorts.base import (
    BLANK,
    Absence,
    ArrivedUpdate,
    Assignment,
    Client,
    ClientUpdate,
)
from coordinator.cohorts.budget import Variant
from edge_sdk.data.loading import Examples
from edge_sdk.errors import EdgeError
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.protocol.messages import Update
from edge_sdk.protocol.stream import layout
from edge_sdk.protocol.tensor_lists import check_specs, is_frozen
from edge_sdk.protocol.tensors import Tensors, check_finite, specs_of
from edge_sdk.training.client_state import ClientState
from edge_sdk.training.trainer import TrainResult, train

RUN = "emulated"  # a run's folder has no other's states
Kept: TypeAlias = tuple[int, Tensors]  # the round of a client's state, 0: none, and its tensors
MOST_TRIES = 3  # of a round without updates, where nothing changes by waiting


class InProcessCohort:
    """Clients as shards in this process; a failing client is an Absence, as over the network.

    holders: who can hold any deeper stage over a frozen prefix; None: everybody. variants: of each
    client that takes part, among those that the method offers; None: it offers none. states: the
    folder in which each client has one for what it keeps between rounds (client_state.py); None: it
    is kept in memory."""

    def __init__(
        self,
        shards: Mapping[str, Examples],
        exits: Mapping[str, int],
        num_exits: int,
        device: str | torch.device = "cpu",
        holders: Collection[str] | None = None,
        variants: Mapping[str, Variant] | None = None,
        states: Path | None = None,
    ) -> None:
        self.shards = shards
        # A kill of this process harms no state; after a loss of power one is damaged, and said so.
        self.states = {
            name: ClientState(states and states / name, is_synced=False) for name in shards
        }
        self._device = device
        self._frozen: dict[str, set[str]] = {name: set() for name in shards}  # that were sent
        self._clients = []
        for name, shard in sorted(shards.items()):
            if variants is not None:
                if v := variants.get(name):
                    self._clients.append(
                        Client(
                            id=name,
                            exit=v.exit,
                            num_examples=len(shard),
                            variant=v.number,
                            num_weights=v.num_weights,
                        )
                    )
                continue
            can_hold = holders is None or name in holders
            deeper = tuple(range(exits[name] + 1, num_exits + 1)) if can_hold else ()
            self._clients.append(
                Client(id=name, exit=exits[name], stages=deeper, num_examples=len(shard))
            )

    def clients(self) -> Sequence[Client]:
        return self._clients

    def rest(self, tries: int) -> bool:
        return tries < MOST_TRIES

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]:
        """deadline_s is not applied: one process trains for all, its clock says nothing."""
        by_id = {client.id: client for client in self._clients}
        for client_id, job in work.items():
            kept = self.kept(client_id, job, round)
            shard = self.shards[client_id]
            trained = train_from(by_id[client_id], job, shard, self._device, kept)
            yield self.keep(round, job, *trained)

    def kept(self, client_id: str, job: Assignment, round: int) -> Kept:
        """What a client's job begins from, beside what it brings."""
        return self.states[client_id].load(RUN, round) if job.plan.keeps_state else (0, {})

    def newest(self, client_id: str) -> Tensors:
        """What the client keeps as of its last training, whether or not that is committed yet."""
        return self.states[client_id].newest(RUN)

    def keep(
        self, round: int, job: Assignment, result: ClientUpdate | Absence, state: Tensors
    ) -> ClientUpdate | Absence:
        """The result, once the state that goes with it lies with the client; an Absence where that
        cannot be. What is frozen counts as sent with a client's first job that had it, as real
        devices keep it."""
        try:
            if state:
                self.states[result.client.id].save(RUN, round, state)
        except EdgeError as error:
            return Absence(result.client, result.segments, "failed", error.code, str(error))
        if isinstance(result, ClientUpdate) and job.plan.frozen:
            bytes_down = self._bytes_down(result.client.id, job)
            arrived = replace(result.arrived, bytes_down=bytes_down)
            return dataclasses.replace(result, arrived=arrived)
        return result

    def _bytes_down(self, client_id: str, job: Assignment) -> int:
        """What travels of a job with frozen tensors, which its client keeps from then on."""
        frozen = {name for name in job.tensors if is_frozen(name, job.plan.frozen)}
        held = self._frozen[client_id] & frozen
        self._frozen[client_id] |= frozen
        sent = {name: tensor for name, tensor in job.tensors.items() if name not in held}
        return layout(specs_of(sent)).total_bytes

    def accept(self, round: int, client_ids: Iterable[str]) -> None:
        for client_id in client_ids:
            if client_id in self.states:
                self.states[client_id].accept(RUN, round)


def train_here(
    client: Client, job: Assignment, shard: Examples, device: str | torch.device
) -> ClientUpdate | Absence:
    """Train one job in this process, of a client that has kept nothing."""
    return train_from(client, job, shard, device, (0, {}))[0]


def train_from(
    client: Client, job: Assignment, shard: Examples, device: str | torch.device, kept: Kept
) -> tuple[ClientUpdate | Absence, Tensors]:
    """Train one job in this process from what its client has kept; the result, checked as one from
    the network, and what the client keeps if it counts."""
    state_round, state = kept
    try:
        with memory_errors(f"training for {client.id}"):
            result = train(
                job.model,
                job.plan,
                job.tensors,
                shard,
                state=state,
                state_round=state_round,
                device=device,
            )
        check_specs(specs_of(result.tensors), job.returns, f"update from {client.id}")
        check_finite(result.tensors, f"update from {client.id}")
    except EdgeError as error:
        return Absence(client, job.plan.segments, "failed", error.code, str(error)), {}
    arrived = ArrivedUpdate(
        update=as_update(result, job),
        segments=job.plan.segments,
        model=job.model,
        bytes_down=layout(specs_of(job.tensors))[1],
        bytes_up=layout(specs_of(result.tensors))[1],
    )
    return ClientUpdate(client, arrived, result.tensors), result.state


def as_update(result: TrainResult, job: Assignment) -> Update:
    """The message that a device would send: what a result tells has the same name in both."""
    names = (field.name for field in dataclasses.fields(result) if field.name != "state")
    told = {name: getattr(result, name) for name in names}
    told |= {"micro_batch": job.plan.micro_batch, "recompute": job.plan.recompute}
    return replace(BLANK, **told | {"tensors": specs_of(result.tensors)})
