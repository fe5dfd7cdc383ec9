"""Seconds of wall clock and of this process's CPU, as the phases of an update report them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from edge_sdk.protocol.messages import Phase

NO_TIME = Phase(wall_s=0.0, cpu_s=0.0)
# Of links; here, so that who counts with it loads no ZeroMQ.
DEAD_MS = 30_000  # nothing acknowledged by the other side's kernel for so long


def clock() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def since(start: tuple[float, float], end: tuple[float, float] | None = None) -> Phase:
    wall, cpu = end or clock()
    return Phase(wall_s=max(0.0, wall - start[0]), cpu_s=max(0.0, cpu - start[1]))


class Stopwatch:
    """Adds up what each phase of a job or round took, over all times that it was entered."""

    def __init__(self) -> None:
        self.phases: dict[str, Phase] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = clock()
        yield
        more, held = since(start), self.phases.get(phase, NO_TIME)
        self.phases[phase] = Phase(
            wall_s=held.wall_s + more.wall_s, cpu_s=(held.cpu_s or 0.0) + (more.cpu_s or 0.0)
        )
