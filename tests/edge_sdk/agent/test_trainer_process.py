"""What the agent hears of its training process after it has dropped a job."""

from __future__ import annotations

from collections import deque

import pytest

from edge_sdk.agent import trainer_process
from edge_sdk.agent.pipe import Cancel, Estimated, PipeMessage, Progress, TrainerOptions
from edge_sdk.agent.trainer_process import Ending, Supervisor
from edge_sdk.protocol.messages import Fault, Fetch, Part
from tests.support.agent import MODEL

FETCH = Fetch(round=4, have=0, first=0, count=8)


class Trainer:
    """Says what it is told to say."""

    def __init__(self) -> None:
        self.says: deque[PipeMessage] = deque()
        self.heard: list[PipeMessage] = []

    def send(self, message: PipeMessage, payload: bytes) -> None:
        self.heard.append(message)

    def flush(self) -> None: ...

    def look_at_memory(self) -> None: ...

    def is_readable(self) -> bool:
        return bool(self.says)

    def receive(self) -> tuple[PipeMessage, memoryview]:
        return self.says.popleft(), memoryview(b"")

    def wait_for_end(self) -> Ending:
        return Ending("ended", is_for_memory=False)


@pytest.fixture
def trainer() -> Trainer:
    return Trainer()


@pytest.fixture
def supervisor(trainer, monkeypatch) -> Supervisor:
    monkeypatch.setattr(trainer_process, "TrainerProcess", lambda *_: trainer)
    return Supervisor(TrainerOptions(data="unused"))


def heard(supervisor: Supervisor, trainer: Trainer, *says: PipeMessage) -> list[PipeMessage]:
    trainer.says.extend(says)
    found = [supervisor.receive() for _ in says]
    return [received[0] for received in found if received is not None]


@pytest.mark.parametrize(
    "stale",
    [
        FETCH,
        Part(round=4, index=1),
        Fault(code="capacity", detail="no memory", round=4),
    ],
    ids=lambda message: type(message).__name__,
)
def test_nothing_of_a_dropped_job_fails_the_next_of_its_round(supervisor, trainer, stale):
    assert heard(supervisor, trainer, stale) == [stale]
    supervisor.send(Cancel())
    assert heard(supervisor, trainer, stale, Cancel(), stale) == [stale], "the one after it"


def test_every_dropped_job_is_answered_for_itself(supervisor, trainer):
    supervisor.send(Cancel())
    supervisor.send(Cancel())
    assert heard(supervisor, trainer, FETCH, Cancel(), FETCH, Cancel()) == []
    assert heard(supervisor, trainer, FETCH) == [FETCH]


def test_what_is_about_no_job_is_always_heard(supervisor, trainer):
    supervisor.send(Cancel())
    others = (
        Progress(round=4, batches=2),
        Estimated(model=MODEL, costs=()),
        Fault(code="capacity", detail="costs could not be counted"),
    )
    assert heard(supervisor, trainer, *others) == list(others)


def test_one_that_died_answers_for_nothing(supervisor, trainer):
    supervisor.send(Cancel())
    supervisor.reap(had_job=False)
    supervisor.send(Cancel())  # there is no process
    supervisor.restart()
    assert heard(supervisor, trainer, FETCH) == [FETCH]
