"""What a device has: memory, compute, platform; measured here, or an emulated board's.

Memory is the least of three bounds: what the host has free, what every cgroup above this process
leaves (psutil and os.cpu_count() are blind to those), and the user's cap. Measuring it reads a few
small files, cheap enough for every heartbeat of the agent; only compute imports torch.
`root` is "/" but in tests, which lay out their own /proc and /sys."""

from __future__ import annotations

import platform
from datetime import datetime, timezone

from edge_sdk.errors import ConfigError
from edge_sdk.hardware.boards import Board, board_name
from edge_sdk.hardware.limits import cores, memory
from edge_sdk.hardware.speed import SPEED_S, measure_gflops, measure_layer_s
from edge_sdk.protocol.messages import DeviceProfile
from edge_sdk.version import __version__

SHARED = set(Board.__struct_fields__) - {"device_tree", "source"}  # fields, with DeviceProfile


def measure(
    cap_bytes: int | None = None,
    own_bytes: int = 0,
    compute: bool = True,
    device: str = "cpu",
    speed_s: float = SPEED_S,
) -> DeviceProfile:
    """The profile of this device now. Raises ConfigError for a cap below 1 byte.

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


def emulated(board: Board, host_gflops: float, host_layer_s: float = 0.0) -> DeviceProfile:
    """The board as a profile on this host; host_gflops, host_layer_s: of one thread here.

    One CPU second of work here is host_gflops / board.gflops seconds on the board. A board whose
    layer_s was not measured gets the host's, scaled like its arithmetic."""
    cpu_scale = host_gflops / board.gflops
    figures = {name: getattr(board, name) for name in SHARED}
    if board.layer_s is None:
        figures["layer_s"] = host_layer_s * cpu_scale
    return DeviceProfile(**figures, is_emulated=True, cpu_scale=cpu_scale)


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
    return Board(**{name: getattr(profile, name) for name in SHARED}, source=source)
