"""What a device has: memory, compute, platform; measured here, or an emulated board's.

Memory is the least of three bounds: what the host has free, what every cgroup above this process
leaves (psutil and os.cpu_count() are blind to those), and the user's cap. Measuring it reads a few
small files, cheap enough for every heartbeat of the agent; only compute imports torch.
`root` is "/" but in tests, which lay out their own /proc and /sys.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
from msgspec import Meta

from edge_sdk import __version__
from edge_sdk.boards import Board, board_name
from edge_sdk.errors import ConfigError
from edge_sdk.sysfs import ROOT, meminfo, read_int, read_text, to_int

if TYPE_CHECKING:
    from torch import Tensor, nn

PAGE_COUNTS = ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES")
NO_LIMIT_V1 = 2**60  # cgroup v1 writes "no limit" as a huge page-aligned number
# Left free beside a trainer: parts of a job in the agent's hands, the kernel's page tables. Our
# estimate; predictions are right to a few MB at best.
SPARE_BYTES = 4 * 1024**2
SPEED_S = 0.5  # of sampling GFLOPS
LAYER_STEPS, LAYER_S = (
    50,
    0.25,
)  # sampled for layer_s: so many steps, or as many as that time allows
LEAST_LAYER_STEPS = 9
# What a message may hold as text: no control characters, no line or paragraph separators.
PLAIN_TEXT = r"\A[^\x00-\x1f\x7f-\x9f\u2028\u2029]*\Z"
Text = Annotated[str, Meta(max_length=200, pattern=PLAIN_TEXT)]
Bytes = Annotated[int, Meta(ge=0, le=2**53)]
Bound = Literal["host", "cgroup", "cap"]


class DeviceProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device as measured, or as an emulated board's profile file says.

    memory_available_bytes is what a trainer process may use in all (its runtime included): the
    least of what the host, the cgroup and the user's cap leave; `memory_bound` names which.
    gflops is sustained float32 forward+backward throughput in 1e9 operations per second on all
    `cores`; 0: not measured. layer_s is what a layer costs per training step beside its arithmetic,
    which is most of what a very small model takes. cpu_scale, for an emulated board only, is board
    seconds per CPU second of this host. The ranges are checked when a profile is decoded, not when
    it is made here.
    """

    platform: Text  # "raspberry-pi-4", "jetson-nano", else "generic"
    board: Text = ""  # model string as the board gives it
    machine: Text = ""  # "aarch64", "x86_64"
    memory_total_bytes: Bytes
    memory_available_bytes: Bytes
    memory_bound: Bound = "host"
    cores: Annotated[float, Meta(gt=0, le=4096)]
    gflops: Annotated[float, Meta(ge=0, le=10**9)]
    layer_s: Annotated[float, Meta(ge=0, le=10**3)] = 0.0
    # None: not known, transfers are left out of predictions
    link_mbit_s: Annotated[float, Meta(gt=0, le=10**6)] | None = None
    is_emulated: bool = False
    cpu_scale: Annotated[float, Meta(gt=0, le=10**9)] | None = None


def measure(
    cap_bytes: int | None = None,
    own_bytes: int = 0,
    compute: bool = True,
    device: str = "cpu",
    speed_s: float = SPEED_S,
) -> DeviceProfile:
    """This device, now. Raises ConfigError for a cap below 1 byte.

    own_bytes: memory of our own trainer that a new job would take over, so it counts as available.
    compute: measure gflops and layer_s of torch's `device` too (imports torch, about 1 s), gflops
    over speed_s; without it they are 0."""
    if cap_bytes is not None and cap_bytes < 1:
        raise ConfigError(f"memory cap is {cap_bytes} bytes, expected at least 1; leave it out")
    total_bytes, available_bytes, bound = memory(cap_bytes, own_bytes)
    name, model = board_name()
    return DeviceProfile(
        platform=name,
        board=model,
        machine=platform.machine(),
        memory_total_bytes=total_bytes,
        memory_available_bytes=available_bytes,
        memory_bound=bound,
        cores=cores(),
        gflops=measure_gflops(speed_s, device=device) if compute else 0.0,
        layer_s=measure_layer_s(device=device) if compute else 0.0,
    )


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
    """What the tightest memory group above this process leaves, None where there is no limit.

    Both versions are read: a hybrid system mounts v2 without controllers beside v1, and a
    controller is only ever in one of them. File pages, which the kernel can drop, count as free, as
    they do in the host's available memory."""
    left: list[int] = []
    for group in _groups(root, "memory"):
        limit = read_int(group / "memory.limit_in_bytes")
        if limit is not None and 0 <= limit < NO_LIMIT_V1:
            usage = read_int(group / "memory.usage_in_bytes") or 0
            left.append(limit - usage + _file_bytes(group, "total_"))
    for group in _groups(root, ""):
        limits = [read_int(group / name) for name in ("memory.max", "memory.high")]
        found = [limit for limit in limits if limit is not None and limit >= 0]
        if found:
            usage = read_int(group / "memory.current") or 0
            left.append(min(found) - usage + _file_bytes(group, ""))
    return max(0, min(left)) if left else None


def _file_bytes(group: Path, prefix: str) -> int:
    return sum(_read_stat(group, f"{prefix}{kind}_file") for kind in ("active", "inactive"))


def cores(root: Path = ROOT) -> float:
    """CPU cores this process may use: the least of its affinity and the cgroups' CPU quotas."""
    if hasattr(os, "sched_getaffinity"):
        allowed = [float(len(os.sched_getaffinity(0)))]
    else:
        allowed = [float(os.cpu_count() or 1)]
    for group in _groups(root, "cpu"):
        quota, period = (read_int(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and quota > 0 and period is not None and period > 0:
            allowed.append(quota / period)
    for group in _groups(root, ""):
        words = read_text(group / "cpu.max").split()  # "50000 100000", "max 100000"
        match [to_int(word) for word in words]:
            case [int(quota), int(period)] if quota > 0 and period > 0:
                allowed.append(quota / period)
    return min(allowed)


def _groups(root: Path, controller: str) -> list[Path]:
    """Directories of this process's group and its parents; controller "" is the v2 hierarchy.

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
        parts = [] if ".." in path.split("/") else path.strip("/").split("/")
        return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return []


def _read_stat(group: Path, key: str) -> int:
    for line in read_text(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return to_int(value) or 0
    return 0


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes on `count` threads of the CPU within."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_gflops(
    seconds: float = SPEED_S, threads: int | None = None, device: str = "cpu"
) -> float:
    """Sustained float32 training throughput of torch's `device`, 1e9 operations per second.

    Real forward and backward passes of three 3x3 convolutions of 32 channels on (8, 32, 32, 32),
    about 10 MB; an operation is a multiply or an add, and a backward pass counts as two forward
    ones. threads: None = all cores allowed. The median of samples of at least 0.1 s: one period of
    the kernel's CPU quota, so that a throttled group is not taken for its unthrottled moments."""
    import torch

    batch, channels, size, layers = 8, 32, 32, 3
    step_flops = 3 * 2 * layers * batch * channels * channels * 9 * size * size
    with torch_threads(threads or max(1, math.ceil(cores()))):
        convolutions = [torch.nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)]
        stack = torch.nn.Sequential(*convolutions).to(device)
        # The input asks for its gradient: else the first layer does two thirds of what is counted.
        images = torch.ones(batch, channels, size, size, device=device, requires_grad=True)
        _steps_per_s(stack, images, at_least_s=0.0)  # warm up
        samples: list[float] = []
        end = time.monotonic() + seconds
        while not samples or time.monotonic() < end:
            samples.append(_steps_per_s(stack, images, at_least_s=0.1) * step_flops / 1e9)
    return statistics.median(samples)


def measure_layer_s(threads: int | None = None, device: str = "cpu") -> float:
    """Seconds that a layer costs per training step beside its arithmetic: forward and backward of
    24 layers (convolution, BatchNorm, ReLU) on inputs of 64 values, the median of 50 steps.

    Fewer where they take long: where other programs keep the cores busy torch's threads wait for
    each other at every layer, computing all the while."""
    import torch

    blocks = 8
    with torch_threads(threads or max(1, math.ceil(cores()))):
        layers: list[nn.Module] = []
        for _ in range(blocks):
            layers += [torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.BatchNorm2d(2)]
            layers.append(torch.nn.ReLU())
        stack = torch.nn.Sequential(*layers).to(device)
        images = torch.ones(2, 2, 4, 4, device=device, requires_grad=True)
        _steps_per_s(stack, images, at_least_s=0.0)  # warm up
        samples: list[float] = []
        end = time.monotonic() + LAYER_S
        while len(samples) < LAYER_STEPS and (
            len(samples) < LEAST_LAYER_STEPS or time.monotonic() < end
        ):
            samples.append(1 / _steps_per_s(stack, images, at_least_s=0.0))
    return statistics.median(samples) / (3 * blocks)


def _steps_per_s(stack: nn.Module, images: Tensor, at_least_s: float) -> float:
    import torch

    start, num_steps, elapsed_s = time.monotonic(), 0, 0.0
    while not num_steps or elapsed_s < at_least_s:
        stack(images).sum().backward()
        if images.is_cuda:
            torch.cuda.synchronize()
        num_steps += 1
        elapsed_s = time.monotonic() - start
    return num_steps / elapsed_s


def emulated(board: Board, host_gflops: float, host_layer_s: float = 0.0) -> DeviceProfile:
    """The board as a profile on this host; host_gflops, host_layer_s: of one thread here.

    One CPU second of work here is host_gflops / board.gflops seconds on the board. A board whose
    layer_s was not measured gets the host's, scaled like its arithmetic."""
    cpu_scale = host_gflops / board.gflops
    return DeviceProfile(
        platform=board.platform,
        board=board.board,
        machine=board.machine,
        memory_total_bytes=board.memory_total_bytes,
        memory_available_bytes=board.memory_available_bytes,
        cores=board.cores,
        gflops=board.gflops,
        layer_s=host_layer_s * cpu_scale if board.layer_s is None else board.layer_s,
        link_mbit_s=board.link_mbit_s,
        is_emulated=True,
        cpu_scale=cpu_scale,
    )


def measured_board(profile: DeviceProfile, device: str) -> Board:
    """A measured profile as a board's file; `device` is torch's, whose speed was measured."""
    import torch

    today = datetime.now(timezone.utc).date()
    how = f"Measured on {today} by edge-sdk {__version__}"
    compute = f"{how} with torch {torch.__version__} on {device}, {profile.cores:g} CPU cores"
    source = {
        "memory_total_bytes": f"{how}: what the kernel has of it",
        "memory_available_bytes": f"{how}: free then (bound: {profile.memory_bound})",
        "cores": f"{how}: affinity and CPU quota",
        "gflops": f"{compute}: forward and backward passes of 3x3 convolutions in float32",
        "layer_s": f"{compute}: what a layer costs per training step beside its arithmetic",
    }
    if profile.link_mbit_s is not None:
        source["link_mbit_s"] = f"Told by --link-mbit-s on {today}, not measured"
    shared = set(Board.__struct_fields__) - {"source"}
    return Board(**{name: getattr(profile, name) for name in shared}, source=source)
