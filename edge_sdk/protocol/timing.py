"""Seconds of wall clock and of this process's CPU, as the phases of an update report them."""

from __future__ import annotations

import time

from edge_sdk.protocol.messages import Phase

# Of links; here, so that who counts with it loads no ZeroMQ.
DEAD_MS = 30_000  # nothing acknowledged by the other side's kernel for so long


def clock() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def since(start: tuple[float, float], end: tuple[float, float] | None = None) -> Phase:
    wall, cpu = end or clock()
    return Phase(wall_s=max(0.0, wall - start[0]), cpu_s=max(0.0, cpu - start[1]))
