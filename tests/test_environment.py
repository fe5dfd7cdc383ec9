"""Both commands where the environment lacks something: a home, or characters beyond ASCII."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT

# A user id without an entry in passwd, as in a container, and no HOME.
HOMELESS = """
import pwd, sys
def unknown(uid):
    raise KeyError(uid)
pwd.getpwuid = unknown
from {module}.__main__ import main
sys.argv = [{name!r}, *sys.argv[1:]]
sys.exit(main())
"""
NAMED = ("HOME", "XDG_CACHE_HOME", "STATE_DIRECTORY", "CACHE_DIRECTORY")
MODULES = {"edge-sdk": "edge_sdk.cli", "edge-coordinator": "coordinator.cli"}
PLAN = ["plan", "--model", "cnn", "--input", "1x8x8", "--classes", "3"]


def homeless(
    folder: Path, name: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(NAMED)}
    return subprocess.run(
        [sys.executable, "-c", HOMELESS.format(module=MODULES[name], name=name), *arguments],
        env=inherited | {"PYTHONPATH": str(ROOT)} | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("edge-sdk", ["--version"]),
        ("edge-sdk", ["--help"]),
        ("edge-sdk", ["run", "--help"]),
        ("edge-sdk", ["join", "--help"]),
        ("edge-sdk", ["keys", "--keys", "k", "--id", "a"]),
        ("edge-sdk", ["measure"]),
        ("edge-sdk", [*PLAN, "--board", "raspberry-pi-4"]),
        ("edge-coordinator", ["--version"]),
        ("edge-coordinator", ["keys"]),
        ("edge-coordinator", ["serve", "--help"]),
    ],
    ids=str,
)
def test_what_needs_no_home_works_without_one(tmp_path, name, arguments):
    done = homeless(tmp_path, name, *arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["keys", "--id", "a"],
        ["measure", "--save", "mine"],
        ["doctor"],
        ["run", "--coordinator", "tcp://127.0.0.1:1", "--data", "digits", "--id", "a"],
        ["run", "--insecure", "--coordinator", "tcp://127.0.0.1:1", "--data", "digits"],
    ],
    ids=str,
)
def test_what_needs_a_home_is_one_line_without_one(tmp_path, arguments):
    done = homeless(tmp_path, "edge-sdk", *arguments)
    assert done.returncode == 1
    said = "edge-sdk: no home directory; set HOME, or give --keys and XDG_CACHE_HOME\n"
    assert done.stderr.endswith(said)
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "no folder named ~"


def test_a_device_runs_without_a_home_that_has_a_cache(tmp_path):
    arguments = ["--coordinator", "tcp://127.0.0.1:1", "--data", "nowhere.npz", "--id", "a"]
    cache = str(tmp_path / "cache")
    done = homeless(tmp_path, "edge-sdk", "run", "--insecure", *arguments, XDG_CACHE_HOME=cache)
    assert "nowhere.npz" in done.stderr, "its trainer was started"
    assert "no home" not in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "cp437", "latin-1"])
def test_a_terminal_of_few_characters_gets_what_it_can_show(encoding):
    done = subprocess.run(
        [sys.executable, "-m", "edge_sdk.cli", *PLAN],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (row,) = [line for line in done.stdout.splitlines() if line.startswith(b"exit 1 ")]
    sign = "±".encode(encoding, "replace")
    assert b" MiB " + sign + b" " in row


def test_a_name_that_the_terminal_cannot_show_ends_no_command(tmp_path):
    """Also half a character, as in a path that is no UTF-8."""
    keys = os.fsencode(tmp_path) + b"/k\xff\xc3\xa9"
    for encoding in ("ascii", "utf-8"):
        done = subprocess.run(
            [sys.executable, "-m", "coordinator.cli", "keys", "--keys", keys + encoding.encode()],
            env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": encoding},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(b"wrote ")
