"""kill -9 of the coordinator at its n-th write, wherever that is: log, database, checkpoint, spool.

strace kills it as it enters the call, so the call is the first that did not happen."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.chaos.bed import SMALL, Bed, bed_of
from tests.chaos.conftest import Scenario
from tests.chaos.ledger import TOLERANCE, undisturbed
from tests.support.processes import wait_until

CALLS = "write,pwrite64,fsync,fdatasync,ftruncate,rename,unlink"
KILLS, SEED = 20, 1
# Training makes differences grow: from the last bits to 5e-7 after 20 rounds, 1e-2 after 40. So a
# whole run is compared for so many rounds only, and beyond them each round by itself.
ALIKE = 20
LINE = re.compile(r"^(\d+) +\w+\(", re.M)


def strace(*options: str) -> list[str]:
    return ["strace", "-f", "-qq", "-e", f"trace={CALLS}", *options, "--"]


def traces() -> bool:
    """Whether strace is here and allowed to."""
    if not shutil.which("strace"):
        return False
    tried = subprocess.run([*strace("-o", "/dev/null"), "true"], capture_output=True, check=False)
    return tried.returncode == 0


@pytest.mark.skipif(not traces(), reason="needs strace, and leave to trace")
def test_coordinator_killed_at_any_write(tmp_path: Path, scenario: Scenario) -> None:
    """Twenty times, at writes drawn from those of whole rounds, then to the end."""
    generator = random.Random(SEED)
    with bed_of(tmp_path, 2, "--epochs", "1", model=SMALL) as bed:
        trace = tmp_path / "trace"
        server = bed.serve_until_listening(prefix=strace("-o", str(trace)))
        first = count(trace)
        for name in bed.links:
            bed.device(name)
        bed.wait_round(3)
        most = count(trace)
        (traced,) = psutil.Process(server.process.pid).children()
        traced.kill()
        server.end()
        for _ in range(KILLS):
            killed_at(bed, generator.randrange(first, most))
        bed.serve_until_listening()
        last = bed.wait_rounds(2)
        scenario.check(bed, 1, last)
        difference = undisturbed(bed, ALIKE)
        assert difference < TOLERANCE
        scenario.checked.append(f"undisturbed run of {ALIKE} rounds within {difference:.1e}")
        places = sorted(path.name for path in bed.seen_dir.iterdir())
        assert not [name for name in places if name.endswith(".new")], places
        scenario.checked.append(f"killed {KILLS} times, at writes {first} to {most}")


def count(trace: Path) -> int:
    """Of the main thread: strace counts for each thread by itself."""
    threads = LINE.findall(trace.read_text(errors="replace"))
    return threads.count(threads[0])


def killed_at(bed: Bed, number: int) -> None:
    """Start it again, to be killed at this write."""
    inject = f"inject={CALLS}:signal=SIGKILL:when={number}"
    server = bed.serve(prefix=strace("-o", "/dev/null", "-e", inject))
    wait_until(lambda: not server.is_alive, f"it is killed at write {number}", 120, server)
