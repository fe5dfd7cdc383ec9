"""`edge-coordinator serve` and `edge-sdk run`: flags, keys and folders are checked before anything
begins; what is wrong is one line."""

from __future__ import annotations

import os
import socket
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from coordinator.cli.main import main as coordinate
from coordinator.store.lock import RunLock
from edge_sdk.data.loading import save_shard
from tests.support.commands import status_of
from tests.support.examples import one_line
from tests.support.processes import World, run_cli


@pytest.fixture
def lone(tmp_path):
    """One device and a coordinator, nothing started."""
    with World(tmp_path, num_devices=1) as world:
        yield world


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda home: (home / "device.secret").unlink(), "device.secret cannot be read"),
        (lambda home: (home / "device.public").unlink(), "device.public cannot be read"),
        (lambda home: (home / "server.public").unlink(), "server.public cannot be read"),
        (lambda home: (home / "device.secret").chmod(0o644), "chmod 600"),
        (lambda home: (home / "device.secret").write_text("no key"), "device.secret holds no key"),
    ],
    ids=["no secret", "no public", "no server", "readable by others", "not a key"],
)
def test_device_keys_are_checked(lone, spoil, said):
    spoil(lone.folder / "a")
    ended = run_cli("edge_sdk.cli", *lone.device_flags("a"))
    assert ended.returncode == 1
    assert said in one_line(ended.stderr, "edge-sdk")


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--coordinator", "localhost:5555"], 2, "tcp://HOST:PORT"),
        (["--coordinator", "http://localhost:5555"], 2, "tcp://HOST:PORT"),
        (["--coordinator", "tcp://localhost"], 2, "tcp://HOST:PORT"),
        (["--coordinator", "tcp://localhost:99999"], 2, "1 to 65535"),
        (["--board", "abacus", "--host-gflops", "1"], 2, "raspberry-pi-4"),
        (["--id", "../../etc"], 2, "--id"),
        (["--server-key", "short"], 1, "--server-key"),
        (["--data", "nowhere.npz"], 1, "nowhere.npz"),
        (["--import", "no_such_module"], 1, "--import no_such_module: No module named"),
        (["--device", "meta"], 2, "--device: 'meta', expected cpu, cuda or cuda:N"),
        (["--memory-cap", "much"], 2, "512M"),
        (["--threads", "99999999999999999999"], 2, "from 0 to 1024"),
        (["--keys", ""], 2, "expected a path"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_device_flags_are_checked(lone, flags, status, said):
    ended = run_cli("edge_sdk.cli", *lone.device_flags("a", *flags))
    assert ended.returncode == status, ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("edge-sdk")
    assert ended.stderr.count("\n") == 1


def test_a_tiny_shard_is_refused_by_its_own_device(lone):
    save_shard(lone.folder / "a" / "data.npz", lone.shards["a"].take(np.arange(2)))
    ended = run_cli("edge_sdk.cli", *lone.device_flags("a"))
    assert ended.returncode == 1
    assert "2 examples, at least 3" in one_line(ended.stderr, "edge-sdk")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "resnet99"], "known: cnn, "),
        (["--option", "depth=3"], "no option depth"),
        (["--listen", "5555"], "tcp://HOST:PORT"),
        (["--listen", "tcp://203.0.113.7:5555"], "cannot listen on tcp://203.0.113.7:5555"),
        (["--test", "nowhere.npz"], "nowhere.npz"),
        (["--clients-file", "nowhere"], "clients add"),
        (["--quorum", "2"], "quorum"),
        (["--resume"], "holds no run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_coordinator_flags_are_checked_before_a_run_begins(lone, capsys, flags, said):
    is_typed = flags[0] in ("--model", "--option", "--quorum") or flags[1:] == ["5555"]
    assert status_of(coordinate, lone.serve_flags(*flags)) == 1 + is_typed
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == 1
    assert not (lone.run_dir / "run.sqlite").exists(), "nothing was begun"


def test_coordinator_keys_and_port_are_checked(lone, capsys):
    secret = lone.keys / "server.secret"
    with socket.create_server(("127.0.0.1", lone.port)):
        assert coordinate(lone.serve_flags()) == 1
    assert "is another coordinator running there?" in one_line(
        capsys.readouterr().err, "edge-coordinator"
    )
    secret.chmod(0o640)
    assert coordinate(lone.serve_flags()) == 1
    assert f"chmod 600 {secret}" in one_line(capsys.readouterr().err, "edge-coordinator")
    secret.unlink()
    assert coordinate(lone.serve_flags()) == 1
    assert "server.secret cannot be read" in one_line(capsys.readouterr().err, "edge-coordinator")
    assert not lone.run_dir.exists(), "nothing was begun"


def test_a_run_that_lives_is_named_before_its_port(lone, capsys):
    assert coordinate(lone.serve_flags("--give-up-after", "0.1")) == 3
    capsys.readouterr()
    holder = RunLock(lone.run_dir)
    with socket.create_server(("127.0.0.1", lone.port)):
        assert coordinate(lone.serve_flags("--resume")) == 1
    said = f"{lone.run_dir} is in use by process {os.getpid()}; stop it first"
    assert said in one_line(capsys.readouterr().err, "edge-coordinator")
    holder.release()


def test_a_run_folder_is_resumed_only_as_it_was_begun(lone, capsys):
    coordinate(
        [
            "emulate",
            "--data",
            str(lone.folder / "test.npz"),
            "--clients",
            "2",
            "--groups",
            "2",
            "--rounds",
            "1",
            "--run-dir",
            str(lone.run_dir),
        ]
    )
    capsys.readouterr()
    assert coordinate(lone.serve_flags()) == 1
    assert "holds a run already" in one_line(capsys.readouterr().err, "edge-coordinator")
    assert coordinate(lone.serve_flags("--resume")) == 1
    assert "started with other settings" in one_line(capsys.readouterr().err, "edge-coordinator")
    with closing(sqlite3.connect(lone.run_dir / "run.sqlite")) as db, db:
        db.execute("UPDATE runs SET version = 99")
    assert coordinate(lone.serve_flags("--resume")) == 1
    assert "run format 99" in one_line(capsys.readouterr().err, "edge-coordinator")
    (lone.run_dir / "run.sqlite").write_bytes(b"not a database, " * 100)
    assert coordinate(lone.serve_flags("--resume")) == 1
    assert "not a run's database" in one_line(capsys.readouterr().err, "edge-coordinator")
