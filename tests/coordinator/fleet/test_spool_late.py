"""Jobs on disk that outlive their round, which nobody gives again."""

from __future__ import annotations

import errno
import os

import pytest
import torch

from coordinator.fleet.spool import Spool
from edge_sdk.errors import StoreError
from edge_sdk.protocol.messages import Job, Plan, Segment
from edge_sdk.protocol.tensors import Sender, specs_of
from tests.support.devices import floats
from tests.support.examples import client, cnn
from tests.support.spooled import JOB, TENSORS, files, keep, one_line

START = {name: tensor - 1 for name, tensor in TENSORS.items()} | {"stages.9.w": floats(2)}


def hold(spool: Spool, client_id: str = "a", sender: Sender | None = None) -> None:
    sender = sender or Sender(START)
    plan = Plan(segments=(Segment(first=1, last=1),))
    job = Job(id=JOB, round=3, model=cnn(2), plan=plan, tensors=sender.specs, deadline_s=0.0)
    spool.save_job(client(client_id, 2), job, specs_of(TENSORS), sender, outlives=False)


def held_by(spool: Spool, round: int = 4) -> list[str]:
    return [held.client.id for held, _ in spool.saved_jobs(round)]


def test_job_that_outlives_its_round_comes_with_what_it_began_from(tmp_path):
    hold(Spool(tmp_path))
    ((found, start),) = Spool(tmp_path).saved_jobs(4)
    assert (found.client, found.job.round, found.outlives) == (client("a", 2), 3, False)
    assert found.returns == specs_of(TENSORS)
    assert list(start) == list(START)
    for name, tensor in START.items():
        assert torch.equal(start[name], tensor)


def test_only_jobs_of_rounds_before_are_held(tmp_path):
    spool = Spool(tmp_path)
    keep(spool, "b")  # of a round that was cut short: its job is given again
    hold(spool, "a")
    assert held_by(spool, 3) == []
    assert held_by(spool, 4) == ["a"]


def test_who_began_from_the_same_shares_a_file(tmp_path):
    spool, sender, other = Spool(tmp_path), Sender(START), Sender(START)

    def inode(name: str) -> int:
        return (tmp_path / f"0000000003-{name}.base").stat().st_ino

    hold(spool, "a", sender)
    hold(spool, "b", sender)
    hold(spool, "c", other)
    assert inode("a") == inode("b") != inode("c")
    spool.delete(3, "a")  # the first one
    hold(spool, "d", sender)
    hold(spool, "e", sender)
    assert inode("d") == inode("e"), "a copy for everybody"
    hold(spool, "d", sender)  # once more
    assert inode("d") == inode("e")
    assert held_by(spool) == ["b", "c", "d", "e"]
    assert all(torch.equal(t[n], START[n]) for _, t in spool.saved_jobs(4) for n in START)


def test_job_given_anew_takes_nothing_from_those_who_began_elsewhere(tmp_path):
    """One that came back is asked again, and for something else; its file had been shared, and the
    next to be late began from what the file held before."""
    spool, sender = Spool(tmp_path), Sender(START)
    hold(spool, "a", sender)
    hold(spool, "b", sender)
    hold(spool, "a", Sender({name: tensor + 9 for name, tensor in START.items()}))
    hold(spool, "c", sender)
    starts = {held.client.id: tensors["stages.9.w"] for held, tensors in spool.saved_jobs(4)}
    assert torch.equal(starts["a"], START["stages.9.w"] + 9)
    for name in "bc":
        assert torch.equal(starts[name], START["stages.9.w"])


def test_file_system_without_hard_links_holds_copies(tmp_path, monkeypatch):
    def no_links(*args: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    spool, sender = Spool(tmp_path), Sender(START)
    for name in ("a", "b", "b"):
        hold(spool, name, sender)
    assert held_by(spool) == ["a", "b"]


@pytest.mark.parametrize("damage", ["base gone", "base short", "base zeros", "seat", "huge"])
def test_damaged_job_is_left_out(tmp_path, damage, caplog):
    spool = Spool(tmp_path)
    hold(spool, "a")
    hold(spool, "b")
    base, open_job = tmp_path / "0000000003-a.base", tmp_path / "0000000003-a.seat"
    if damage == "base gone":
        base.unlink()
    elif damage == "seat":
        open_job.write_bytes(open_job.read_bytes()[:-9])
    elif damage == "huge":
        open_job.write_bytes(open_job.read_bytes().replace(b"[2]", b"[2000000000]"))
    else:  # as a power cut leaves it
        size = base.stat().st_size
        base.unlink()  # it is b's, too
        base.write_bytes(bytes(size - (damage == "base short")))
    assert held_by(spool) == ["b"]
    assert "0000000003-a.seat is left out" in caplog.text


def test_nothing_is_left_of_a_job_that_was_forgotten(tmp_path):
    spool = Spool(tmp_path)
    for _ in range(2):
        keep(spool)
        hold(spool)
        spool.delete(3, "a")
        assert files(spool) == []
    keep(spool)
    hold(spool)
    spool.delete_before(4, set())
    assert files(spool) == ["free-0000000003-a.data"]


def test_job_that_finds_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match=r"a\.seat cannot be written: .*No space") as caught:
        hold(Spool(tmp_path))
    one_line(caught.value)
