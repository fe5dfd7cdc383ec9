"""A finished update on the device's disk: there until accepted, and never half."""

from __future__ import annotations

import errno

import pytest
import torch

from edge_sdk.kept import Kept
from edge_sdk.tensors import Sender, specs_of
from edge_sdk.wire import PART_BYTES, Job, Plan, Segment, Update
from tests.helpers import cnn
from tests.scripted import floats

TENSORS = {"stages.0.w": floats(PART_BYTES // 4), "exits.0.b": floats(3, start=7.0)}  # two parts
JOB = Job(
    id="1" * 32, round=3, model=cnn(1), plan=Plan(segments=(Segment(first=1, last=1),)),
    tensors=specs_of(TENSORS), deadline_s=0.0,
)  # fmt: skip


def update(sender: Sender, job: Job = JOB) -> Update:
    return Update(
        job=job.id, digest=sender.digest(), round=3, num_examples=1, num_steps=1, exits=(),
        phases={}, peak_memory_bytes=0, tensors=sender.specs,
    )  # fmt: skip


def save(kept: Kept) -> None:
    sender = Sender(TENSORS)
    kept.save(JOB, update(sender), sender)


def test_what_was_finished_is_there_after_a_restart(tmp_path):
    folder = tmp_path / "not yet there"
    save(Kept(folder))
    found = Kept(folder).load()
    assert found is not None
    job, told, sender = found
    want = Sender(TENSORS)
    assert (job, told) == (JOB, update(want))
    assert [sender.part(index) for index in range(2)] == [want.part(index) for index in range(2)]
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_what_was_forgotten_is_not(tmp_path):
    kept = Kept(tmp_path)
    save(kept)
    kept.forget()
    assert kept.load() is None
    assert list(tmp_path.iterdir()) == []
    kept.forget()  # twice


def test_one_update_at_a_time(tmp_path):
    kept, small = Kept(tmp_path), {"w": torch.ones(2)}
    save(kept)
    sender = Sender(small)
    kept.save(JOB, update(sender), sender)
    found = kept.load()
    assert found is not None
    assert found[1].tensors == sender.specs
    assert (tmp_path / "update.data").stat().st_size == 8


def test_without_a_folder_nothing_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = Kept(None)
    save(kept)
    assert kept.load() is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["bit", "short", "gone", "json"])
def test_damaged_update_is_trained_again(tmp_path, damage):
    kept = Kept(tmp_path)
    save(kept)
    data, about = tmp_path / "update.data", tmp_path / "update.json"
    whole = data.read_bytes()
    if damage == "bit":
        data.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    elif damage == "short":
        data.write_bytes(whole[:-1])
    elif damage == "gone":
        data.unlink()
    else:
        about.write_bytes(about.read_bytes()[:-3])
    assert kept.load() is None
    save(kept)
    assert kept.load() is not None


def test_full_disk_costs_what_was_kept_and_nothing_else(tmp_path, monkeypatch, caplog):
    kept = Kept(tmp_path)
    save(kept)

    def full(*args: object) -> bytes:
        raise OSError(errno.ENOSPC, "No space left on device")

    sender = Sender(TENSORS)
    told = update(sender)
    monkeypatch.setattr(sender, "part", full)
    kept.save(JOB, told, sender)
    assert "not kept over a restart" in caplog.text
    assert kept.load() is None
    assert list(tmp_path.iterdir()) == []
