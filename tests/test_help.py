"""What both commands say of themselves, and that they end quietly where nobody reads it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coordinator.cli import main as coordinate
from edge_sdk import __version__
from edge_sdk.cli import main as run_device
from edge_sdk.interrupts import ends_unread

MAINS = {"edge-sdk": run_device, "edge-coordinator": coordinate}


@pytest.mark.parametrize("name", MAINS)
def test_version(name, capsys):
    with pytest.raises(SystemExit) as ended:
        MAINS[name](["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{name} {__version__}\n"


@pytest.mark.parametrize("words", [
    ["edge_sdk.start", "doctor"], ["edge_sdk.start", "doctor", "--json"],
    ["edge_sdk.start", "--help"], ["coordinator.start", "serve", "--help"],
    ["coordinator.start", "--version"],
], ids=" ".join)  # fmt: skip
def test_a_closed_pipe_ends_a_command_quietly(words):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-m", *words], stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert done.stderr == b""
    assert done.returncode == (141 if "doctor" in words else 0)  # argparse passes over it


def test_another_broken_pipe_is_an_error():
    """Not this process's standard output, so it is not for us to keep quiet about."""

    @ends_unread
    def main(argv):
        raise BrokenPipeError("of a trainer")

    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        with pytest.raises(BrokenPipeError, match="of a trainer"):
            main([])
    os.close(reader)
