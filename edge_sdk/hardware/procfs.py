"""Reading /proc and /sys: a file that is missing or strange is unknown, never an error.

`root` is "/" but in tests, which lay out their own tree."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path("/")


def read_text(path: Path) -> str:
    """The file's text without NUL and blanks at its end; "" where it cannot be read."""
    try:
        return path.read_text(errors="replace").rstrip("\0 \n")
    except (OSError, ValueError):  # ValueError: a path that holds NUL
        return ""


def read_int(path: Path) -> int | None:
    """The file's number; None where it is missing or says something else, such as "max"."""
    return to_int(read_text(path))


def to_int(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def folders(root: Path, path: str, pattern: str) -> Iterator[Path]:
    """The matching paths in a folder, if it is there, in order of the numbers in their names."""
    try:
        found = list((root / path).glob(pattern))
    except OSError:
        return
    yield from sorted(found, key=lambda one: (int((re.findall(r"\d+", one.name) or [0])[0]), one))


def meminfo(root: Path = ROOT) -> dict[str, int]:
    """/proc/meminfo in bytes; lines that are not of the form "MemTotal: 948304 kB" are left out."""
    lines = read_text(root / "proc/meminfo").splitlines()
    found = (re.fullmatch(r"(\w+):\s+(\d{1,15}) kB", line.strip()) for line in lines)
    return {line[1]: 1024 * int(line[2]) for line in found if line}


def cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control group and of those above it, up to the mount; controller
    "": of version 2.

    In a container the path may name the host's tree; what does not exist here reads as no limit,
    and the mount's own root carries the container's limit."""
    mount = root / "sys/fs/cgroup"
    if controller:
        mount /= controller
    elif (mount / "unified").is_dir():
        mount /= "unified"
    for line in read_text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if not path or controller not in controllers.split(","):
            continue
        parts = [] if ".." in path.split("/") else [part for part in path.split("/") if part]
        return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return []
