"""What a device has: memory, compute, platform; measured here, or read from a board's file.

Memory is the least of three bounds: what the host has free, what every cgroup above this process
leaves (psutil and os.cpu_count() are blind to those), and the user's cap. Measuring it reads a few
small files, cheap enough for every heartbeat of the agent; only `measure_gflops` imports torch.
`root` is "/" but in tests, which lay out their own /proc and /sys.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edge_sdk.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger(__name__)

ROOT = Path("/")
NO_LIMIT_V1 = 2**60  # cgroup v1 writes "no limit" as a huge page-aligned number
# First match wins; compared with the device tree's model string, lower case, "-" as " ".
PLATFORMS = (
    ("raspberry pi zero 2", "raspberry-pi-zero-2w"),
    ("raspberry pi compute module 4", "raspberry-pi-4"),
    ("raspberry pi compute module 5", "raspberry-pi-5"),
    ("raspberry pi 4", "raspberry-pi-4"),  # Pi 400 too
    ("raspberry pi 5", "raspberry-pi-5"),  # Pi 500 too
    ("orin nano", "jetson-orin-nano"),
    ("xavier nx", "jetson-xavier-nx"),
    ("jetson tx2", "jetson-tx2"),
    ("jetson nano", "jetson-nano"),
)
Positive = Annotated[float, Meta(gt=0)]
PositiveInt = Annotated[int, Meta(gt=0)]
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


class Board(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A board's file in profiles/: figures, and for every figure where it comes from."""

    platform: str
    board: str
    machine: str
    memory_total_bytes: PositiveInt
    memory_available_bytes: PositiveInt  # estimate: total less what system and agent take
    cores: Positive
    gflops: Positive
    link_mbit_s: Positive
    source: dict[str, str]


def measure(
    cap_bytes: int | None = None, own_bytes: int = 0, compute: bool = True
) -> DeviceProfile:
    """This device, now. Raises ConfigError for a cap below 1 byte.

    own_bytes: memory of our own trainer that a new job would take over, so it counts as available.
    compute: measure gflops and layer_s too (imports torch, about 1 s); without it they are 0."""
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
        gflops=measure_gflops() if compute else 0.0,
        layer_s=measure_layer_s() if compute else 0.0,
    )


def memory(
    cap_bytes: int | None = None, own_bytes: int = 0, root: Path = ROOT
) -> tuple[int, int, Bound]:
    """Total bytes of the host, bytes a trainer may use in all, and which bound decided that."""
    import psutil

    host = psutil.virtual_memory()
    bytes_left, bound = least_bound(
        int(host.available), cgroup_bytes_left(root), cap_bytes, own_bytes
    )
    return int(host.total), bytes_left, bound


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
        limit = _read_int(group / "memory.limit_in_bytes")
        if limit is not None and limit < NO_LIMIT_V1:
            usage = _read_int(group / "memory.usage_in_bytes") or 0
            left.append(limit - usage + _file_bytes(group, "total_"))
    for group in _groups(root, ""):
        limits = [_read_int(group / name) for name in ("memory.max", "memory.high")]
        found = [limit for limit in limits if limit is not None]
        if found:
            usage = _read_int(group / "memory.current") or 0
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
        quota, period = (_read_int(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and quota > 0 and period:
            allowed.append(quota / period)
    for group in _groups(root, ""):
        words = _read(group / "cpu.max").split()  # "50000 100000", "max 100000"
        if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
            allowed.append(int(words[0]) / int(words[1]))
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
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        parts = [] if ".." in path.split("/") else path.strip("/").split("/")
        return [mount.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return []


def _read(path: Path) -> str:
    """The file's text without NUL and blanks at its end; "" where it cannot be read."""
    try:
        return path.read_text(errors="replace").rstrip("\0 \n")
    except OSError:
        return ""


def _read_int(path: Path) -> int | None:
    """The file's number; None where it is missing or says "max"."""
    try:
        return int(_read(path))
    except ValueError:
        return None


def _read_stat(group: Path, key: str) -> int:
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0


def board_name(root: Path = ROOT) -> tuple[str, str]:
    """Platform ("generic" if not in PLATFORMS) and the model string the board gives of itself."""
    model = ""
    for path in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        model = model or _read(root / path)
    plain = model.lower().replace("-", " ")
    name = next((name for part, name in PLATFORMS if part in plain), "generic")
    if name.startswith("jetson"):
        model = jetson_module() or model
    return name, model


@functools.cache
def jetson_module() -> str:
    """Module name from jetson-stats: it knows the memory variant, which the device tree may not.

    "" without the package or its service. Asked once: it opens a connection."""
    try:
        from jtop import JtopException, jtop
    except (ImportError, OSError) as error:
        log.debug("jetson-stats not used: %s", error)
        return ""
    try:
        with jtop() as jetson:
            return str(jetson.board["hardware"].get("Module", ""))
    except (JtopException, OSError, KeyError) as error:
        log.debug("jetson-stats not used: %s", error)
        return ""


def measure_gflops(seconds: float = 0.5, threads: int | None = None, device: str = "cpu") -> float:
    """Sustained float32 training throughput of torch's `device`, 1e9 operations per second.

    Real forward and backward passes of three 3x3 convolutions of 32 channels on (8, 32, 32, 32),
    about 10 MB; an operation is a multiply or an add, and a backward pass counts as two forward
    ones. threads: None = all cores allowed. The median of samples of at least 0.1 s: one period of
    the kernel's CPU quota, so that a throttled group is not taken for its unthrottled moments."""
    import torch

    batch, channels, size, layers = 8, 32, 32, 3
    step_flops = 3 * 2 * layers * batch * channels * channels * 9 * size * size
    before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, math.ceil(cores())))
    try:
        convolutions = [torch.nn.Conv2d(channels, channels, 3, padding=1) for _ in range(layers)]
        stack = torch.nn.Sequential(*convolutions).to(device)
        # The input asks for its gradient: else the first layer does two thirds of what is counted.
        images = torch.ones(batch, channels, size, size, device=device, requires_grad=True)
        _steps_per_s(stack, images, at_least_s=0.0)  # warm up
        samples: list[float] = []
        end = time.monotonic() + seconds
        while not samples or time.monotonic() < end:
            samples.append(_steps_per_s(stack, images, at_least_s=0.1) * step_flops / 1e9)
    finally:
        torch.set_num_threads(before)
    return statistics.median(samples)


def measure_layer_s(threads: int | None = None, device: str = "cpu") -> float:
    """Seconds that a layer costs per training step beside its arithmetic: forward and backward of
    24 layers (convolution, BatchNorm, ReLU) on inputs of 64 values, the median of 50 steps."""
    import torch

    blocks = 8
    before = torch.get_num_threads()
    torch.set_num_threads(threads or max(1, math.ceil(cores())))
    try:
        layers: list[nn.Module] = []
        for _ in range(blocks):
            layers += [torch.nn.Conv2d(2, 2, 3, padding=1), torch.nn.BatchNorm2d(2)]
            layers.append(torch.nn.ReLU())
        stack = torch.nn.Sequential(*layers).to(device)
        images = torch.ones(2, 2, 4, 4, device=device, requires_grad=True)
        _steps_per_s(stack, images, at_least_s=0.0)  # warm up
        samples = [1 / _steps_per_s(stack, images, at_least_s=0.0) for _ in range(50)]
    finally:
        torch.set_num_threads(before)
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


def board_folder() -> Path:
    """profiles/ inside the installed package, else the source tree's."""
    packaged = Path(__file__).parent / "profiles"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "profiles"


def board_names() -> list[str]:
    return sorted(path.stem for path in board_folder().glob("*.toml"))


def board(name_or_path: str) -> Board:
    """A board by its name in profiles/ or by the path of a .toml file.

    Raises ConfigError: unknown name (lists the known ones), or bad file (names file and key)."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        if name_or_path not in board_names():
            known = ", ".join(board_names())
            raise ConfigError(
                f"unknown board {name_or_path!r}; known: {known}; or give the path of a .toml file"
            )
        path = board_folder() / f"{name_or_path}.toml"
    try:
        found = msgspec.convert(_load_toml(path), Board)
    except OSError as error:
        raise ConfigError(f"board file {path}: {error.strerror}") from error
    except ValueError as error:  # TOML syntax, and msgspec's errors, which name the key as $.key
        raise ConfigError(f"board file {path}: {error}; see profiles/generic.toml") from error
    unsourced = [
        field
        for field in Board.__struct_fields__
        if isinstance(getattr(found, field), (int, float)) and not found.source.get(field)
    ]
    if unsourced:
        raise ConfigError(f"board file {path}: [source] lacks {', '.join(unsourced)}")
    return found


def _load_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    with path.open("rb") as file:
        found: dict[str, Any] = tomllib.load(file)
    return found


def emulated(board: Board, host_gflops: float, host_layer_s: float = 0.0) -> DeviceProfile:
    """The board as a profile on this host; host_gflops, host_layer_s: of one thread here.

    One CPU second of work here is host_gflops / board.gflops seconds on the board."""
    cpu_scale = host_gflops / board.gflops
    return DeviceProfile(
        platform=board.platform,
        board=board.board,
        machine=board.machine,
        memory_total_bytes=board.memory_total_bytes,
        memory_available_bytes=board.memory_available_bytes,
        cores=board.cores,
        gflops=board.gflops,
        layer_s=host_layer_s * cpu_scale,
        link_mbit_s=board.link_mbit_s,
        is_emulated=True,
        cpu_scale=cpu_scale,
    )
