"""A real training process that is killed, by hand and by the kernel."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_sdk.agent.pipe import TrainerOptions
from edge_sdk.agent.trainer_process import Ending, TrainerProcess
from edge_sdk.hardware.procfs import cgroups
from tests.support.processes import ROOT

GROUPS = Path("/sys/fs/cgroup/memory")
LIMIT = 200 * 1024**2
GREEDY = "held = []\nwhile True:\n    held.append(b'x' * 1024**2)\n"
# An agent's part: start a trainer, hear that it has ended, say how.
AGENT = """
import sys
from edge_sdk.agent.pipe import TrainerOptions
from edge_sdk.agent.trainer_process import TrainerProcess
options = TrainerOptions(data="none", imports=("greedy",))
process = TrainerProcess(options, sys.argv[1:])
try:
    process.receive()
except (EOFError, OSError):
    print(process.wait_for_end())
"""


def test_one_killed_by_hand_was_not_too_large():
    process = TrainerProcess(TrainerOptions(data="none"))
    process.look_at_memory()
    os.kill(process.pid, signal.SIGKILL)
    with pytest.raises((EOFError, OSError)):
        process.receive()
    how = "was killed by signal 9, and memory was not short"
    assert process.wait_for_end() == Ending(how, False, -signal.SIGKILL)


@pytest.fixture
def small_group():
    """A control group with little memory, whichever version this system has."""
    if os.geteuid():
        pytest.skip("a control group takes root rights")
    is_first = (GROUPS / "memory.limit_in_bytes").exists()
    above = GROUPS if is_first else cgroups(Path("/"), "")[-1]
    group = above / f"edge-sdk-killed-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if is_first else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(LIMIT))
    except OSError as error:
        pytest.skip(f"no control group can be limited here: {error}")
    yield group
    group.rmdir()


@pytest.mark.root
def test_one_killed_by_the_kernel_was_too_large(small_group, tmp_path):
    (tmp_path / "greedy.py").write_text(GREEDY)
    enter = f'echo $$ > {small_group}/cgroup.procs && exec "$@"'
    agent = [sys.executable, "-c", AGENT, str(tmp_path), str(ROOT)]
    done = subprocess.run(
        ["sh", "-c", enter, "sh", *agent],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=False,
    )
    how = "was killed by signal 9, most likely for memory"
    assert done.stdout == f"{Ending(how, True, -signal.SIGKILL)}\n", done.stderr
