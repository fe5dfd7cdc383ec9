"""A run's folder that may only be read: looked at all the same, and not gone on with."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.cli.main import main as coordinate
from coordinator.store.opening import open_store
from coordinator.store.store import Store
from edge_sdk.errors import StoreError
from edge_sdk.infer.model_folder import read_model
from tests.coordinator.store.test_reader import writer
from tests.support.examples import config, one_line
from tests.support.other_user import not_allowed_to_write
from tests.support.processes import ROOT
from tests.support.recorded_run import record_run
from tests.support.run_states import finished_run
from tools.testbed.report import main as report


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run"
    finished_run(folder)
    return folder


def test_a_model_is_exported_from_a_folder_that_may_only_be_read(folder, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    out.chmod(0o777)
    export = ["export", "--run", str(folder), "--out"]
    assert coordinate([*export, str(out / "own")]) == 0  # imports what the other may not read
    before = sorted(folder.iterdir())
    with not_allowed_to_write(folder):
        assert coordinate([*export, str(out / "m")]) == 0, capsys.readouterr().err
        assert read_model(out / "m").spec.exit == 3
    assert sorted(folder.iterdir()) == before


def test_its_report_is_printed(tmp_path, capsys):
    folder = tmp_path / "run"
    store = record_run(folder)
    with not_allowed_to_write(folder):
        assert report([str(folder)]) == 0, "in progress"
    store.close()
    for name in ("run.sqlite-wal", "run.sqlite-shm"):
        assert not (folder / name).exists()
    with not_allowed_to_write(folder):
        assert report([str(folder)]) == 0
    assert capsys.readouterr().out.count("3 of 5 rounds finished") == 2
    (folder / "run.sqlite-wal").touch()
    with not_allowed_to_write(folder):
        assert report([str(folder)]) == 0, "an empty log says nothing"


def test_it_is_not_gone_on_with(folder):
    with not_allowed_to_write(folder), pytest.raises(StoreError) as refused:
        open_store(folder, config("owners-mean", rounds=3, eval_every=2), "emulate", True)
    said = str(refused.value)
    assert said.startswith(f"{folder} cannot be written: ")
    assert said.endswith("give this user the right to write there, then go on with --resume")


def test_a_log_that_cannot_be_read_there_is_not_left_out(folder, tmp_path):
    """A killed run's, without its index, which SQLite would have to make."""
    killed = tmp_path / "killed"
    killed.mkdir()
    with contextlib.closing(writer(folder)):
        for name in ("run.sqlite", "run.sqlite-wal"):
            (killed / name).write_bytes((folder / name).read_bytes())
    with (
        not_allowed_to_write(killed),
        pytest.raises(StoreError, match=r"cannot be read: .* copy the folder to where you may"),
    ):
        Store.open_readonly(killed)
    store = Store.open_readonly(killed)
    assert store.next_round() == 78
    store.close()


def test_a_read_only_file_system(folder, tmp_path):
    """For root too."""
    mount = f"mount --bind {folder} {folder} && mount -o remount,ro,bind {folder}"
    bound = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$@"', "sh"]
    try:
        able = subprocess.run([*bound, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        able = False
    if not able:
        pytest.skip("a folder cannot be bound read-only: needs root and unshare")

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*bound, sys.executable, *command],
            capture_output=True,
            text=True,
            check=False,
            cwd=ROOT,
        )

    ended = run("-m", "tools.testbed.report", str(folder))
    assert ended.returncode == 0, ended.stderr
    coordinator = ("-m", "coordinator.cli")
    ended = run(*coordinator, "export", "--run", str(folder), "--out", str(tmp_path / "m"))
    assert ended.returncode == 0, ended.stderr
    source = ("--data", "digits", "--clients", "2", "--groups", "2", "--rounds", "3")
    ended = run(*coordinator, "emulate", *source, "--resume", "--run-dir", str(folder))
    assert ended.returncode == 1
    assert f"{folder} cannot be written" in one_line(ended.stderr, "edge-coordinator")


def test_what_holds_no_run_is_not_asked_to_be_resumed(tmp_path, capsys):
    out = str(tmp_path / "m")
    assert coordinate(["export", "--run", str(tmp_path / "nowhere"), "--out", out]) == 1
    said = one_line(capsys.readouterr().err, "edge-coordinator")
    assert said.endswith("nowhere holds no run; give the --run-dir of a run\n")


def test_a_database_of_nothing_is_still_told(tmp_path, capsys):
    Path(tmp_path / "run.sqlite").write_bytes(b"not a database, " * 100)
    for open_run in (Store.open_readonly, Store.resume):
        with pytest.raises(StoreError, match=r"is not a run's database: file is not a database"):
            open_run(tmp_path)
