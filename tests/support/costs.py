"""Costs worked out by hand for tests of the choice of depth."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from edge_sdk.capacity.chooser import Chooser
from edge_sdk.capacity.costs import Moment, SegmentCost
from edge_sdk.protocol.messages import PROTOCOL, DeviceProfile, Segment, Welcome
from tests.support.agent import MODEL, WHOLE
from tests.support.devices import PROFILE


def cost(first: int, last: int, mebibytes: float, flops: float = 1e9) -> SegmentCost:
    """A segment whose peak is so much: parameters only, which count once."""
    return SegmentCost(
        first=first,
        last=last,
        parameter_bytes=int(mebibytes * 1024**2),
        gradient_bytes=0,
        optimizer_bytes=0,
        moments=(Moment(),),
        cache_bytes=0,
        runtime_bytes=0,
        allowance=1.45,
        flops_per_example=flops,
        frozen_flops_per_example=0.0,
        upload_bytes=0,
        download_bytes=0,
    )


# Prefixes take 100, 200, 300 MiB and 1, 2, 3 GFLOP per example; stages alone 110 and 120.
COSTS = (
    cost(1, 1, 100, 1e9),
    cost(1, 2, 200, 2e9),
    cost(1, 3, 300, 3e9),
    cost(2, 2, 110, 1e9),
    cost(3, 3, 120, 1e9),
)


def welcome(deadline_s: float = 0.0, epochs: int = 1) -> Welcome:
    plan = replace(WHOLE, epochs=epochs)
    return Welcome(
        protocol=PROTOCOL, run="r", model=MODEL, plan=plan, deadline_s=deadline_s, heartbeat_s=1.0
    )


def with_memory(mebibytes: float) -> DeviceProfile:
    return replace(PROFILE, memory_available_bytes=int(mebibytes * 1024**2))


def choose(chooser: Chooser, mebibytes: float, **terms: Any) -> tuple[int, tuple[int, ...]]:
    chooser.choose(with_memory(mebibytes), welcome(**terms), num_examples=10)
    assert chooser.choice is not None
    return chooser.choice.exit, chooser.choice.stages


def segments(*pairs: tuple[int, int]) -> list[Segment]:
    return [Segment(first=first, last=last) for first, last in pairs]
