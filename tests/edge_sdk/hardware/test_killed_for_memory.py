"""Whether a killed process was killed for memory, from files laid out by hand and for real."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_sdk.hardware.killed_for_memory import MemoryLook, kills, look, was_for_memory
from tests.edge_sdk.hardware.test_memory_pressure import lay_out

MB = 10**6


def test_kills_in_a_group_of_version_2(tmp_path):
    """Its own counts, not those of the groups above it or of other containers on this machine."""
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "0::/system.slice/edge.service",
            "sys/fs/cgroup/system.slice/memory.events": "low 0\noom 9\noom_kill 9\n",
            "sys/fs/cgroup/system.slice/edge.service/memory.events": "oom 3\noom_kill 2\n",
            "proc/vmstat": "oom_kill 40\n",
        },
    )
    assert kills(tmp_path) == 2


def test_kills_in_a_group_of_version_1(tmp_path):
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/edge\n0::/",
            "sys/fs/cgroup/memory/edge/memory.oom_control": "under_oom 0\noom_kill 5\n",
            "proc/vmstat": "oom_kill 40\n",
        },
    )
    assert kills(tmp_path) == 5


@pytest.mark.parametrize(
    ("vmstat", "expected"),
    [("pgfault 3\noom_kill 40\npgmajfault 2\n", 40), ("pgfault 3\n", None), ("", None)],
)
def test_kills_where_no_group_counts(tmp_path, vmstat, expected):
    """A group of version 1 counts them since Linux 4.13, like the whole system."""
    oom_control = "oom_kill_disable 0\nunder_oom 0\n"
    lay_out(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/\n0::/",
            "sys/fs/cgroup/memory/memory.oom_control": oom_control,
            "proc/vmstat": vmstat,
        },
    )
    assert kills(tmp_path) == expected


def test_look(tmp_path):
    """(300 - 50) pages of its own; of 100 MiB available 4 are spared."""
    meminfo = "MemTotal: 204800 kB\nMemAvailable: 102400 kB\n"
    lay_out(tmp_path, {"proc/42/statm": "900 300 50 1 0 1 0\n", "proc/meminfo": meminfo})
    page = os.sysconf("SC_PAGE_SIZE")
    assert look(42, tmp_path) == MemoryLook(None, 96 * 1024**2, 250 * page)
    assert look(43, tmp_path) == MemoryLook(None, 96 * 1024**2, 0)


def test_look_at_a_real_process():
    if not Path("/proc/self/statm").exists():
        pytest.skip("this system has no /proc")
    assert look(os.getpid()).held_bytes > MB


@pytest.mark.parametrize(
    ("before", "after", "left", "held", "expected"),
    [
        (3, 4, 8000 * MB, 300 * MB, True),  # the kernel killed somebody of this group
        (3, 3, 8000 * MB, 300 * MB, False),
        (3, 3, 200 * MB, 300 * MB, False),  # as it is on a board that trains
        (3, 3, 100 * MB, 300 * MB, True),  # another killer, at a tenth of 1 GB
        (None, None, 8000 * MB, 300 * MB, False),
        (None, None, 500 * MB, 300 * MB, True),  # nobody counts, and it may have wanted more
        (None, None, 700 * MB, 300 * MB, False),
        (3, 3, 100 * MB, 0, False),  # it had only begun
    ],
)
def test_which_kills_were_for_memory(before, after, left, held, expected):
    assert was_for_memory(MemoryLook(before, left, held), after) is expected
