"""Watching trees of processes from outside: CPU seconds, resident memory, bytes on the loopback.

Linux only. A process that was once seen in a tree belongs to it until it ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PR_SET_CHILD_SUBREAPER = 36
CLONE_NEWNET = 0x40000000
SIOCSIFFLAGS, IFF_UP = 0x8914, 0x1


@dataclass
class Tree:
    """A process and all that it starts. peak_bytes: the largest sum of resident bytes seen, at
    least the largest single process's own peak."""

    root: int
    pids: set[int] = field(default_factory=set)
    peak_bytes: int = 0
    rss_bytes: int = 0

    def look(self, children: dict[int, list[int]]) -> None:
        """children: of every process. Shared pages count in every process that maps them."""
        self.pids = {pid for pid in self.pids | {self.root} if Path(f"/proc/{pid}").exists()}
        todo = list(self.pids)
        while todo:
            for pid in children.get(todo.pop(), ()):
                if pid not in self.pids:
                    self.pids.add(pid)
                    todo.append(pid)
        now, peaks = 0, [0]
        for pid in self.pids:
            rss, peak = resident_bytes(pid)
            now += rss
            peaks.append(peak)
        self.rss_bytes = now
        self.peak_bytes = max(self.peak_bytes, now, *peaks)

    @property
    def is_over(self) -> bool:
        """The first process has ended."""
        return _stat(self.root)[:1] in ([], ["Z"])

    def cpu_s(self) -> float:
        """User and system seconds so far, with those of children that have ended."""
        return sum(cpu_s(pid) for pid in self.pids)


def children_of_all() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))):
            found.setdefault(int(fields[1]), []).append(int(name))
    return found


def cpu_s(pid: int) -> float:
    fields = _stat(pid)
    return sum(map(int, fields[11:15])) * TICK_S if fields else 0.0


def resident_bytes(pid: int) -> tuple[int, int]:
    """(now, peak); zeros for a process that has ended."""
    now = peak = 0
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    for line in text.splitlines():
        if line.startswith("VmRSS:"):
            now = int(line.split()[1]) * 1024
        elif line.startswith("VmHWM:"):
            peak = int(line.split()[1]) * 1024
    return now, peak


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no MemAvailable in /proc/meminfo; this benchmark needs Linux")


def keep_orphans() -> None:
    """Processes whose parent ends become this one's children, so that it can end them."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def enter_own_network() -> bool:
    """Move this process into a network of its own, where only a loopback is. False: no rights."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET) != 0:
        return False
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as some:
        fcntl.ioctl(some, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP))
    return True


def loopback_bytes() -> int:
    """All bytes that went over this network's loopback, headers and acknowledgements included."""
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "lo":
            return int(counts.split()[0])
    return 0


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@contextlib.contextmanager
def started(command: list[str], **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with all that it started."""
    environment = options.get("env", os.environ)
    program = shutil.which(command[0], path=environment["PATH"])  # type: ignore[index]
    process = subprocess.Popen(command, executable=program, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        tree = Tree(process.pid)
        tree.look(children_of_all())
        for pid in tree.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        if process.stdout:
            process.stdout.close()
