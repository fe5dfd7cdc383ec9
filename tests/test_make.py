"""The Makefile as a newcomer meets it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TARGETS = re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


def make(*words: str) -> str:
    done = subprocess.run(
        ["make", "--no-print-directory", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_alone_lists_every_target_in_one_line():
    lines = make().splitlines()
    assert make("help").splitlines() == lines
    assert [line.split()[:2] for line in lines] == [["make", target] for target in TARGETS]
    assert {"venv", "testbed", "test", "lint"} < set(TARGETS)
    assert all(len(line.split()) > 3 for line in lines), "each says what it does"
    assert max(map(len, lines)) <= 100


def test_installing_says_what_and_how_long_before_it_begins(tmp_path):
    """Told, not done: into a folder that is not there."""
    commands = make("--dry-run", "venv", f"VENV={tmp_path / 'venv'}").splitlines()
    said = [number for number, line in enumerate(commands) if line.startswith("echo")]
    installs = next(number for number, line in enumerate(commands) if "pip install" in line)
    first = commands[said[0]]
    assert said[0] < installs
    assert "torch" in first
    assert "minutes" in first
