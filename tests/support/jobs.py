"""Open jobs without a network: what is sent is written down, what devices say is put in by hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from coordinator.cohorts.base import Assignment, ClientUpdate
from coordinator.fleet.flow_control import Budget
from coordinator.fleet.jobs import Jobs
from coordinator.fleet.spool import Spool
from edge_sdk.protocol.messages import ExitResult, Job, Part, Phase, Plan, Segment, Update
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import Sender, Tensors, specs_of
from tests.support.devices import floats
from tests.support.examples import client, cnn

PLAN = Plan(segments=(Segment(first=2, last=2),))
PARTS = 3


class Mailbox:
    """In the place of Sessions: whatever is sent goes to `send`."""

    def __init__(self, send: Callable[[str, Any, Any], bool]) -> None:
        self._send = send

    def send(self, name: str, message: Any, payload: Any = None) -> bool:
        return self._send(name, message, payload)

    def set_ready(self, name: str, ready: Any) -> None:
        """Nobody here keeps what a device can train."""


class JobsBed:
    """Jobs, and what they said. trained: what every device returns, PARTS parts."""

    def __init__(self, folder: Any, **options: Any) -> None:
        self.said: list[tuple[str, Any]] = []
        self.unreachable: set[str] = set()
        budget = options.pop("budget", None) or Budget()
        self.jobs = Jobs("a run", Spool(folder), budget, Mailbox(self._send), **options)
        self.trained = {"stages.1.0.weight": floats(PARTS * PART_BYTES // 4 - 2, start=1.0)}

    def _send(self, name: str, message: Any, payload: Any) -> bool:
        if name in self.unreachable:
            return False
        self.said.append((name, message))
        return True

    def assignment(self, plan: Plan = PLAN) -> Assignment:
        down = {"stages.0.0.weight": floats(4)}
        down |= {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        return Assignment(cnn(2), plan, down, specs_of(self.trained))

    def give(self, name: str = "a", round: int = 1, plan: Plan = PLAN) -> None:
        known = dataclasses.replace(client(name, 3), num_examples=10)
        self.jobs.give(known, self.assignment(plan), round, 0.0)

    def to(self, name: str, kind: type) -> list[Any]:
        return [m for who, m in self.said if who == name and isinstance(m, kind)]

    def job(self, name: str = "a") -> Job:
        return self.to(name, Job)[-1]

    def update(self, job: Job, tensors: Tensors | None = None) -> Update:
        tensors = self.trained if tensors is None else tensors
        return Update(
            job=job.id,
            digest=Sender(tensors).digest(),
            round=job.round,
            num_examples=10,
            num_steps=1,
            exits=(ExitResult(exit=2, loss=0.5, metric=0.5),),
            phases={"train": Phase(wall_s=1.0)},
            peak_memory_bytes=0,
            tensors=specs_of(tensors),
        )

    def parts(self, indices: Any, name: str = "a", tensors: Tensors | None = None) -> None:
        sender = Sender(self.trained if tensors is None else tensors)
        round = self.jobs.open[name].round
        for index in indices:
            self.jobs.on_message(name, Part(round=round, index=index), sender.part(index))

    def announce(self, name: str = "a", tensors: Tensors | None = None) -> None:
        self.jobs.on_message(name, self.update(self.job(name), tensors), None)

    def finish(self, name: str = "a") -> None:
        self.announce(name)
        self.parts(range(PARTS), name)


def assert_is_the_update(bed: JobsBed, result: Any, staleness_round: int = 1) -> None:
    assert isinstance(result, ClientUpdate)
    assert result.round == staleness_round
    for name, tensor in bed.trained.items():
        assert torch.equal(result.tensors[name], tensor)
