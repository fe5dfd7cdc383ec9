"""A model family with a mistake, on the command lines: one line, and no run."""

from __future__ import annotations

import importlib
import sys

import pytest

from coordinator.cli.main import main
from edge_sdk.cli.main import main as device_main
from tests.support.commands import status_of
from tests.support.mistakes import LINES

MODULE = "tests.support.mistaken_families"
EMULATE = ["emulate", "--data", "digits", "--examples", "60", "--clients", "3", "--groups", "1,1,1"]


@pytest.fixture(autouse=True)
def mistaken(own_things, monkeypatch):
    """Known in these tests only."""
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    importlib.import_module(MODULE)


@pytest.mark.parametrize("mistake", LINES)
def test_emulate_begins_no_run(tmp_path, capsys, mistake):
    flags = ["--run-dir", str(tmp_path / "run"), "--import", MODULE, "--model", mistake]
    assert status_of(main, [*EMULATE, *flags]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith(f"edge-coordinator: family '{mistake}': ")
    assert list(tmp_path.iterdir()) == []


def test_serve_listens_to_nobody(tmp_path, capsys):
    flags = ["--run-dir", str(tmp_path / "run"), "--insecure", "--input", "4", "--classes", "3"]
    more = ["--import", MODULE, "--model", "one-head", "--listen", "tcp://127.0.0.1:0"]
    assert status_of(main, ["serve", *flags, *more]) in (1, 2)
    assert "exits.0.0.weight and exits.1.0.weight are one tensor" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mistake", ["raises", "tuple", "one-head", "lazy"])
def test_plan_measures_nothing(capsys, mistake):
    flags = ["--input", "4", "--classes", "3", "--import", MODULE, "--model", mistake]
    assert status_of(device_main, ["plan", *flags]) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"edge-sdk: family '{mistake}': ")
