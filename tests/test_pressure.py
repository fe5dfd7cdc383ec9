"""Signs of a livelock for memory, from files laid out by hand and from a real process."""

import os
from pathlib import Path

import pytest

from edge_sdk.pressure import major_faults, stalled_share

STAT = "42 (a name) with) R 1 42 42 0 -1 4194304 100 0 {faults} 0 5 6"


def lay_out(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def pressure(full: object) -> str:
    return f"some avg10=99.00 avg60=0.00 avg300=0.00 total=1\nfull avg10={full} avg60=0 total=1\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [(STAT.format(faults=321), 321), (STAT.format(faults="x"), 0), ("", 0), ("42 (name) R 1", 0)],
)
def test_major_faults(tmp_path, text, expected):
    lay_out(tmp_path, {"proc/42/stat": text})
    assert major_faults(42, tmp_path) == expected
    assert major_faults(43, tmp_path) == 0


def test_major_faults_of_a_real_process():
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system has no /proc")
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert major_faults(os.getpid()) >= int(fields[9]) >= 0


def test_the_largest_stall_of_system_and_groups(tmp_path):
    group = "sys/fs/cgroup/system.slice"
    files = {
        "proc/self/cgroup": "0::/system.slice/edge.service\n",
        "proc/pressure/memory": pressure("1.50"),
    }
    lay_out(tmp_path, files)
    assert stalled_share(tmp_path) == 0.015
    lay_out(tmp_path, {f"{group}/edge.service/memory.pressure": pressure("62.00")})
    assert stalled_share(tmp_path) == 0.62
    lay_out(tmp_path, {f"{group}/memory.pressure": pressure("70.00")})
    assert stalled_share(tmp_path) == 0.7
    # a hybrid system has version 2 beside version 1
    lay_out(tmp_path, {"sys/fs/cgroup/unified/system.slice/memory.pressure": pressure("5.00")})
    assert stalled_share(tmp_path) == 0.05


@pytest.mark.parametrize("text", ["", "full", "full avg60=3", pressure("nonsense"), "\0\xff"])
def test_no_stall_where_the_kernel_does_not_tell(tmp_path, text):
    lay_out(tmp_path, {"proc/pressure/memory": text, "proc/self/cgroup": "strange\n0::/../x\n"})
    assert stalled_share(tmp_path) == 0.0
