"""What an agent does when counting, starting or answering goes wrong: its handlers, with a link and
a trainer that only take notes."""

from __future__ import annotations

import os
import subprocess
from typing import Any

import pytest
from msgspec.structs import replace

from edge_sdk.agent import agent as agent_module
from edge_sdk.agent import trainer_process
from edge_sdk.agent.agent import Agent
from edge_sdk.agent.options import AgentOptions
from edge_sdk.agent.pipe import (
    Cancel,
    Estimate,
    Estimated,
    Inspected,
    Resume,
    Train,
    TrainerOptions,
)
from edge_sdk.agent.trainer_process import Ending, TrainerProcess
from edge_sdk.capacity.chooser import Chooser
from edge_sdk.data.loading import save_shard
from edge_sdk.errors import TrainerError
from edge_sdk.protocol.messages import Fault, Job, Phase, Ready, Update
from edge_sdk.training import worker
from edge_sdk.training.calibration import MemoryCalibration
from tests.support.agent import MODEL, WHOLE
from tests.support.costs import COSTS, choose, segments, welcome
from tests.support.devices import PROFILE
from tests.support.examples import examples

MIB = 1024**2
JOB = Job(id="4" * 32, round=4, model=MODEL, plan=WHOLE, tensors=(), deadline_s=0.0)


class Notes:
    """In the place of a link and of a trainer."""

    endpoint = "tcp://there:5555"

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any, payload: bytes = b"") -> bool:
        self.sent.append(message)
        return True

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.sent if isinstance(message, kind)]

    def own_bytes(self) -> int:
        return 0

    def end_if_stuck(self, silent_s: float) -> bool:
        return False

    def wait_for_end(self) -> Ending:
        return Ending("was killed by signal 9, most likely for memory", is_for_memory=True)


class Started:
    """An agent that is welcome; its trainer has read the data and is counting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, finished: Job | None = None) -> None:
        self.link, self.trainer, self.memory = Notes(), Notes(), 400
        monkeypatch.setattr(trainer_process, "TrainerProcess", lambda *_: self.trainer)
        self.agent = Agent(
            self.link,  # type: ignore[arg-type]
            AgentOptions(
                client_id="device",
                trainer=TrainerOptions(data="d"),
                measure=lambda own_bytes: self.profile(),
            ),
        )
        read = Inspected(
            num_examples=24,
            input_shape=(1, 8, 8),
            num_classes=3,
            num_labels=3,
            runtime_bytes=0,
            gflops=1.0,
            layer_s=0.0,
            finished=finished,
        )
        self.trainer_says(read)
        self.agent._on_welcome(welcome())

    def profile(self) -> Any:
        return replace(PROFILE, memory_available_bytes=self.memory * MIB)

    def trainer_says(self, message: Any) -> None:
        self.agent._on_trainer_message(message, memoryview(b""))

    @property
    def ready(self) -> tuple[int, str]:
        said = self.link.of(Ready)[-1]
        return said.exit, said.reason


@pytest.fixture
def started(monkeypatch):
    return Started(monkeypatch)


# -- costs that could not be counted -----------------------------------------------------------


def test_costs_are_counted_again_when_memory_has_grown(started):
    assert len(started.trainer.of(Estimate)) == 1
    started.trainer_says(Fault(code="capacity", detail="counting was killed"))
    assert started.ready == (0, "counting was killed")
    started.agent._choosing.tell()
    started.memory = 500  # 1.25 times what there was is not more than that
    started.agent._choosing.tell()
    assert len(started.trainer.of(Estimate)) == 1
    started.memory = 501
    started.agent._choosing.tell()
    started.agent._choosing.tell()  # once: the trainer is at it
    assert len(started.trainer.of(Estimate)) == 2
    started.trainer_says(Estimated(model=MODEL, costs=COSTS))
    assert started.ready == (3, "exit 3 is the deepest of the model")
    started.memory = 4000
    started.agent._choosing.tell()
    assert len(started.trainer.of(Estimate)) == 2  # all are counted


def test_exits_that_were_not_counted_are_named():
    chooser = Chooser()
    chooser.set_costs(COSTS[:2], 3, 400 * MIB)
    assert choose(chooser, 400) == (2, ())
    assert chooser.choice.reason == "memory did not do for counting what exit 3 takes"
    assert choose(chooser, 150) == (1, ())
    assert "exit 2 needs 200.0 MiB" in chooser.choice.reason


def test_a_fault_of_a_job_that_is_gone_changes_nothing(started):
    started.trainer_says(Estimated(model=MODEL, costs=COSTS))
    before = len(started.link.sent)
    started.trainer_says(Fault(code="trainer", detail="the loss is not finite", round=4))
    assert len(started.link.sent) == before
    assert started.ready[0] == 3


def test_another_run_begins_with_its_own_choice(started):
    """A job in hand is dropped without telling the new run what the old one's model allowed."""
    started.trainer_says(Estimated(model=MODEL, costs=COSTS))
    started.agent._on_job(JOB)
    assert started.trainer.of(Train)
    before = len(started.link.of(Ready))
    shallower = replace(MODEL, exit=2, options={"channels": (4, 5)})
    started.agent._on_welcome(replace(welcome(), run="other", model=shallower))
    assert len(started.link.of(Ready)) == before
    assert isinstance(started.trainer.sent[-2], Cancel)
    assert started.trainer.sent[-1].model == shallower


# -- one connection ----------------------------------------------------------------------------


def test_a_job_goes_on_once_for_each_connection(started):
    """While a coordinator aggregates several hellos wait there, and each is answered."""
    started.trainer_says(Estimated(model=MODEL, costs=COSTS))
    started.agent._on_job(JOB)
    for connections in (1, 2):
        started.agent._state.welcome = None  # the connection is lost
        for _ in range(3):
            started.agent._on_welcome(welcome())
        assert len(started.trainer.of(Resume)) == connections
        assert started.agent._state.retries == connections


# -- trainers that do not start ----------------------------------------------------------------


def no_process(*_: Any, **__: Any) -> None:
    raise BlockingIOError(11, "Resource temporarily unavailable")


def test_a_trainer_that_cannot_be_started_leaves_nothing_open(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", no_process)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(TrainerError, match="cannot be started: .*temporarily unavailable"):
        TrainerProcess(TrainerOptions(data="data.npz"))
    assert os.listdir("/proc/self/fd") == before


def test_a_trainer_that_cannot_be_restarted_is_tried_again(started, monkeypatch):
    started.trainer_says(Estimated(model=MODEL, costs=COSTS))
    trainer, now = started.agent._trainer, 0.0
    monkeypatch.setattr(agent_module.time, "monotonic", lambda: now)
    started.agent._on_trainer_death()
    assert trainer.restart_at == 1.0
    with monkeypatch.context() as patch:
        patch.setattr(trainer_process, "TrainerProcess", TrainerProcess)
        patch.setattr(subprocess, "Popen", no_process)
        now = 1.0
        started.agent._on_time(now)
    assert trainer.process is None
    assert trainer.restart_at == 3.0  # 2 s later
    now = 3.0
    started.agent._on_time(now)
    assert trainer.process is started.trainer
    assert trainer.restart_at is None


def test_speed_is_measured_on_the_threads_of_training(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(worker, "measure_gflops", lambda threads, device: found.append(threads))
    monkeypatch.setattr(worker, "measure_layer_s", lambda threads, device: found.append(threads))
    monkeypatch.setattr(worker, "memory_calibration", lambda *_: MemoryCalibration(made_with=""))
    monkeypatch.setattr(worker, "runtime_bytes", lambda: (0, 0))
    save_shard(tmp_path / "d.npz", examples(8))
    before = worker.torch.get_num_threads()
    try:
        worker.prepare(None, TrainerOptions(data=str(tmp_path / "d.npz"), threads=1))  # type: ignore[arg-type]
    finally:
        worker.torch.set_num_threads(before)
    assert found == [1, 1]


def test_what_is_refused_before_the_choice_stays_refused(started):
    started.agent._on_job(JOB)
    assert not started.trainer.of(Train)
    assert started.link.of(Fault)[-1].code == "capacity"
    assert started.agent._choosing.chooser.refusal(segments((1, 3)))


# -- what was trained before ---------------------------------------------------------------------


@pytest.mark.parametrize("finished", [None, JOB])
def test_what_was_trained_is_told_once_by_this_start(monkeypatch, caplog, finished):
    """The process before it may not have lived to tell it."""
    started = Started(monkeypatch, finished)
    if not finished:
        started.trainer_says(Estimated(model=MODEL, costs=COSTS))
        started.agent._on_job(JOB)
    update = Update(
        job=JOB.id,
        digest="d" * 32,
        round=4,
        num_examples=24,
        num_steps=3,
        exits=(),
        phases={"train": Phase(wall_s=1.0)},
        peak_memory_bytes=0,
        tensors=(),
    )
    with caplog.at_level("INFO", "edge_sdk.agent.agent"):
        for _ in range(2):  # again, on a new connection
            started.trainer_says(update)
    assert len(started.link.of(Update)) == 2
    said = [line for line in caplog.messages if "trained" in line]
    before = " before this start" if finished else ""
    assert said == [f"round 4: trained{before}, sending the update"]
