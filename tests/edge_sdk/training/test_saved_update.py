"""A finished update on the device's disk."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from msgspec.structs import replace

from edge_sdk.agent.pipe import Estimate, Inspected, Pipe, Resume
from edge_sdk.agent.setup import saved_updates_folder
from edge_sdk.protocol.messages import ExitResult, Fault, Job, Phase, Plan, Segment, Update
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import Sender, specs_of
from edge_sdk.training.calibration import MemoryCalibration
from edge_sdk.training.client_state import ClientState
from edge_sdk.training.kept_tensors import KeptTensors
from edge_sdk.training.saved_update import STATE, SavedUpdate
from edge_sdk.training.worker import TrainerLoop
from tests.support.devices import floats
from tests.support.examples import cnn, examples

TRAINED = {"stages.0.0.weight": floats(PART_BYTES // 4 + 3), "exits.0.2.bias": floats(3)}
JOB = Job(
    id="a" * 32,
    round=4,
    model=cnn(1),
    plan=Plan(segments=(Segment(first=1, last=1),)),
    tensors=specs_of(TRAINED),
    deadline_s=0.0,
)


def finished() -> tuple[Update, Sender]:
    sender = Sender(TRAINED)
    update = Update(
        job=JOB.id,
        digest=sender.digest(),
        round=4,
        num_examples=10,
        num_steps=1,
        exits=(ExitResult(exit=1, loss=0.5, metric=0.5),),
        phases={"train": Phase(wall_s=1.0)},
        peak_memory_bytes=0,
        tensors=sender.specs,
    )
    return update, sender


@pytest.fixture
def folder(tmp_path):
    update, sender = finished()
    SavedUpdate(tmp_path / "updates" / "a").save(JOB, update, sender)
    return tmp_path / "updates" / "a"


def test_update_comes_back_as_it_was(folder):
    found = SavedUpdate(folder).load()
    assert found is not None
    job, update, sender = found
    assert (job, update) == (JOB, finished()[0])
    assert [bytes(sender.part(i)) for i in range(2)] == [
        bytes(finished()[1].part(i)) for i in range(2)
    ]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_forgotten_update_does_not_come_back(folder):
    SavedUpdate(folder).forget()
    assert SavedUpdate(folder).load() is None
    assert not list(folder.iterdir())


def test_nothing_is_kept_without_a_folder():
    saved = SavedUpdate(None)
    saved.save(JOB, *finished())
    assert saved.load() is None
    saved.forget()


def test_one_update_at_a_time(folder):
    _, sender = finished()
    small = Sender({"w": torch.ones(2)})
    update = msgspec.structs.replace(finished()[0], tensors=small.specs, digest=small.digest())
    SavedUpdate(folder).save(JOB, update, small)
    found = SavedUpdate(folder).load()
    assert found is not None
    assert found[1] == update
    assert (folder / "update.data").stat().st_size == 8 < sender.total_bytes


def test_a_second_agent_with_the_same_folder_goes_without(folder, caplog):
    first, second = SavedUpdate(folder), SavedUpdate(folder)
    assert first.load() is not None
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert second.load() is None
    assert "update.data is left out: " in caplog.text
    second.save(replace(JOB, round=5), *finished())
    said = "another agent with this device's name and coordinator uses it; give another --id"
    assert said in caplog.text
    assert "Errno" not in caplog.text
    second.forget()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    del first  # as when its process ends, however that does
    assert second.load() is not None


FORKS = """
import os, sys
from pathlib import Path
from edge_sdk.training.saved_update import SavedUpdate
saved = SavedUpdate(Path(sys.argv[1]))
assert saved.load() is not None
if os.fork():
    os._exit(0)
sys.stdin.read()
"""


def test_lock_ends_with_its_process_though_a_fork_of_it_lives(folder):
    """As when a trainer is killed while a fork of it counts costs."""
    program = [sys.executable, "-c", FORKS, str(folder)]
    with subprocess.Popen(program, stdin=subprocess.PIPE) as process:
        assert process.wait() == 0
        assert SavedUpdate(folder).load() is not None


def test_folders_are_told_apart_by_device_and_coordinator(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    here, moved = "tcp://here:5555", "tcp://moved:5555"
    keys = (None, b"k" * 40)
    folder = saved_updates_folder("pi-1", here, keys)
    assert Path(folder).parent == tmp_path / "updates"
    assert Path(folder).name.startswith("pi-1-")
    assert (
        saved_updates_folder("pi-1", moved, keys) == folder
    )  # a restart after a change of address
    others = [
        saved_updates_folder("pi-2", here, keys),
        saved_updates_folder("pi-1", here, (None, b"K" * 40)),
        saved_updates_folder("pi-1", here, (None, None)),
        saved_updates_folder("pi-1", moved, (None, None)),
    ]
    assert len({folder, *others}) == 5


def test_update_that_memory_does_not_do_for_is_left_out(folder, monkeypatch, caplog):
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "empty", full)
    assert SavedUpdate(folder).load() is None
    assert "left out: out of memory while reading an update" in caplog.text


@pytest.mark.parametrize("name", ["update.data", "update.json"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:-1] + b"\xff"),
    ],
)
def test_damaged_update_is_as_if_it_were_not_there(folder, name, spoil):
    """As after a power cut."""
    spoil(folder / name)
    assert SavedUpdate(folder).load() is None
    assert len(list(folder.iterdir())) < 2, "what no load will ever find takes no room"


def test_killed_while_saving_the_second_the_first_does_not_count(folder, monkeypatch):
    update, sender = finished()
    begun: list[int] = []

    def killed(index: int) -> bytes:
        begun.append(index)
        raise KeyboardInterrupt

    monkeypatch.setattr(sender, "part", killed)
    with pytest.raises(KeyboardInterrupt):
        SavedUpdate(folder).save(JOB, update, sender)
    assert begun == [0]
    assert SavedUpdate(folder).load() is None


def test_full_disk_costs_nothing_but_the_copy(tmp_path, monkeypatch, caplog):
    real = os.open

    def full(path: Any, *rest: Any) -> int:
        if Path(path).name == "update.json":
            raise OSError(28, "No space left on device")
        return real(path, *rest)

    monkeypatch.setattr(os, "open", full)
    SavedUpdate(tmp_path).save(JOB, *finished())
    assert "not kept over a restart" in caplog.text
    assert not list(tmp_path.iterdir())


def test_other_values_are_another_digest():
    changed = dict(TRAINED)
    changed["exits.0.2.bias"] = torch.nextafter(TRAINED["exits.0.2.bias"], torch.tensor(9.0))
    assert Sender(changed).digest() != finished()[0].digest


def test_costs_that_cannot_be_counted_do_not_cost_the_update(folder):
    ours, theirs = socket.socketpair()
    agent = Pipe(ours)
    agent.send(Estimate(model=replace(JOB.model, family="none such"), plan=JOB.plan))
    agent.send(Resume())
    ours.shutdown(socket.SHUT_WR)
    loop = TrainerLoop(
        Pipe(theirs),
        examples(),
        "cpu",
        MemoryCalibration(made_with=""),
        SavedUpdate(folder),
        ClientState(None),
        KeptTensors(None),
    )
    with pytest.raises(EOFError):
        loop.serve(0.0, 0.0)
    theirs.close()  # nothing more comes
    inspected, fault, update = (agent.receive()[0] for _ in range(3))
    ours.close()
    assert isinstance(inspected, Inspected)
    assert inspected.finished == JOB
    assert isinstance(fault, Fault)
    assert fault.round == 0  # it is about no job
    assert update == finished()[0]
    del loop  # whose folder it is
    assert SavedUpdate(folder).load() is not None


def test_only_the_newest_of_other_coordinators_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    folders = [
        Path(saved_updates_folder("pi", f"tcp://h:{port}", (None, None))) for port in range(7)
    ]
    strangers = [
        folders[0].with_name("not-ours"),
        Path(saved_updates_folder("pi-2", "tcp://h", (None, None))),
    ]
    for stranger in strangers:
        stranger.mkdir(parents=True)
        (stranger / "update.data").touch()
    (folders[1] / STATE).mkdir(parents=True)  # goes with the folder
    (folders[1] / STATE / "1.state").touch()
    in_use = SavedUpdate(folders[0])
    for number, folder in enumerate(folders):
        saved = in_use if number == 0 else SavedUpdate(folder)
        saved.save(JOB, *finished())
        os.utime(folder, (number, number))
        del saved  # and its lock
    left = {folder for folder in folders if folder.exists()}
    # the one that saved last, the three before it, and the oldest, whose agent lives
    assert left == {folders[0], *folders[3:]}
    assert all(stranger.exists() for stranger in strangers)
    assert in_use.load() is not None


def test_what_is_kept_reaches_the_disk(tmp_path, monkeypatch):
    synced: list[str] = []
    real = os.fsync

    def fsync(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_relative_to(tmp_path):  # an earlier test's may be under way
            synced.append(path.name)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    saved = SavedUpdate(tmp_path / "pi-1")
    saved.save(JOB, *finished())
    assert saved._syncing is not None
    saved._syncing.join(30)
    assert synced == ["update.data", "update.json", "pi-1"]


def test_an_old_folder_that_cannot_be_removed_costs_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    folders = [
        Path(saved_updates_folder("pi", f"tcp://h:{port}", (None, None))) for port in range(6)
    ]
    for folder in folders[:5]:
        folder.mkdir(parents=True)
    real = os.open

    def denied(path: Any, *rest: Any) -> int:
        if Path(path) in folders[:5]:
            raise PermissionError(13, "Permission denied")
        return real(path, *rest)

    monkeypatch.setattr(os, "open", denied)
    saved = SavedUpdate(folders[5])
    saved.save(JOB, *finished())
    assert saved.load() is not None
