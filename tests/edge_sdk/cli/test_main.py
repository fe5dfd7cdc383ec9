"""The start of `edge-sdk` and `edge-coordinator`, before their own error handling is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.cli import systemd_unit
from tests.support.processes import ROOT

SWALLOWED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:  # as numpy does at times while torch imports it
    pass
raise ImportError("went on")
"""
INTERRUPTED = "import signal; signal.raise_signal(signal.SIGINT)"


def start(
    folder: Path, library: str, text: str, *arguments: str, module: str = "edge_sdk.cli"
) -> subprocess.CompletedProcess[str]:
    """`module` with a library that is not the real one."""
    (folder / f"{library}.py").write_text(text)
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("library", ["msgspec", "zmq"])
@pytest.mark.parametrize(
    "text",
    ["raise ModuleNotFoundError('No module named ...')", r"raise ImportError('libc.so.9:\n gone')"],
)
def test_a_library_that_is_not_there_is_one_line(tmp_path, library, text):
    done = start(tmp_path, library, text, "keys")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(("edge-sdk: No module named", "edge-sdk: libc.so.9: gone;"))
    assert line.endswith(f"; install its wheel again for {sys.executable}")


def test_a_coordinator_without_a_library_is_one_line(tmp_path):
    done = start(tmp_path, "msgspec", "raise ImportError('gone')", module="coordinator.cli")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("edge-coordinator: gone; this installation is not whole; ")


@pytest.mark.parametrize("module", ["edge_sdk.cli", "coordinator.cli"])
def test_ctrl_c_during_the_imports_ends_as_a_shell_expects(tmp_path, module):
    done = start(tmp_path, "msgspec", INTERRUPTED, module=module)
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["measure"],
        ["plan", "--model", "cnn", "--input", "1x8x8", "--classes", "10"],
    ],
    ids=" ".join,
)
def test_ctrl_c_while_torch_is_imported_ends_it_quietly(tmp_path, arguments):
    done = start(tmp_path, "torch", SWALLOWED, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["infer", "model"],
        ["calibrate", "model", "--accuracy-loss", "0.01"],
        ["infer-report", "model", "--out", "report"],
    ],
    ids=lambda words: words[0],
)
def test_ctrl_c_while_onnxruntime_is_imported_ends_it_quietly(tmp_path, arguments):
    done = start(tmp_path, "onnxruntime", SWALLOWED, *arguments, "--data", "x.npz")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise ModuleNotFoundError('No module named onnxruntime')", "which is not installed;"),
        (r"raise ImportError('libc.so.9:\n gone')", "which does not load: libc.so.9:\\n gone;"),
    ],
)
def test_an_onnxruntime_that_is_not_there_is_one_line(tmp_path, text, said):
    done = start(tmp_path, "onnxruntime", text, "infer", "model", "--data", "x.npz")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"inference needs onnxruntime, {said} pip install" in line


def test_help_comes_through(tmp_path):
    done = start(tmp_path, "unused", "", "--version")
    assert (done.returncode, done.stdout.split()[0]) == (0, "edge-sdk")


def test_the_command_and_the_service_begin_there(monkeypatch, tmp_path):
    project = (ROOT / "pyproject.toml").read_text()
    assert 'edge-sdk = "edge_sdk.cli.__main__:main"\n' in project
    monkeypatch.setattr(sys, "argv", ["program"])
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))  # no edge-sdk beside it
    assert systemd_unit.own_command()[1:] == ["-m", "edge_sdk.cli"]
