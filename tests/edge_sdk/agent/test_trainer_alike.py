"""Trainers that end alike again and again before any job: the device rests, and says why."""

from __future__ import annotations

import os
import select
import signal
from contextlib import closing

import pytest
from msgspec.structs import replace

from edge_sdk.agent import trainer_process
from edge_sdk.agent.pipe import TrainerOptions
from edge_sdk.agent.trainer_process import MOST_ALIKE, Ending, Supervisor
from edge_sdk.data.loading import save_shard
from edge_sdk.errors import DataError, TrainerError
from edge_sdk.helpers.files import write_whole
from edge_sdk.protocol.messages import Hello, Ready
from tests.support.agent import MODEL, WHOLE, finish, listening, running
from tests.support.coordinator import ScriptedCoordinator
from tests.support.devices import WAIT_S
from tests.support.examples import examples
from tests.support.processes import ROOT

# Ends its process, at once or later, when there is a file with this name.
MORTAL = """
import os, threading, time
def watch():
    while not os.path.exists({flag!r}):
        time.sleep(0.05)
    os._exit(3)
if os.path.exists({flag!r}):
    watch()
threading.Thread(target=watch, daemon=True).start()
"""


class Mortal:
    """In the place of a trainer's process: it has ended, with the next of these states."""

    def __init__(self, *statuses: int) -> None:
        self.statuses = list(statuses)

    def wait_for_end(self) -> Ending:
        status = self.statuses.pop(0)
        return Ending(f"ended with status {status}", False, status)


def pauses(
    monkeypatch: pytest.MonkeyPatch, *statuses: int, data: str = "digits", had_job: bool = False
) -> tuple[Supervisor, list[float]]:
    """Seconds until another trainer after each of these ends."""
    process = Mortal(*statuses)
    monkeypatch.setattr(trainer_process, "TrainerProcess", lambda *_: process)
    supervisor = Supervisor(TrainerOptions(data=data))
    found = []
    for _ in statuses:
        found.append(supervisor.reap(had_job=had_job)[1])
        supervisor.restart()
    return supervisor, found


def test_the_pause_is_long_after_four_ends_alike(monkeypatch):
    assert MOST_ALIKE == 4
    supervisor, found = pauses(monkeypatch, *[1] * 10)
    assert found == [1, 2, 4, 300, 600, 1200, 2400, 3600, 3600, 3600]
    assert supervisor.num_alike == 10
    supervisor.mark_well()
    assert not supervisor.is_resting


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ([1, 1, 1, -11, -11, -11, -11], [1, 2, 4, 8, 16, 32, 300]),
        ([1, -11, 1, -11, 1, -11], [1, 2, 4, 8, 16, 32]),
    ],
)
def test_other_ends_are_tried_again(monkeypatch, statuses, expected):
    assert pauses(monkeypatch, *statuses)[1] == expected


def test_ends_with_a_job_are_told_for_that_job(monkeypatch):
    assert pauses(monkeypatch, *[1] * 8, had_job=True)[1] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_one_that_lived_long_is_another_matter(monkeypatch):
    monkeypatch.setattr(trainer_process, "WELL_S", 0.0)
    assert pauses(monkeypatch, *[1] * 6)[1] == [1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize("what", ["file", "file in a folder", "new file in a folder"])
def test_other_data_end_the_rest(monkeypatch, tmp_path, what):
    file = tmp_path / "data" / "x.npz"
    file.parent.mkdir()
    file.write_bytes(b"1")
    data = file if what == "file" else file.parent
    process = Mortal(*[1] * 4)
    monkeypatch.setattr(trainer_process, "TrainerProcess", lambda *_: process)
    supervisor = Supervisor(TrainerOptions(data=str(data)))
    for _ in range(3):
        supervisor.reap(had_job=False)
        supervisor.restart()
    supervisor.reap(had_job=False)
    assert supervisor.restart_at is not None
    soon = supervisor.restart_at - 299
    assert not supervisor.is_due(soon)
    (file.with_name("y.npz") if "new" in what else file).write_bytes(b"22")
    assert supervisor.is_due(soon)


def test_data_that_changed_are_said_to_be_read_again(monkeypatch, tmp_path, caplog):
    data = tmp_path / "d1.npz"
    data.write_bytes(b"1")
    monkeypatch.setattr(trainer_process, "TrainerProcess", lambda *_: Mortal(*[1] * 4))
    supervisor = Supervisor(TrainerOptions(data=str(data)))
    for content, lines in ((None, 0), (b"2", 1), (None, 1), (b"22", 2)):
        if content:
            write_whole(data, content)  # by another file of its name
        supervisor.restart()
        assert caplog.messages == [f"{data} changed since it was read, read again"] * lines


# -- real processes --------------------------------------------------------------------------------


def ending_of(supervisor: Supervisor) -> Ending:
    """How its process ended, once it has."""
    assert supervisor.process is not None
    with pytest.raises((EOFError, OSError)):
        while select.select([supervisor.process], [], [], WAIT_S)[0]:
            supervisor.receive()
    return supervisor.reap(had_job=False)[0]


def test_what_a_trainer_cannot_start_with():
    ending = ending_of(Supervisor(TrainerOptions(data="nowhere.npz")))
    error = ending.before_data()
    assert isinstance(error, DataError)
    assert "nowhere.npz" in str(error)
    assert ending.how == f"ended with status 1: {error}"


def test_a_trainer_that_dies_without_a_word():
    supervisor = Supervisor(TrainerOptions(data="digits"))
    assert supervisor.process is not None
    os.kill(supervisor.process.pid, signal.SIGSEGV)
    error = ending_of(supervisor).before_data()
    assert isinstance(error, TrainerError)
    assert str(error).startswith("the trainer ended by signal 11 before it had read its data; ask")


def test_what_a_trainer_dies_of_is_told(tmp_path, capfd):
    """Here of what an agent never says."""
    save_shard(tmp_path / "d.npz", examples(8))
    options = TrainerOptions(data=str(tmp_path / "d.npz"), threads=1, measure_compute=False)
    supervisor = Supervisor(options)
    assert supervisor.process is not None
    supervisor.process.receive()
    supervisor.process._outbox.append(memoryview(b"\x01\0\0\0\0\0\0\0\xc1"))
    supervisor.process.flush()
    ending = ending_of(supervisor)
    assert ending.how.startswith("ended with status 1: DecodeError: ")
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.slow
def test_a_device_rests_and_tells_each_coordinator_why(quick_retries, tmp_path, caplog):
    flag, data = tmp_path / "flag", tmp_path / "data.npz"
    (tmp_path / "mortal.py").write_text(MORTAL.format(flag=str(flag)))
    options = {"imports": ("mortal",), "search_path": (str(tmp_path), str(ROOT))}
    with (
        closing(ScriptedCoordinator()) as coordinator,
        running(coordinator.endpoint, data, examples(24), **options) as device,
    ):
        coordinator.expect(Hello)
        coordinator.welcome(MODEL, WHOLE)
        coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
        with listening("alike") as lines:
            flag.touch()
            reason = (
                "the trainer ended with status 3, the last 4 times alike before any job; "
                "another when the data changes or this program is started anew, else in 300 s"
            )
            coordinator.wait_for(Ready, lambda ready: (ready.exit, ready.reason) == (0, reason))
            assert (lines.count, lines.events) == (1, ["failed"])
        coordinator.run += 1  # another run, of another model
        coordinator.welcome(replace(MODEL, width=0.5), WHOLE)
        coordinator.wait_for(Ready, lambda ready: (ready.exit, ready.reason) == (0, reason))
        assert device.agent._trainer.process is None
        assert device.agent._trainer.pause == "resting (see the log)"
        coordinator.welcome(MODEL, WHOLE)
        flag.unlink()
        save_shard(data, examples(30))
        coordinator.wait_for(Hello, lambda hello: hello.num_examples == 30)
        assert caplog.messages.count(f"{data} changed since it was read, read again") == 1
        coordinator.welcome(MODEL, WHOLE)
        coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
        finish(coordinator, 1)
