"""Updates on disk: what a kill at any point, damage or a full disk leaves of one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch

from coordinator.fleet import spool as spool_module
from coordinator.fleet.spool import Spool
from edge_sdk.errors import StoreError
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import Receiver, Sender, Tensors
from tests.support.devices import floats
from tests.support.spooled import JOB, OTHER, TENSORS, arrived, files, keep, one_line, receive


def assert_is_there(spool: Spool, client: str = "a", tensors: Tensors = TENSORS) -> None:
    found = spool.take_update(3, client, JOB)
    assert found is not None
    assert found[0] == arrived(tensors)
    assert list(found[1]) == list(tensors)
    assert all(torch.equal(found[1][name], tensors[name]) for name in tensors)


def test_whole_update_is_taken_by_who_comes_after(tmp_path):
    spool = Spool(tmp_path / "spool")
    receiver = receive(spool)
    got = receiver.tensors()
    assert all(torch.equal(got[name], TENSORS[name]) for name in TENSORS)
    spool.save_update(3, "a", arrived(TENSORS))
    assert_is_there(Spool(tmp_path / "spool"))
    assert spool.take_update(3, "b", JOB) is None
    assert spool.take_update(4, "a", JOB) is None


def test_update_of_no_bytes(tmp_path):
    spool, nothing = Spool(tmp_path), {"w": floats(0)}
    keep(spool, tensors=nothing)
    assert_is_there(spool, tensors=nothing)


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_stream_that_was_not_kept_counts_as_nothing(tmp_path, parts):
    """Killed before all was there, or between the last part and the json."""
    spool = Spool(tmp_path)
    receive(spool, parts=parts)
    assert spool.take_update(3, "a", JOB) is None


def test_kill_while_the_json_is_written_counts_as_nothing(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    receive(spool)

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(spool_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        spool.save_update(3, "a", arrived(TENSORS))
    monkeypatch.undo()
    assert Spool(tmp_path).take_update(3, "a", JOB) is None
    keep(spool)  # asked for again
    assert_is_there(spool)


def test_upload_that_begins_anew_takes_the_place_of_the_old(tmp_path):
    """After a restart of the device, longer first: nothing of the old stream is left."""
    spool, short = Spool(tmp_path), {"w": floats(5)}
    receive(spool)
    keep(spool, tensors=short)
    assert_is_there(spool, tensors=short)
    assert (tmp_path / "0000000003-a.data").stat().st_size == 20


@pytest.mark.parametrize("damage", ["bit", "short", "long", "gone", "json", "empty json"])
def test_damaged_update_is_not_taken(tmp_path, damage):
    spool = Spool(tmp_path)
    keep(spool)
    data, json = tmp_path / "0000000003-a.data", tmp_path / "0000000003-a.json"
    whole = data.read_bytes()
    if damage == "bit":
        data.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    elif damage == "gone":
        data.unlink()
    elif damage in ("short", "long"):
        data.write_bytes(whole[:-1] if damage == "short" else whole + b"\0")
    else:
        json.write_bytes(json.read_bytes()[:-5] if damage == "json" else b"")
    assert spool.take_update(3, "a", JOB) is None
    keep(spool)
    assert_is_there(spool)


def test_update_of_another_job_is_not_taken(tmp_path):
    spool = Spool(tmp_path)
    keep(spool, job=OTHER)
    assert spool.take_update(3, "a", JOB) is None
    assert spool.take_update(3, "a", OTHER) is not None


NAMES = ("a", "a.b", "a.data", "a.json", "a.new", "a-b", "3-a")


def test_names_with_dots_are_apart(tmp_path):
    spool = Spool(tmp_path)
    for number, name in enumerate(NAMES):
        keep(spool, name, {"w": floats(4, start=float(number))})
    for name in NAMES[1:]:
        spool.delete(3, name)
        assert spool.take_update(3, name, JOB) is None
        assert_is_there(spool, "a", {"w": floats(4)})
    assert files(spool) == ["0000000003-a.data", "0000000003-a.json"]


def test_rounds_before_are_forgotten_but_for_what_is_wanted(tmp_path):
    spool = Spool(tmp_path)
    for round in (1, 2, 3):
        for name in NAMES:
            receive(spool)  # of round 3
            sender = Sender(TENSORS)
            receiver = Receiver(sender.specs, spool.storage(round, name))
            receiver.add(1, sender.part(1))
            spool.save_update(round, name, arrived(TENSORS))
    spool.delete_before(3, {(1, "a.b"), (2, "a")})
    kept = [name for name in files(spool) if name.startswith(("0000000001", "0000000002"))]
    assert kept == [
        "0000000001-a.b.data",
        "0000000001-a.b.json",
        "0000000002-a.data",
        "0000000002-a.json",
    ]
    free = [name for name in files(spool) if name.startswith("free-")]
    assert len(free) == 2 * len(NAMES) - 2
    assert len(files(spool)) == 4 + 2 * len(NAMES) + len(free)
    spool.clear()
    assert files(spool) == []


@pytest.mark.parametrize("is_resumed", [False, True])
def test_files_of_rounds_before_are_used_again(tmp_path, is_resumed):
    """Longer or shorter than the new stream, they leave nothing of theirs in it."""
    spool = Spool(tmp_path)
    longer = {"w": floats(PART_BYTES // 2)}
    for name, tensors in (("a", longer), ("b", {"w": floats(1)})):
        sender = Sender(tensors)
        receiver = Receiver(sender.specs, spool.storage(1, name))
        for index in range(sender.num_parts):
            receiver.add(index, sender.part(index))
    spool.delete_before(3, set())
    assert files(spool) == ["free-0000000001-a.data", "free-0000000001-b.data"]
    spool = Spool(tmp_path) if is_resumed else spool
    for name in ("a", "b", "c"):
        keep(spool, name)
        assert_is_there(spool, name)
    assert len(files(spool)) == 6


def test_what_is_kept_counts_although_others_are_freed(tmp_path):
    spool = Spool(tmp_path)
    keep(spool)
    receive(spool, "half", parts=1)
    spool.delete_before(3, set())
    assert_is_there(spool)
    spool.delete_before(4, {(3, "a")})
    keep(spool, "b", {"w": floats(7)})  # in the file that half had
    assert_is_there(spool)


def test_mapped_tensors_outlive_their_file(tmp_path):
    spool = Spool(tmp_path)
    keep(spool)
    found = spool.take_update(3, "a", JOB)
    assert found is not None
    spool.delete(3, "a")
    assert files(spool) == []
    assert torch.equal(found[1]["exits.0.b"], TENSORS["exits.0.b"])


def test_no_file_stays_open(tmp_path):
    """A descriptor for every upload under way would be too many."""
    spool = Spool(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    receivers = [receive(spool, f"c{number}", parts=1) for number in range(20)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(receivers) == 20


def test_full_disk_is_one_line(tmp_path, monkeypatch):
    """Of a part the disk takes a little, then nothing."""
    spool, sender = Spool(tmp_path), Sender(TENSORS)
    receiver = Receiver(sender.specs, spool.storage(3, "a"))
    calls: list[int] = []
    pwrite = os.pwrite

    def filling(file: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(file, data[:100], offset)

    monkeypatch.setattr(spool_module.os, "pwrite", filling)
    with pytest.raises(StoreError, match=r"a\.data cannot be written: .*No space left") as caught:
        receiver.add(0, sender.part(0))
    one_line(caught.value)
    assert calls == [0, 100]
    monkeypatch.undo()
    assert receiver.num_received == 0  # what was not written is not here
    receiver.add(0, sender.part(0))
    receiver.add(1, sender.part(1))
    assert all(torch.equal(receiver.tensors()[name], TENSORS[name]) for name in TENSORS)


def test_full_disk_for_the_json_is_one_line(tmp_path, monkeypatch):
    spool = Spool(tmp_path)
    receive(spool)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match=r"a\.json cannot be written: .*No space left") as caught:
        spool.save_update(3, "a", arrived(TENSORS))
    one_line(caught.value)
    monkeypatch.undo()
    assert spool.take_update(3, "a", JOB) is None


LIMITED = """
import resource, signal, sys
from pathlib import Path
from coordinator.fleet.spool import Spool
from edge_sdk.errors import StoreError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
storage = Spool(Path(sys.argv[1])).storage(1, "a")(300_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    storage.write(0, bytes(300_000))
except StoreError as error:
    print(error)
"""


def test_a_real_limit_on_file_size_is_one_line(tmp_path):
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert "0000000001-a.data cannot be written: " in line
    assert "File too large" in line


def test_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be written: ") as caught:
        Spool(tmp_path / "file" / "spool")
    one_line(caught.value)


def test_file_that_was_deleted_meanwhile_is_one_line(tmp_path):
    spool, sender = Spool(tmp_path), Sender(TENSORS)
    receiver = receive(spool, parts=1)
    (tmp_path / "0000000003-a.data").unlink()
    with pytest.raises(StoreError, match="No such file") as caught:
        receiver.add(1, sender.part(1))
    one_line(caught.value)
