"""Clients that train one after another in this process."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch

from coordinator.cohorts.base import Absence, Assignment, Client, ClientUpdate
from edge_sdk.data.loading import Examples
from edge_sdk.errors import EdgeError
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.protocol.stream import layout
from edge_sdk.protocol.tensors import check_finite, check_specs, specs_of
from edge_sdk.training.trainer import train

MOST_TRIES = 3  # of a round without updates, where nothing changes by waiting


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
