"""Programs that are started without standard input, output or error."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from tests.support.processes import ROOT, World, environment

ALL_CLOSED = 'exec "$0" "$@" <&- >&- 2>&-'
NULL = "/dev/null"
# Whatever is open was a regular file. What the program opens first comes behind the three.
PROGRAM = """
import os, sys
from edge_sdk.helpers.standard_streams import open_closed_streams
open_closed_streams()
open_closed_streams()  # again is harmless
print("printed")
print("said", file=sys.stderr)
read = sys.stdin.read()
found = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
first = os.open("/", os.O_RDONLY)
open(sys.argv[1], "w").write(repr((found, first, read)))
"""
CLIENT = """
import os, sys
own = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)  # takes a number that was free
assert own == 0
import numpy as np
from edge_sdk import Client
x, y = np.load("x.npy"), np.load("y.npy")
Client(sys.argv[2], data=(x, y), id="a", keys="a", threads=1).run()
"""


@pytest.mark.parametrize("is_open", list(product([True, False], repeat=3)))
def test_closed_streams_are_dev_null(tmp_path, is_open):
    (tmp_path / "0").write_text("to be read")
    ways = ["0<0" if is_open[0] else "0<&-"]
    ways += [f"{n}>{n}" if is_open[n] else f"{n}>&-" for n in (1, 2)]
    command = f'exec "$0" -c "$@" {" ".join(ways)}'
    path = {"PYTHONPATH": str(ROOT)}
    arguments = ["sh", "-c", command, sys.executable, PROGRAM, "told"]
    subprocess.run(arguments, cwd=tmp_path, env=path, timeout=60, check=True)
    wanted = [str(tmp_path / f"{n}") if is_open[n] else NULL for n in range(3)]
    said = "to be read" if is_open[0] else ""
    assert (tmp_path / "told").read_text() == repr((wanted, 3, said))
    for number, text in ((1, "printed\n"), (2, "said\n")):
        if is_open[number]:
            assert (tmp_path / str(number)).read_text() == text


@pytest.mark.slow
def test_a_run_of_programs_without_streams(tmp_path):
    """The commands and their trainer; what they would say goes nowhere, also not into a socket."""
    with World(tmp_path, 1) as world:
        program = ("sh", "-c", ALL_CLOSED, sys.executable, "-m")
        server = world.start(
            "coordinator", ["coordinator.cli", *world.serve_flags("--rounds", "1")], program
        )
        flags = world.device_flags("a", "--once")
        device = world.start("a", ["edge_sdk.cli", *flags], program)
        assert (server.end(), device.end()) == (0, 0)
        assert world.outcomes("a") == {1: "ok"}


@pytest.mark.slow
def test_a_client_in_a_program_without_streams(tmp_path):
    """A file of the program's that has number 0, 1 or 2 is left alone."""
    with World(tmp_path, 1) as world:
        server = world.serve("--rounds", "1")
        np.save(tmp_path / "x.npy", world.shards["a"].x)
        np.save(tmp_path / "y.npy", world.shards["a"].y)
        done = subprocess.run(
            ["sh", "-c", ALL_CLOSED, sys.executable, "-c", CLIENT, "own.txt", world.endpoint],
            cwd=tmp_path,
            env=environment(world.mark) | {"PYTHONPATH": str(ROOT)},
            timeout=120,
            check=False,
        )
        assert (server.end(), done.returncode) == (0, 0)
        assert Path(tmp_path / "own.txt").read_bytes() == b""
