"""What this process may use: memory and cores of the host, its cgroups and a cap."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from edge_sdk.hardware.procfs import ROOT, cgroups, meminfo, read_int, read_text, to_int
from edge_sdk.protocol.fields import Bound

PAGE_COUNTS = ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
NO_LIMIT_V1 = 2**60  # cgroup v1 writes "no limit" as a huge page-aligned number
# Left free beside a trainer: parts of a job in the agent's hands, the kernel's page tables. Our
# estimate; predictions are right to a few MB at best.
SPARE_BYTES = 4 * 1024**2


def memory(
    cap_bytes: int | None = None, own_bytes: int = 0, root: Path = ROOT
) -> tuple[int, int, Bound]:
    """Total bytes of the host, bytes a trainer may use in all, and which bound decided that."""
    total, available = host_memory(root)
    left = cgroup_bytes_left(root)
    host_bytes = max(0, available - SPARE_BYTES)
    cgroup_bytes = None if left is None else max(0, left - SPARE_BYTES)
    return total, *least_bound(host_bytes, cgroup_bytes, cap_bytes, own_bytes)


def host_memory(root: Path = ROOT) -> tuple[int, int]:
    """Bytes in all and bytes that a new process may use without swapping, of the whole host.

    From /proc/meminfo; without MemAvailable (kernels before 3.14) free memory and file cache. Where
    it cannot be read (a chroot without /proc) the C library's page counts; not on Linux psutil."""
    if sys.platform != "linux":
        import psutil

        host = psutil.virtual_memory()
        return int(host.total), int(host.available)
    pages = {name: os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in PAGE_COUNTS}
    told = meminfo(root)
    parts = [told.get(name, 0) for name in ("MemFree", "Buffers", "Cached")]
    available = told.get("MemAvailable", sum(parts) or pages["SC_AVPHYS_PAGES"])
    total = told.get("MemTotal", pages["SC_PHYS_PAGES"])
    return total, min(total, available)


def least_bound(
    host_bytes: int, cgroup_bytes: int | None, cap_bytes: int | None, own_bytes: int
) -> tuple[int, Bound]:
    """The least of the three bounds and its name. own_bytes is in use, so host and cgroup have
    already taken it off; the cap is on the whole trainer, so it stays as it is."""
    bounds: list[tuple[int, Bound]] = [(host_bytes + own_bytes, "host")]
    if cgroup_bytes is not None:
        bounds.append((cgroup_bytes + own_bytes, "cgroup"))
    if cap_bytes is not None:
        bounds.append((cap_bytes, "cap"))
    return min(bounds, key=lambda bound: bound[0])


def cgroup_bytes_left(root: Path = ROOT) -> int | None:
    """Bytes that the tightest memory group above this process leaves, None where there is no limit.

    Both versions are read: a hybrid system mounts v2 without controllers beside v1, and a
    controller is only ever in one of them. File pages, which the kernel can drop, count as free, as
    they do in the host's available memory."""
    left: list[int] = []
    for group in cgroups(root, "memory"):
        limit = read_int(group / "memory.limit_in_bytes")
        if limit is not None and 0 <= limit < NO_LIMIT_V1:
            usage = read_int(group / "memory.usage_in_bytes") or 0
            left.append(limit - usage + _file_bytes(group, "total_"))
    for group in cgroups(root, ""):
        limits = [read_int(group / name) for name in ("memory.max", "memory.high")]
        found = [limit for limit in limits if limit is not None and limit >= 0]
        if found:
            usage = read_int(group / "memory.current") or 0
            left.append(min(found) - usage + _file_bytes(group, ""))
    return max(0, min(left)) if left else None


def _file_bytes(group: Path, prefix: str) -> int:
    wanted = (f"{prefix}active_file", f"{prefix}inactive_file")
    lines = (line.partition(" ") for line in read_text(group / "memory.stat").splitlines())
    return sum(to_int(value) or 0 for name, _, value in lines if name in wanted)


def cores(root: Path = ROOT) -> float:
    """CPU cores this process may use: the least of its affinity and the cgroups' CPU quotas."""
    has_affinity = hasattr(os, "sched_getaffinity")
    allowed = [float(len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)]
    for group in cgroups(root, "cpu"):
        quota, period = (read_int(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and quota > 0 and period is not None and period > 0:
            allowed.append(quota / period)
    for group in cgroups(root, ""):
        words = read_text(group / "cpu.max").split()  # "50000 100000", "max 100000"
        match [to_int(word) for word in words]:
            case [int(quota), int(period)] if quota > 0 and period > 0:
                allowed.append(quota / period)
    return min(allowed)
