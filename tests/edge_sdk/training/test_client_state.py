"""What a client keeps between rounds: what counts, after what was lost, killed, repeated."""

from __future__ import annotations

import os
import re
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.agent.pipe import Cancel, Keep, Pipe, PipeMessage, Train
from edge_sdk.errors import CapacityError, StoreError
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import Fault, Job, Part, Plan, Segment, Update
from edge_sdk.protocol.plan_tensors import job_specs
from edge_sdk.protocol.tensors import Sender, specs_of
from edge_sdk.training.calibration import MemoryCalibration
from edge_sdk.training.client_state import ClientState
from edge_sdk.training.kept_tensors import KeptTensors
from edge_sdk.training.saved_update import STATE, SavedUpdate
from edge_sdk.training.worker import TrainerLoop
from tests.support.examples import cnn, examples

A, B = "a" * 32, "b" * 32  # jobs


def values(number: float) -> dict[str, torch.Tensor]:
    return {"correction/w": torch.full((3,), number), "correction/n": torch.tensor([7])}


def kept(state: ClientState, before_round: int, run: str = "run") -> tuple[int, float | None]:
    round, tensors = state.load(run, before_round)
    return round, tensors["correction/w"][0].item() if tensors else None


@pytest.fixture(params=["memory", "disk"])
def state(request, tmp_path) -> ClientState:
    return ClientState(tmp_path / "state" if request.param == "disk" else None)


def test_only_what_was_accepted_is_used(state):
    state.save("run", 1, values(1), A)
    assert kept(state, 2) == (0, None)  # the update was lost
    state.accept("run", 1, B)  # another job's
    state.accept("run", 2, A)
    assert kept(state, 2) == (0, None)
    state.accept("run", 1, A)
    state.accept("run", 1, A)  # said again, to a trainer that was restarted
    assert kept(state, 2) == (1, 1.0)
    tensors = state.load("run", 2)[1]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in values(1).items())


def test_the_newest_is_told_before_it_is_accepted(state):
    assert state.newest("run") == {}
    for round in (1, 2):
        state.save("run", round, values(round), A)
        assert state.newest("run")["correction/w"][0] == round
        assert kept(state, 9)[0] == round - 1, "a job does not begin from it"
        state.accept("run", round, A)
    assert state.newest("other") == {}


def test_a_job_given_again_begins_from_the_same(state):
    for round in (1, 2):
        state.save("run", round, values(round), A)
        state.accept("run", round, A)
    assert kept(state, 2) == (1, 1.0)  # round 2 anew, by a coordinator that lost it
    assert kept(state, 3) == (2, 2.0)
    state.save("run", 2, values(2.5), B)
    assert kept(state, 3) == (2, 2.0)
    state.accept("run", 2, B)
    assert kept(state, 3) == (2, 2.5)
    assert kept(state, 2) == (1, 1.0)


def test_a_coordinator_that_goes_back_leaves_no_future_behind(state):
    for round in (1, 3, 5):
        state.save("run", round, values(round), A)
        state.accept("run", round, A)
    assert kept(state, 9) == (5, 5.0)
    assert kept(state, 3) == (0, None)  # more than KEPT back: it begins without, and says so
    state.save("run", 4, values(4), B)
    state.accept("run", 4, B)
    assert kept(state, 9) == (4, 4.0)


def test_a_state_that_waits_is_replaced_by_the_next(state):
    state.save("run", 1, values(1), A)
    state.save("run", 2, values(2), B)
    state.accept("run", 1, A)  # too late: its job was dropped
    assert kept(state, 9) == (0, None)
    state.accept("run", 2, B)
    assert kept(state, 9) == (2, 2.0)


def test_another_run_begins_without_and_removes_the_first(state):
    state.save("run", 1, values(1), A)
    state.accept("run", 1, A)
    assert kept(state, 9, "other") == (0, None)
    assert kept(state, 9) == (1, 1.0)  # as long as nothing of the other is kept
    state.save("other", 1, values(5), B)
    assert kept(state, 9) == (0, None)
    state.accept("run", 1, A)
    assert kept(state, 9, "other") == (0, None)
    state.accept("other", 1, B)
    assert kept(state, 9, "other") == (1, 5.0)


def test_never_more_than_three_states_lie_on_the_disk(tmp_path):
    state, most = ClientState(tmp_path / "state"), 0
    for round in range(1, 9):
        state.save("run", round, values(round), A)
        most = max(most, len(list((tmp_path / "state").iterdir())))
        state.accept("run", round, A)
    assert most == 3
    assert len(list((tmp_path / "state").iterdir())) == 2


def test_more_than_may_be_kept_is_refused(tmp_path):
    state = ClientState(tmp_path, most_bytes=19)  # 3 floats and an int64 take 20
    with pytest.raises(CapacityError, match="keeps of round 4 takes 0.0 MiB, at most"):
        state.save("run", 4, values(1))
    assert not list(tmp_path.iterdir())


def test_another_process_finds_it(tmp_path):
    first = ClientState(tmp_path)
    first.save("run", 1, values(1), A)
    ClientState(tmp_path).accept("run", 1, A)
    assert kept(ClientState(tmp_path), 2) == (1, 1.0)


def damaged(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        damaged,
        lambda path: path.write_bytes(path.read_bytes()[:-3]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"[" * 5000),
        lambda path: path.write_bytes(b"\x00" * 100),
        lambda path: path.with_name(path.name.replace("-2.", "-4.")).write_bytes(path.read_bytes()),
    ],
    ids=["a bit", "cut", "empty", "no head", "zeros", "another round's"],
)
def test_damage_is_told_in_one_line_and_nothing_is_begun_from(tmp_path, caplog, harm):
    state = ClientState(tmp_path)
    state.save("run", 2, values(2), A)
    state.accept("run", 2, A)
    (path,) = tmp_path.iterdir()
    harm(path)
    assert kept(state, 5) == (0, None)
    (line,) = caplog.messages
    assert "cannot be used in round 5, which begins without" in line
    state.save("run", 5, values(5), B)  # and it goes on
    state.accept("run", 5, B)
    assert kept(state, 6) == (5, 5.0)


def test_strange_names_in_the_folder_are_nobodys(tmp_path):
    (tmp_path / "notes.state").write_text("x")
    (tmp_path / "0123-1.state").write_text("x")
    state = ClientState(tmp_path)
    state.save("run", 1, values(1), A)
    state.accept("run", 1, A)
    assert kept(state, 2) == (1, 1.0)
    assert len(list(tmp_path.iterdir())) == 3


class Killed(BaseException):
    pass


def killed_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process is killed at its step-th call of what changes a folder."""
    count = 0

    def dying(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **others: Any) -> Any:
            nonlocal count
            count += 1
            if count == step:
                raise Killed
            return real(*args, **others)

        return call

    for name in ("replace", "fsync", "unlink"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("step", range(1, 9))
def test_killed_at_every_step_it_is_the_old_state_or_the_new(tmp_path, step):
    state = ClientState(tmp_path)
    for round in (1, 2):
        state.save("run", round, values(round), A)
        state.accept("run", round, A)
    with pytest.MonkeyPatch.context() as patch:
        killed_at(step, patch)
        is_saved = is_accepted = False
        with suppress(Killed):
            state.save("run", 3, values(3), B)
            is_saved = True
            state.accept("run", 3, B)
            is_accepted = True
    after = ClientState(tmp_path)
    found = kept(after, 4)
    assert found in ([(3, 3.0)] if is_accepted else [(2, 2.0), (3, 3.0)])
    if not is_saved:
        assert found == (2, 2.0)
    assert kept(after, 3) == (2, 2.0)
    if is_saved:  # the coordinator says it again
        after.accept("run", 3, B)
        assert kept(after, 4) == (3, 3.0)


def test_a_full_disk_fails_the_job(tmp_path, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    said = f"{tmp_path}: what this client keeps of round 1 cannot be written: No space left"
    with pytest.raises(StoreError, match=re.escape(said)):
        ClientState(tmp_path).save("run", 1, values(1), A)
    assert not list(tmp_path.iterdir())


SPEC = cnn(exit=1)
PLAN = Plan(
    segments=(Segment(first=1, last=1),),
    batch_size=8,
    optimizer="sgd",
    lr=0.1,
    correction=True,
)


class Agent:
    """The agent's end of a pipe to one trainer after the other, each in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def train(
        self,
        train: Train,
        parts: list[tuple[Part, memoryview | bytes]],
        *,
        before: Sequence[PipeMessage] = (),
        after: Sequence[PipeMessage] = (),
    ) -> Update:
        """Have a fresh trainer train; say something before it and after, then be gone."""
        ours, theirs = socket.socketpair()
        pipe = Pipe(ours)
        loop = TrainerLoop(
            Pipe(theirs),
            examples(),
            "cpu",
            MemoryCalibration(made_with=""),
            SavedUpdate(self.folder),
            ClientState(self.folder / STATE),
            KeptTensors(self.folder),
        )

        def serve() -> None:
            with pytest.raises(EOFError):
                loop.serve(0.0, 0.0)

        thread = threading.Thread(target=serve)
        thread.start()
        for message in (*before, train):
            pipe.send(message)
        for part in parts:
            pipe.send(*part)
        while not isinstance(answer := pipe.receive()[0], Update):
            assert not isinstance(answer, Fault), answer
        for message in after:
            pipe.send(message)
        ours.shutdown(socket.SHUT_WR)
        thread.join()
        theirs.close()
        ours.close()
        return answer


def job(round: int, id: str) -> tuple[Job, list[tuple[Part, memoryview | bytes]]]:
    weights = initial_tensors(SPEC, 0)
    names = [s.name for s in job_specs(PLAN, specs_of(weights), buffers=BUFFERS)]
    tensors = {n: weights.get(n, torch.zeros_like(weights[n.split("/")[-1]])) for n in names}
    sender = Sender(tensors)
    given = Job(
        id=id,
        round=round,
        model=SPEC,
        plan=replace(PLAN, seed=round),
        tensors=sender.specs,
        deadline_s=0,
    )
    parts = [(Part(round=round, index=i), sender.part(i)) for i in range(sender.num_parts)]
    return given, parts


BUFFERS = [name for name in initial_tensors(SPEC, 0) if "running" in name]


def test_a_trainer_that_is_restarted_loses_nothing(tmp_path):
    """The update of round 1 is trained by one trainer, accepted while there is none, and said again
    to the next with its job."""
    agent, (first, parts) = Agent(tmp_path / "pi"), job(1, A)
    assert agent.train(Train(job=first, run="run", cache_bytes=0), parts).state_round == 0
    accepted = Keep(run="run", round=1, job=A)
    second, parts = job(2, B)
    train = Train(job=second, run="run", cache_bytes=0, accepted=accepted)
    assert agent.train(train, parts).state_round == 1


def test_an_update_that_was_dropped_leaves_no_state(tmp_path):
    agent, (first, parts) = Agent(tmp_path / "pi"), job(1, A)
    lost = agent.train(Train(job=first, run="run", cache_bytes=0), parts, after=[Cancel()])
    again = agent.train(Train(job=first, run="run", cache_bytes=0), parts)
    assert (again.state_round, again.digest) == (0, lost.digest)
    second, parts = job(2, B)
    assert agent.train(Train(job=second, run="run", cache_bytes=0), parts).state_round == 0


def test_accepted_and_given_again_is_the_same_update(tmp_path):
    agent, (first, parts) = Agent(tmp_path / "pi"), job(1, A)
    accepted = [Keep(run="run", round=1, job=A), Cancel()]
    agent.train(Train(job=first, run="run", cache_bytes=0), parts, after=accepted)
    second, parts = job(2, B)
    train = Train(job=second, run="run", cache_bytes=0)
    here = agent.train(train, parts, after=[Keep(run="run", round=2, job=B), Cancel()])
    again = agent.train(train, parts)  # for a coordinator that lost round 2
    assert (here.state_round, again.state_round, again.digest) == (1, 1, here.digest)


def test_another_run_begins_without(tmp_path):
    agent, (first, parts) = Agent(tmp_path / "pi"), job(1, A)
    agent.train(Train(job=first, run="run", cache_bytes=0), parts)
    accepted = Keep(run="run", round=1, job=A)
    second, parts = job(2, B)
    train = Train(job=second, run="other", cache_bytes=0, accepted=accepted)
    assert agent.train(train, parts).state_round == 0
