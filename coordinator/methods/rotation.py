"""Which segments a client trains: its prefix, and with stage rotation (ours; related: FeDepth 2023,
ProFL 2024) deeper stages, each alone over the frozen global stages before it.

add: the prefix, and deeper stages in an order drawn anew each round, as many as `stages` allows and
as fit the deadline beside the prefix by the client's own prediction; where not even the first one
fits, as `replace`. replace: one stage is drawn instead; a stage within the prefix stands for it.
Draws are functions of (seed, round, client) and, for `needy`, of how many clients trained each
stage so far: a stage's chance is proportional to 1 / (1 + owners).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from coordinator.cohorts.base import Client
from coordinator.cohorts.sampling import job_seed
from coordinator.config import RotationOptions
from edge_sdk.protocol.messages import Segment

# (client, round, owners of each stage so far) -> segments
SegmentRule: TypeAlias = Callable[[Client, int, Sequence[float]], tuple[Segment, ...]]


def fixed(exit: int) -> SegmentRule:
    """Stages up to `exit` for everybody, whatever it can hold."""
    return lambda client, round, owners: (Segment(first=1, last=exit),)


def rotation(options: RotationOptions, seed: int, deadline_s: float = 0.0) -> SegmentRule:
    """deadline_s: of a round; 0: none."""

    def rule(client: Client, round: int, owners: Sequence[float]) -> tuple[Segment, ...]:
        prefix = Segment(first=1, last=client.exit)
        deeper = [stage for stage in sorted(client.stages) if stage > client.exit]
        if options.mode == "off" or not deeper:
            return (prefix,)

        def drawn(stages: Sequence[int], turn: str) -> list[int]:
            even = options.draw == "uniform"
            chances = {stage: 1.0 if even else 1 / (1 + owners[stage - 1]) for stage in stages}
            return draw_order(chances, f"{seed}/{round}/{client.id}/{turn}")

        if options.mode == "add":
            seconds = dict(zip(client.stages, client.stage_s, strict=bool(client.stage_s)))
            added, taken_s = [], client.prefix_s
            for stage in drawn(deeper, "add")[: options.stages or None]:
                taken_s += seconds.get(stage, 0.0)
                if deadline_s and taken_s > deadline_s:
                    break
                added.append(stage)
            if added:
                return (prefix, *(Segment(first=s, last=s) for s in sorted(added)))
        stage = drawn([*range(1, client.exit + 1), *deeper], "replace")[0]
        return (prefix,) if stage <= client.exit else (Segment(first=stage, last=stage),)

    return rule


def draw_order(chances: dict[int, float], key: str) -> list[int]:
    """Items in a random order, each next one drawn in proportion to its chance among those left.
    Exponential waiting times, sorted, do that (Efraimidis and Spirakis 2006)."""

    def waiting(item: int) -> float:
        uniform = (job_seed(0, item, key) + 1) / (2**62 + 1)
        return -math.log(uniform) / chances[item]

    return sorted(chances, key=waiting)
