"""Whether a process is livelocked for memory: under a limit that is a little too small the kernel
drops library pages and reads them back for hours instead of killing anybody (torch 2.13 in 300 MB:
no second step in 9 minutes)."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from edge_sdk.hardware.procfs import ROOT, cgroups, read_text

# Of the last 10 s, the share in which every task of the group, or of the system, waited for memory.
STALLED = 0.4
# Pages read back from disk without a sign of progress. Importing torch takes 350 of them; thrashing
# takes 500 a second from a fast disk.
THRASHED_FAULTS = 5000
# A slow disk gives 10 a second (1 MB/s, seen). The process then hardly computes; in a step of
# training it does nothing else.
WAITED_FAULTS, COMPUTING = 100, 0.2
FULL = re.compile(r"^full (?:.* )?avg10=(\d+(?:\.\d+)?)(?: |$)", re.MULTILINE)


class Usage(NamedTuple):
    """What a process has used since its start. faults: pages that it had to wait for."""

    faults: int
    cpu_s: float


def usage(pid: int, root: Path = ROOT) -> Usage:
    """What the process has used; zeros where the system does not tell."""
    stat = read_text(root / f"proc/{pid}/stat")
    fields = stat.rpartition(")")[2].split()  # the name before it may hold blanks
    if len(fields) < 13 or not all(fields[place].isdigit() for place in (9, 11, 12)):
        return Usage(0, 0.0)
    return Usage(int(fields[9]), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"))


def is_thrashing(pid: int, before: Usage | None, silent_s: float, root: Path = ROOT) -> bool:
    """Whether a process that is silent waits for memory. before: its usage when the silence began;
    None: it has not spoken yet, and may still be reading its libraries."""
    now, old = usage(pid, root), before or Usage(0, 0.0)
    faults, computed_s = now.faults - old.faults, now.cpu_s - old.cpu_s
    is_waiting = faults >= WAITED_FAULTS and computed_s < COMPUTING * silent_s
    if faults >= THRASHED_FAULTS or (before and is_waiting):
        return True
    return stalled_share(root) >= STALLED


def stalled_share(root: Path = ROOT) -> float:
    """The largest share of the last 10 s in which all tasks waited for memory at once, of the
    system or of a version 2 group above this process: 0 to 1, 0 where the kernel does not tell."""
    groups = cgroups(root, "")[:-1]  # the last is the mount, which is the system's or a container's
    files = [root / "proc/pressure/memory", *(group / "memory.pressure" for group in groups)]
    return max(map(_full, files))


def _full(path: Path) -> float:
    found = FULL.search(read_text(path))
    return float(found[1]) / 100 if found else 0.0
