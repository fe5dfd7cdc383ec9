"""What jetson-stats (jtop) tells on a Jetson, where it is installed and its service runs.

Asking opens a connection and waits for the service's next sample, about a second: for `measure` and
`doctor`, not for a heartbeat. The package is licensed under the AGPL: an extra, imported only here,
inside a function."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

log = logging.getLogger(__name__)
T = TypeVar("T")
OFFLINE_C = -256  # what jtop gives for a sensor that is switched off


class JetsonStats(msgspec.Struct, frozen=True, kw_only=True):
    """What jtop tells. problem: why it tells nothing; "" when it does, or is not installed."""

    module: str = ""  # it knows the memory variant, which the device tree may not
    temperatures: dict[str, float] = {}  # degrees Celsius by sensor
    power_w: float | None = None  # of the whole board
    gpu_percent: float | None = None
    problem: str = ""


def jetson_stats() -> JetsonStats:
    """What jtop tells now: nothing without the package; problem: what its service refuses."""
    try:
        from jtop import JtopException, jtop
    except (ImportError, OSError) as error:
        log.debug("jetson-stats not used: %s", error)
        return JetsonStats()
    try:
        with jtop() as jetson:
            return JetsonStats(
                module=_told(lambda: str(jetson.board["hardware"]["Module"] or "")) or "",
                temperatures=_told(lambda: _celsius(jetson.temperature)) or {},
                power_w=_told(lambda: float(jetson.power["tot"]["power"]) / 1000),
                gpu_percent=_told(
                    lambda: max(float(gpu["status"]["load"]) for gpu in jetson.gpu.values())
                ),
            )
    except (JtopException, OSError, EOFError) as error:
        log.debug("jetson-stats not used: %s", error)
        return JetsonStats(problem=explained(str(error)))


@functools.cache
def jetson_module() -> str:
    """The module's name, asked once; "" where it is not known."""
    return jetson_stats().module


def explained(message: str) -> str:
    """jtop's message as one line with what to do. Package and service must have one version."""
    line = " ".join(message.split()) or "no reason given"
    if "mismatch" not in line.lower():
        return f"jetson-stats: {line}"
    told = re.search(r"service: \[([^]]+)\] and client: \[([^]]+)\]", line)
    if told is None:
        what = line.partition(". ")[0]
    else:
        what = f"its service has version {told[1]}, the package of this Python {told[2]}"
    both = "install one version for both (sudo pip install -U jetson-stats)"
    return f"jetson-stats: {what}; {both}, then sudo jtop --install-service"


def _told(ask: Callable[[], T]) -> T | None:
    """The answer; None where this version of jtop, or this board, does not tell it."""
    try:
        return ask()
    except (AttributeError, LookupError, TypeError, ValueError):
        return None


def _celsius(sensors: Mapping[str, Any]) -> dict[str, float]:
    return {
        str(name): float(sensor["temp"])
        for name, sensor in sensors.items()
        if sensor["temp"] != OFFLINE_C
    }
