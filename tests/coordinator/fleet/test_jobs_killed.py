"""Open jobs and their spool against devices that do anything, killed at any write to the disk.

Whatever happens: an update that a device was told is accepted counts in exactly one committed
round, with what its job began from; and nothing stays on the disk that nobody needs.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.cohorts.base import Absence, Assignment, Client, ClientUpdate
from coordinator.fleet import spool as spool_module
from coordinator.fleet.flow_control import Budget
from coordinator.fleet.jobs import RESEND_S, Jobs
from coordinator.fleet.spool import Spool
from edge_sdk.protocol.messages import (
    Accepted,
    ExitResult,
    Fault,
    Job,
    Part,
    Plan,
    Ready,
    Segment,
    Update,
)
from edge_sdk.protocol.tensors import Sender, specs_of
from tests.support.examples import cnn
from tests.support.jobs import Mailbox

MODES = ("late", "async", "drop")
ROUNDS, OLDEST, DEVICES = 25, 3, 6
SIZES = (10, 7)  # floats of stages 1 and 2


class Killed(BaseException):
    pass


class Fuse:
    """Kills at the write after `left` more; None: at none."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        for owner, name in (
            (os, "replace"),
            (os, "link"),
            (os, "pwrite"),
            (os, "ftruncate"),
            (Path, "unlink"),
        ):
            monkeypatch.setattr(owner, name, self._burning(getattr(owner, name)))
        monkeypatch.setattr(spool_module, "write_whole", self._leaving(spool_module.write_whole))

    def burn(self) -> None:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.left = None
                raise Killed

    def _burning(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def burn(*args: Any, **options: Any) -> Any:
            self.burn()
            return real(*args, **options)

        return burn

    def _leaving(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """Half a draft, or a whole one that has not taken its place yet."""

        def leave(path: Path, content: bytes, **options: Any) -> None:
            for size in (len(content) // 2, len(content)):
                try:
                    self.burn()
                except Killed:
                    path.with_name(f".{path.name}.0.new").write_bytes(content[:size])
                    raise
            real(path, content, **options)

        return leave


class Device:
    """What it knows; its program and its link come and go."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.exit = 2
        self.is_linked = False
        self.job: Job | None = None
        self.update: dict[str, torch.Tensor] | None = None
        self.accepted: list[str] = []

    def hear(self, message: object) -> bool:
        if not self.is_linked:
            return False
        if isinstance(message, Job) and (self.job is None or self.job.id != message.id):
            self.job, self.update = message, None
        elif self.job and isinstance(message, Accepted) and message.round == self.job.round:
            self.accepted.append(self.job.id)
            self.job = self.update = None
        elif self.job and isinstance(message, Fault) and message.round == self.job.round:
            self.job = self.update = None
        return True


class Run:
    """Rounds as the cohort and the store do them. Whatever is not in the spool's folder or here as
    final is gone with a kill."""

    def __init__(self, folder: Path, fuse: Fuse, mode: str, seed: int) -> None:
        self.folder, self.fuse, self.mode = folder, fuse, mode
        self.dice = random.Random(f"{mode} {seed}")
        self.devices = {name: Device(name) for name in "abcdef"[:DEVICES]}
        self.next = 1
        self.participants_of: dict[str, Client] = {}  # of the next round
        self.counted: Counter[str] = Counter()  # jobs of committed rounds
        self.kills = 0
        self.boot()

    def boot(self) -> None:
        for device in self.devices.values():
            device.is_linked = False
        self.jobs = Jobs(
            "run",
            Spool(self.folder),
            Budget(),
            Mailbox(lambda name, message, _: self.devices[name].hear(message)),
            takes_late=self.mode != "drop",
            was_counted=lambda job: self.counted[job] > 0,
        )
        self.jobs.resume(self.next)
        self.model: dict[str, torch.Tensor] = {}

    def until(self, last: int) -> None:
        while self.next <= last:
            try:
                self.round()
            except Killed:
                self.come_back()

    def come_back(self) -> None:
        self.kills += 1
        try:
            self.fuse.left = self.dice.randrange(120)
            self.boot()
        except Killed:
            self.come_back()

    # -- a round ---------------------------------------------------------------------------------

    def round(self) -> None:
        chosen = list(self.participants_of.values()) or self.choose()
        self.jobs.expire(self.next - (0 if self.mode == "drop" else OLDEST))
        self.jobs.clear_spool(self.next)
        self.model = {
            f"stages.{stage}.0.weight": torch.full((size,), float(self.next))
            for stage, size in enumerate(SIZES)
        }
        results: list[ClientUpdate | Absence] = []
        while not (counted := self.own(results)):
            self.participants_of |= {client.id: client for client in chosen}
            here = self.jobs.returned(self.next)
            for client in chosen:
                if client.id not in here:
                    self.jobs.give(client, self.assignment(client.exit), self.next, 0.0)
            self.gather(results)
            chosen = [] if self.own(results) else self.choose()
        assert counted
        self.fuse.burn()  # the checkpoint
        self.counted.update(r.message.job for r in results if isinstance(r, ClientUpdate))
        self.next, self.participants_of = self.next + 1, {}
        self.fuse.burn()

    def gather(self, results: list[ClientUpdate | Absence]) -> None:
        for step in range(10_000):
            self.take(results)
            if not self.jobs.awaited or (self.mode == "async" and self.own(results)):
                self.jobs.leave_open()
                return
            if step > 30 and not self.jobs.finished and self.dice.random() < 0.2:
                self.jobs.close()
            else:
                self.happen()
        raise AssertionError("the round never ends")

    def take(self, results: list[ClientUpdate | Absence]) -> None:
        while self.jobs.finished:
            result = self.jobs.finished.pop(0)
            if isinstance(result, ClientUpdate):
                begin = float(result.round)
                assert all(bool((t == begin).all()) for t in result.sent.values()), "another base"
                assert all(bool((t == begin + 0.5).all()) for t in result.tensors.values())
                jobs = [r.message.job for r in results if isinstance(r, ClientUpdate)]
                assert [*jobs, *self.counted.elements()].count(result.message.job) == 0, (
                    "counted twice"
                )
                assert self.next - result.round <= OLDEST + 1
            results.append(result)

    def own(self, results: list[ClientUpdate | Absence]) -> set[str]:
        """Who has returned what the round waits for."""
        updates = [r for r in results if isinstance(r, ClientUpdate)]
        return {u.client.id for u in updates if self.mode == "async" or u.round == self.next}

    def choose(self) -> list[Client]:
        while True:
            self.happen()
            idle = [
                Client(id=name, exit=device.exit, num_examples=10)
                for name, device in self.devices.items()
                if device.is_linked and device.job is None and name not in self.jobs.open
            ]
            if idle and self.dice.random() < 0.3:
                return idle[: self.dice.randrange(1, 5)]

    def assignment(self, exit: int) -> Assignment:
        tensors = dict(list(self.model.items())[:exit])
        plan = Plan(segments=(Segment(first=1, last=exit),))
        return Assignment(cnn(2), plan, tensors, specs_of(tensors))

    # -- what happens ----------------------------------------------------------------------------

    def happen(self) -> None:
        device, chance = self.dice.choice(list(self.devices.values())), self.dice.random()
        name, job, jobs = device.name, device.job, self.jobs
        if not device.is_linked:
            if chance < 0.5:
                device.is_linked = True
                jobs.on_return(name, job.round if job else 0, job.id if job else None)
            elif chance < 0.6:
                jobs.on_gone(name, "gone", "said nothing")
        elif chance < 0.08:
            device.is_linked = False
        elif chance < 0.12:  # another program, which may have kept what was finished
            device.is_linked, device.exit = False, self.dice.choice((1, 2))
            if device.update is None or self.dice.random() < 0.5:
                device.job = device.update = None
        elif chance < 0.17:
            jobs.on_heartbeat(name, job.round if job else 0)
            if (open_job := jobs.open.get(name)) and open_job.mismatched_since:
                open_job.mismatched_since -= 2 * RESEND_S
        elif job and device.update is None and chance < 0.2:
            device.job = None
            jobs.on_message(name, Fault(code="trainer", detail="", round=job.round), None)
        elif job and device.update is None and chance < 0.6:
            device.update = {
                spec.name: torch.full(spec.shape, job.round + 0.5) for spec in job.tensors
            }
        elif job and device.update:
            self.upload(device, job, device.update)
        if device.is_linked and device.job is None:
            jobs.on_ready(name, Ready(exit=device.exit))

    def upload(self, device: Device, job: Job, trained: dict[str, torch.Tensor]) -> None:
        sender = Sender(trained)
        update = Update(
            job=job.id,
            digest=sender.digest(),
            round=job.round,
            num_examples=1,
            num_steps=1,
            exits=tuple(ExitResult(exit=e, loss=0.5, metric=0.5) for e in (1, 2)[: len(trained)]),
            phases={},
            peak_memory_bytes=0,
            tensors=sender.specs,
        )
        self.jobs.on_message(device.name, update, None)
        if device.job is job and self.dice.random() < 0.8:
            part = Part(round=job.round, index=0)
            self.jobs.on_message(device.name, part, sender.part(0))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mode", MODES)
def test_what_was_accepted_counts_once(tmp_path, monkeypatch, mode, seed):
    fuse = Fuse(monkeypatch)
    run = Run(tmp_path, fuse, mode, seed)
    fuse.left = run.dice.randrange(5, 150)
    run.until(ROUNDS)
    assert run.kills > 0
    fuse.left = None
    run.until(ROUNDS + OLDEST)  # undisturbed
    accepted = [job for device in run.devices.values() for job in device.accepted]
    pending = {u.message.job for u in run.jobs.finished if isinstance(u, ClientUpdate)}
    assert len(accepted) == len(set(accepted)) > ROUNDS
    assert [job for job in accepted if run.counted[job] != (job not in pending)] == []
    run.jobs.clear_spool(run.next)
    needed = {f"{open_job.round:010d}-{name}" for name, open_job in run.jobs.open.items()}
    needed |= {f"{u.round:010d}-{u.client.id}" for u in run.jobs.finished if u.client.id}
    left = {path.stem for path in tmp_path.iterdir() if not path.name.startswith("free-")}
    assert left <= needed
