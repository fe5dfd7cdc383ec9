"""What this process holds in memory, as Linux tells it; 0 where it does not.

A process resides in memory with its own pages and with those of library files. The kernel drops a
file's page when it needs room and reads it again when it is touched, so what a trainer needs is its
own pages and the library pages that its steps touch, not all that happen to lie there: with torch
2.13 on x86 that is 250 MB resident, 190 MB needed."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_sdk.errors import CapacityError
from edge_sdk.hardware.procfs import read_text
from edge_sdk.helpers.text import one_line

log = logging.getLogger(__name__)
SELF = Path("/proc/self")
FORGET_FILE_PAGES, FORGET_PEAK = "3", "5"  # what proc(5) has for clear_refs
ALLOCATOR = re.compile("memory(?![ _](location|format))|bad_alloc|ALLOC_FAILED")
MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S{4} \S+ \S+ (\d+)")  # the inode; 0: no file


def reset_peak() -> None:
    """Make the kernel forget this process's peak."""
    if not _clear(FORGET_PEAK):
        log.debug("peak memory cannot be reset here; it counts from the process's start")


def peak_bytes() -> int:
    """The largest resident memory of this process since the last `reset_peak`."""
    return _status("VmHWM")


def resident_bytes() -> int:
    return _status("VmRSS")


def library_bytes() -> int:
    """Resident bytes of library files' pages."""
    return _status("RssFile")


def idle_library_bytes(work: Callable[[], object]) -> int:
    """Resident bytes of library files' pages that `work` does not touch."""
    if not _clear(FORGET_FILE_PAGES):
        return 0
    work()
    is_file, sizes = False, dict.fromkeys(("Rss", "Referenced", "Anonymous"), 0)
    for line in read_text(SELF / "smaps").splitlines():
        name, _, rest = line.partition(":")
        if found := MAPPING.match(line):
            is_file = found[1] != "0"
        elif is_file and name in sizes:
            sizes[name] += int(rest.split()[0]) * 1024
    # Anonymous: private copies of a file's pages, which cannot be dropped. They may be among the
    # referenced ones, too: then too few bytes count as idle.
    return max(0, sizes["Rss"] - sizes["Anonymous"] - sizes["Referenced"])


def be_killed_before_others(score: int = 500) -> None:
    """Let the kernel choose this process when memory runs out; score 0 to 1000, 0 as any other."""
    with contextlib.suppress(OSError):
        (SELF / "oom_score_adj").write_text(str(score))


def limit_growth(num_bytes: int) -> None:
    """Let this process take so much more private memory, and then raise in its allocators."""
    most = _status("VmData") + num_bytes
    with contextlib.suppress(OSError, ValueError):  # a lower limit of the system's stands
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def trim() -> None:
    """Give what was freed back to the system, where the C library can (glibc)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        log.debug("this C library cannot give freed memory back")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB", read_text(SELF / "status"), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def _clear(what: str) -> bool:
    try:
        (SELF / "clear_refs").write_text(what)
    except OSError:
        return False
    return True


@contextmanager
def memory_errors(during: str) -> Iterator[None]:
    """Turn what torch's and Python's allocators raise into CapacityError; other errors pass."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_for_memory(error):
            raise
        step = "a smaller model, batch or generator needs less"
        raise CapacityError(f"out of memory {during}: {one_line(str(error))}; {step}") from error


def is_for_memory(error: BaseException) -> bool:
    """Whether an allocator raised it. Other errors of torch speak of "memory", too."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ALLOCATOR.search(str(error)) is not None
    )
