"""The last rounds, read from the database of a run that is finished, in progress or killed."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from coordinator.store.reader import client_rows, last_rounds, run_row
from coordinator.store.store import Store
from edge_sdk.errors import StoreError
from tests.support.other_user import not_allowed_to_write
from tests.support.run_states import finished_run


def test_the_last_rounds_of_a_finished_run(tmp_path):
    """Rounds 2 and 3 were evaluated."""
    folder = tmp_path / "run"
    finished_run(folder)
    rows = last_rounds(folder, 10)
    full = Store.resume(folder)
    history = full.history()
    full.close()
    assert [(row.round, len(row.metric)) for row in rows] == [(1, 0), (2, 3), (3, 3)]
    for row, entry in zip(rows, history, strict=True):
        assert list(row.metric) == entry["accuracy"]
        for name in ("wall_s", "chosen", "returned", "stragglers", "failures", "bytes_up"):
            assert getattr(row, name) == entry[name]
    assert [row.round for row in last_rounds(folder, 1)] == [history[-1]["round"]]
    assert last_rounds(folder, 0) == []


def test_reading_leaves_nothing_behind(tmp_path):
    folder = tmp_path / "run"
    finished_run(folder)
    before = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert last_rounds(folder, 5)
    with not_allowed_to_write(folder):
        assert last_rounds(folder, 5)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == before


def test_a_run_in_progress_is_read_also_by_who_may_not_write(tmp_path):
    """Its newest rows are in the log only."""
    folder = tmp_path / "run"
    finished_run(folder)
    with contextlib.closing(writer(folder)) as db:
        assert (folder / "run.sqlite-wal").stat().st_size
        assert last_rounds(folder, 1)[0].round == 77
        with not_allowed_to_write(folder):
            assert last_rounds(folder, 1)[0].round == 77
        db.execute("BEGIN IMMEDIATE")  # it is not waited for
        assert last_rounds(folder, 1)[0].round == 77


def test_a_killed_run_is_read_with_its_log(tmp_path):
    """As kill -9 leaves it: database, log and index are copied while they are in use."""
    folder, killed = tmp_path / "run", tmp_path / "killed"
    finished_run(folder)
    killed.mkdir()
    with contextlib.closing(writer(folder)):
        for name in ("run.sqlite", "run.sqlite-wal", "run.sqlite-shm"):
            (killed / name).write_bytes((folder / name).read_bytes())
    with not_allowed_to_write(killed):
        assert last_rounds(killed, 1)[0].round == 77
    (killed / "run.sqlite-shm").unlink()
    assert last_rounds(killed, 1)[0].round == 77


@pytest.mark.parametrize("is_left", [0.0, 0.3, 0.6])
def test_a_database_that_was_cut_is_said_to_be_damaged(tmp_path, is_left):
    folder = tmp_path / "run"
    finished_run(folder)
    whole = (folder / "run.sqlite").read_bytes()
    (folder / "run.sqlite").write_bytes(whole[: int(is_left * len(whole))])
    with pytest.raises(StoreError, match=r"cannot be read: .*; it is damaged: put back a copy"):
        last_rounds(folder, 5)
        client_rows(folder)


def test_no_database_is_made_by_looking(tmp_path):
    with pytest.raises(StoreError, match="run.sqlite is not there, so the run's rounds are not kn"):
        run_row(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_database_without_its_run_is_said_to_be_damaged(tmp_path):
    folder = tmp_path / "run"
    finished_run(folder)
    with contextlib.closing(sqlite3.connect(folder / "run.sqlite")) as db, db:
        db.execute("DELETE FROM runs")
    with pytest.raises(StoreError, match="cannot be read: it holds no run; it is damaged"):
        run_row(folder)


def writer(folder: Path) -> sqlite3.Connection:
    """Has committed round 77 to the log, and stays open."""
    db = sqlite3.connect(folder / "run.sqlite", isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    row = db.execute("SELECT * FROM rounds LIMIT 1").fetchone()
    marks = ", ".join("?" * len(row))
    db.execute(f"INSERT INTO rounds VALUES ({marks})", (77, *row[1:]))
    return db
