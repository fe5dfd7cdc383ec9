"""Signs of a livelock for memory, from files laid out by hand and from a real process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edge_sdk.hardware.memory_pressure import Usage, is_thrashing, stalled_share, usage

STAT = "42 (a name) with) R 1 42 42 0 -1 4194304 100 0 {faults} 0 {user} {system}"
TICKS = os.sysconf("SC_CLK_TCK")


def lay_out(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def pressure(full: object) -> str:
    return f"some avg10=99.00 avg60=0.00 avg300=0.00 total=1\nfull avg10={full} avg60=0 total=1\n"


def stat(faults: object, cpu_s: float = 0.0) -> str:
    return STAT.format(
        faults=faults, user=round(0.25 * cpu_s * TICKS), system=round(0.75 * cpu_s * TICKS)
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (stat(321, 8.0), (321, 8.0)),
        (stat("x"), (0, 0.0)),
        ("", (0, 0.0)),
        ("42 (name) R 1", (0, 0.0)),
        (stat(321)[:-2], (0, 0.0)),
    ],
)
def test_usage(tmp_path, text, expected):
    lay_out(tmp_path, {"proc/42/stat": text})
    assert usage(42, tmp_path) == expected
    assert usage(43, tmp_path) == (0, 0.0)


def test_usage_of_a_real_process():
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system has no /proc")
    before, began = usage(os.getpid()), time.process_time()
    while time.process_time() < began + 0.1:
        pass
    assert 0.05 < usage(os.getpid()).cpu_s - before.cpu_s < 1
    assert before.faults >= 0


@pytest.mark.parametrize(
    ("faults", "cpu_s", "has_spoken", "expected"),
    [
        (5000, 40.0, True, True),  # a fast disk; the kernel's search for pages is CPU time, too
        (4999, 40.0, True, False),
        (100, 7.9, True, True),  # of 40 s: it waits for a slow disk
        (100, 8.0, True, False),  # it computes
        (99, 0.0, True, False),  # it sleeps
        (4999, 0.0, False, False),  # it reads its libraries from a slow disk
        (5000, 0.0, False, True),
    ],
)
def test_thrashing(tmp_path, faults, cpu_s, has_spoken, expected):
    before = Usage(1000, 50.0) if has_spoken else None
    there = before or Usage(0, 0.0)
    lay_out(tmp_path, {"proc/42/stat": stat(there.faults + faults, there.cpu_s + cpu_s)})
    assert is_thrashing(42, before, 40.0, tmp_path) == expected
    lay_out(tmp_path, {"proc/pressure/memory": pressure("40.00")})
    assert is_thrashing(42, before, 40.0, tmp_path)


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


WAITS_FOR_ITS_PAGES = """
import mmap, os, sys, time
file = os.open(sys.argv[1], os.O_RDONLY)
pages = mmap.mmap(file, 0, prot=mmap.PROT_READ)
while True:
    pages.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    pages[0]
    time.sleep(0.01)
"""
COMPUTES = "while True: pass"
SLEEPS = "import time; time.sleep(1000)"


@pytest.mark.parametrize(
    ("program", "expected"),
    [(WAITS_FOR_ITS_PAGES, True), (COMPUTES, False), (SLEEPS, False)],
    ids=["waits", "computes", "sleeps"],
)
def test_a_real_process_that_reads_its_pages_again_and_again(tmp_path, program, expected):
    """It does itself what the kernel does to a library under a limit that is too small."""
    file = tmp_path / "library"
    with file.open("wb") as stream:
        stream.write(bytes(2**16))
        os.fsync(stream.fileno())  # only clean pages are dropped
    with subprocess.Popen([sys.executable, "-c", program, str(file)]) as process:
        try:
            time.sleep(0.5)
            before, began = usage(process.pid), time.monotonic()
            while time.monotonic() < began + (10 if expected else 2):
                time.sleep(0.1)
                if usage(process.pid).faults - before.faults > 150:
                    break
            if expected and usage(process.pid).faults == before.faults:
                pytest.skip(f"{tmp_path} lies in memory: nothing is read again")
            assert is_thrashing(process.pid, before, time.monotonic() - began) == expected
        finally:
            process.kill()
