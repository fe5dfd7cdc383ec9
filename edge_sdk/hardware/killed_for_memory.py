"""Whether a process that was killed was killed for memory. Anybody may send signal 9; the kernel
counts those that it sends for memory, and who else kills for it does so where memory is short."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from edge_sdk.hardware.limits import memory
from edge_sdk.hardware.procfs import ROOT, cgroups, read_text

COUNTED = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)
# A process that held so many times what was left free may have wanted more than that. In the second
# between two looks a trainer may double what it holds: so it is where the kernel does not count
# (before 4.13, as on a Jetson Nano). Where it does, only others, as earlyoom, are left to suspect:
# they kill the largest when a tenth of the memory is free.
TIGHT, TIGHT_UNCOUNTED = 2.0, 0.5


class MemoryLook(NamedTuple):
    """Memory at one moment. kills: by the kernel until then, None: it does not count them.
    left_bytes: free for the process; held_bytes: its own, without pages of files."""

    kills: int | None
    left_bytes: int
    held_bytes: int


def look(pid: int, root: Path = ROOT) -> MemoryLook:
    pages = read_text(root / f"proc/{pid}/statm").split()
    held = int(pages[1]) - int(pages[2]) if len(pages) > 2 else 0  # resident, of those in files
    return MemoryLook(kills(root), memory(root=root)[1], held * os.sysconf("SC_PAGE_SIZE"))


def kills(root: Path = ROOT) -> int | None:
    """Processes killed for memory in this process's own control group, else in the whole system."""
    files = [group / "memory.events" for group in cgroups(root, "")]
    files += [group / "memory.oom_control" for group in cgroups(root, "memory")]
    for file in [*files, root / "proc/vmstat"]:
        if found := COUNTED.search(read_text(file)):
            return int(found[1])
    return None


def was_for_memory(last: MemoryLook, kills: int | None) -> bool:
    """Whether a kill after the last look was for memory. kills: counted until now."""
    if kills is not None and last.kills is not None:
        return kills > last.kills or last.held_bytes > TIGHT * last.left_bytes
    return last.held_bytes > TIGHT_UNCOUNTED * last.left_bytes
