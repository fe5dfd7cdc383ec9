"""`edge-coordinator` in its first and last moments, each as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.edge_sdk.cli.test_main import SWALLOWED
from tests.support.processes import ROOT


def start(folder: Path, *arguments: str, **settings) -> subprocess.CompletedProcess[str]:
    path = f"{folder / 'path'}{os.pathsep}{ROOT}"
    return subprocess.run(
        [sys.executable, "-m", "coordinator.cli", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path},
        timeout=120,
        **settings,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["serve"],
        ["emulate"],
        ["export", "--run", "run", "--out", "model"],
        ["emulate", "--import", "torch"],
    ],
    ids=" ".join,
)
def test_ctrl_c_while_torch_is_imported_ends_it_quietly(tmp_path, arguments):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "torch.py").write_text(SWALLOWED)
    ended = start(tmp_path, *arguments)
    assert (ended.returncode, ended.stderr) == (130, "")


def test_ctrl_c_while_the_commands_are_imported_ends_it_quietly(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "msgspec.py").write_text("import signal; signal.raise_signal(2)")
    ended = start(tmp_path, "serve")
    assert (ended.returncode, ended.stderr) == (130, "")


def test_a_reader_of_the_status_may_go_away(tmp_path):
    """As `| head` does."""
    reader, writer = os.pipe()
    os.close(reader)
    (tmp_path / "run.sqlite").touch()
    ended = start(tmp_path, "status", "--run-dir", ".", stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, "")
