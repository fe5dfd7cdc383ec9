"""The run folder: what is kept, when it is final, what a kill or a full disk leaves."""

from __future__ import annotations

import errno
import os
import sqlite3
from pathlib import Path

import pytest
import torch

from coordinator.cohorts.base import Absence
from coordinator.methods.base import Metrics
from coordinator.store import checkpoints
from coordinator.store.store import BEGUN, Store
from edge_sdk.errors import StoreError
from edge_sdk.protocol.messages import ExitResult, Phase, Segment
from tests.support.examples import client, client_update, cnn, config


def update(who, **changes):
    segments = (Segment(first=1, last=1), Segment(first=3, last=3))
    settings = {
        "num_examples": 10,
        "num_steps": 2,
        "exits": (ExitResult(exit=1, loss=0.5, metric=0.75),),
        "phases": {"train": Phase(wall_s=2.0, cpu_s=1.5), "wait": Phase(wall_s=3.0)},
        "bytes_down": 100,
        "bytes_up": 40,
        "retries": 1,
    }
    return client_update(who, {}, segments, **(settings | changes))


def commit(store, number, state=None, results=()):
    passed = list(store.record_results(number, results))
    metrics = Metrics({"accuracy_exit_1": 0.5}, {"fit": Phase(wall_s=1.0, cpu_s=0.5)})
    tensors = {"w": torch.tensor([float(number)])} if state is None else state
    return passed, store.commit(number, metrics, tensors, "2026-01-01T00:00:00", 4.0)


def test_round_is_recorded_as_it_was(tmp_path):
    store = Store.create(tmp_path / "run", config("owners-mean"), "emulate")
    a, b, c = client("a", 1), client("b", 2), client("c", 3)
    store.record_clients([a, b, c])
    late = Absence(b, (Segment(first=1, last=2),), "straggler", "late", "did not return")
    gone = Absence(c, (Segment(first=1, last=3),), "failed", "gone", "killed", 7, 0)
    passed, totals = commit(store, 1, results=[update(a), late, gone])
    assert [u.client.id for u in passed] == ["a"], "a method sees updates only"
    assert (totals.returned, totals.stragglers, totals.failures) == (1, 1, 1)
    assert (totals.bytes_down, totals.bytes_up, totals.retries) == (107, 40, 1)
    rows = store._db.execute("SELECT client_id, segments FROM participations ORDER BY client_id")
    assert rows.fetchall() == [("a", "1-1,3-3"), ("b", "1-2"), ("c", "1-3")]
    (row,) = store.history()
    assert row["accuracy"] == [0.5]
    assert row["seconds"]["train"] == 1.5, "CPU seconds where measured"
    assert row["seconds"]["wait"] == 3.0, "else wall clock"
    assert row["seconds"]["checkpoint"] > 0
    store.close()


def test_resume_goes_on_after_the_last_round(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    assert store.next_round() == 1
    assert store.load_checkpoint() is None
    for number in (1, 2, 3):
        commit(store, number)
    store.close()
    again = Store.resume(tmp_path)
    assert again.next_round() == 4
    assert again.load_checkpoint()["w"].item() == 3.0
    assert again.config == config("owners-mean")
    assert again.run == store.run
    assert len(list(tmp_path.glob("round-*.safetensors"))) == 2, "the newest two are kept"
    again.close()


def test_what_was_not_committed_is_not_there(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)
    list(store.record_results(2, [update(client("a", 1))]))
    store._db.close()  # killed here
    again = Store.resume(tmp_path)
    assert again.next_round() == 2
    count = again._db.execute("SELECT COUNT(*) FROM participations").fetchone()[0]
    assert count == 0
    commit(again, 2, results=[update(client("a", 1))])
    again.close()


@pytest.mark.parametrize("where", ["checkpoint", "rename"])
def test_full_disk_keeps_the_last_round(tmp_path, monkeypatch, where):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"checkpoint": (checkpoints, "save_file"), "rename": (os, "replace")}
    monkeypatch.setattr(*target[where], full)
    with pytest.raises(StoreError, match=r"round 2 .*No space left.*--resume at round 2"):
        commit(store, 2)
    with pytest.raises(StoreError, match=r"model\.safetensors cannot be written: .*No space left"):
        store.write_model(cnn(), {"w": torch.zeros(1)})
    monkeypatch.undo()
    assert store.next_round() == 2
    assert store.load_checkpoint()["w"].item() == 1.0
    assert not list(tmp_path.glob("*.new"))
    commit(store, 2)  # space was made
    assert store.next_round() == 3
    store.close()


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    """Its place taken by a plain file, below which not even deleting works."""
    store = Store.create(tmp_path / "run", config("owners-mean"), "serve")
    commit(store, 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").write_text("")
    with pytest.raises(StoreError, match=r"round 2 could not be saved in .*Not a directory"):
        commit(store, 2)
    with pytest.raises(
        StoreError, match=r"model\.safetensors cannot be written: .*Not a directory"
    ):
        store.write_model(cnn(), {"w": torch.zeros(1)})
    store.close()


def test_a_read_only_disk_is_one_line(tmp_path, monkeypatch):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)

    def refused(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoints, "save_file", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(StoreError, match=r"round 2 .*Read-only file system.*--resume at round 2"):
        commit(store, 2)
    store.close()


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)
    (tmp_path / "round-000001.safetensors").unlink()
    (tmp_path / "round-000001.safetensors").mkdir()
    commit(store, 2)
    commit(store, 3)
    assert store.next_round() == 4
    store.close()


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_every_file_has_the_mode_that_the_umask_allows(tmp_path, mask):
    before = os.umask(mask)
    try:
        store = Store.create(tmp_path, config("owners-mean"), "serve")
        commit(store, 1)
        store.write_model(cnn(), {"w": torch.zeros(1)})
        (tmp_path / "plain").touch()
        store.close()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    for name in ("round-000001.safetensors", "model.safetensors"):
        assert modes[name] == modes["plain"] == 0o666 & ~mask


def test_what_a_kill_while_writing_left_is_deleted(tmp_path):
    """The draft of safetensors, and ours, by a run that goes on; not by who only reads."""
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)
    store.close()
    for name in (".tmpa1B2c3", ".round-000002.safetensors.0.new", ".tmp-of-somebody"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / ".round-000002.safetensors.0.new").chmod(0o600)
    again = Store.resume(tmp_path)
    assert (tmp_path / ".tmpa1B2c3").exists(), "the run may be in progress: its own draft"
    commit(again, 2)
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".tmp-of-somebody",
        "round-000001.safetensors",
        "round-000002.safetensors",
        "run.sqlite",
    ]
    plain = (tmp_path / ".tmp-of-somebody").stat().st_mode
    assert (tmp_path / "round-000002.safetensors").stat().st_mode == plain


def test_truncated_checkpoint_is_a_clear_error(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)
    (tmp_path / "round-000001.safetensors").write_bytes(b"abc")
    with pytest.raises(StoreError, match="cannot be read"):
        store.load_checkpoint()
    store.close()


def test_a_deleted_run_leaves_nothing_behind(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    for number in (1, 2, 3):
        commit(store, number)
    for end in ("-wal", "-shm"):  # as a kill leaves them
        (tmp_path / f"run.sqlite{end}").rename(tmp_path / f"kept{end}")
    store.close()
    (tmp_path / "run.sqlite").unlink()
    for end in ("-wal", "-shm"):
        (tmp_path / f"kept{end}").rename(tmp_path / f"run.sqlite{end}")
    fresh = Store.create(tmp_path, config("owners-mean"), "serve")
    assert fresh.next_round() == 1
    commit(fresh, 1)
    commit(fresh, 2)
    assert fresh.load_checkpoint()["w"].item() == 2.0, "old checkpoints do not push new ones out"
    fresh.close()


def test_wrong_folders_say_so(tmp_path):
    with pytest.raises(StoreError, match="holds no run"):
        Store.resume(tmp_path / "nothing")
    Store.create(tmp_path / "a", config("owners-mean"), "serve").close()
    with pytest.raises(StoreError, match="--resume"):
        Store.create(tmp_path / "a", config("owners-mean"), "serve")
    db = sqlite3.connect(tmp_path / "a" / "run.sqlite")
    with db:
        db.execute("UPDATE runs SET version = 99")
    db.close()
    with pytest.raises(StoreError, match="format 99, this is format 6"):
        Store.resume(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError):
        Store.resume(tmp_path / "b")


def test_a_folder_that_cannot_be_looked_at_is_one_line(tmp_path):
    long = tmp_path / ("x" * 300)  # of no file system's names: even root cannot look at it
    for open_run in (Store.resume, lambda path: Store.create(path, config("owners-mean"), "serve")):
        with pytest.raises(StoreError, match="cannot be looked at: File name too long; give"):
            open_run(long)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot start a run"):
        Store.create(tmp_path / "file" / "run", config("owners-mean"), "serve")


# -- rounds that were begun, and who counted ---------------------------------------------------


def test_participants_of_a_round_outlive_a_kill(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    a, b = client("a", 1), client("b", 2)
    assert store.participants_of(1) == ([], 0)
    store.begin(1, [a])
    store.begin(1, [b])  # of the same round, which lacked updates
    store._db.close()  # killed here
    again = Store.resume(tmp_path)
    assert again.participants_of(2) == ([], 0), "of another round"
    assert again.participants_of(1) == ([a, b], 1), "one was chosen"
    again.begin(1, [a, b])
    assert again.participants_of(1)[1] == 1
    _, totals = commit(again, 1)
    assert totals.chosen == 2
    assert again.participants_of(2) == ([], 0)
    again.begin(2, [b])
    _, totals = commit(again, 2)
    assert totals.chosen == 1, "of this round only"
    again.close()


def test_begun_round_that_cannot_be_read_begins_anew(tmp_path, caplog):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    store.begin(1, [client("a", 1)])
    path = tmp_path / BEGUN
    path.write_bytes(path.read_bytes()[:-2])
    assert store.participants_of(1) == ([], 0)
    assert "the round begins anew" in caplog.text
    store.close()


def test_full_disk_as_a_round_begins_is_one_line(tmp_path, monkeypatch):
    store = Store.create(tmp_path, config("owners-mean"), "serve")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StoreError, match=r"begun.json .*No space left.*--resume at round 1") as it:
        store.begin(1, [client("a", 1)])
    assert "\n" not in str(it.value)
    store.close()


def test_job_was_counted_once_its_round_is_committed(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    list(store.record_results(1, [update(client("a", 1), job="1" * 32, digest="d" * 32)]))
    assert not store.was_counted("1" * 32), "not final yet"
    commit(store, 1)
    assert store.was_counted("1" * 32)
    assert not store.was_counted("2" * 32)
    assert not store.was_counted("")
    store.close()


def test_late_update_and_the_own_one_of_a_client_are_both_recorded(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    a = client("a", 1)
    late = update(a, job="1" * 32, round=1, staleness=1)
    failed = Absence(a, (Segment(first=1, last=2),), "failed", "gone", "left")
    own = update(a, job="2" * 32, round=2)
    passed, totals = commit(store, 2, results=[late, failed, own])
    assert [u.staleness for u in passed] == [1, 0]
    assert (totals.returned, totals.failures) == (1, 0), "it failed, and returned when asked again"
    assert totals.stale == 1
    assert store.was_counted("1" * 32)
    assert store.was_counted("2" * 32)
    store.close()
