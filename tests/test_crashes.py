"""A crash of native code in one of the tests' processes is one failed test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONFTEST = 'pytest_plugins = ["tests.support.crashes"]\n'
FILE = """
import os

def test_before():
    pass

def test_aborts():
    os.write(2, b"Assertion failed: of native code\\n")
    os.abort()

def test_after():
    pass

def test_fails():
    os.write(2, b"from native code\\n")
    assert 1 == 2
"""


def test_a_crash_is_a_failed_test_and_its_last_words_are_at_the_end(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_native.py").write_text(FILE)
    command = [sys.executable, "-m", "pytest", "-n", "1", "--capture", "sys"]
    outside = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [*command, str(tmp_path)],
        cwd=tmp_path,
        env=outside | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    failures, words = done.stdout.split("died; the end of its stderr")
    assert "crashed while running 'test_native.py::test_aborts'" in failures
    assert "from native code" in failures.partition("Stderr of the process")[2]
    assert "Assertion failed: of native code" in words
    assert "Fatal Python error: Aborted" in words
    assert "2 failed, 2 passed" in words
