"""Which segments a client trains: its prefix, and with stage rotation (ours; related: FeDepth 2023,
ProFL 2024) by turns one deeper stage alone over the frozen stages before it.

add: the prefix and one of the deeper stages that the client can hold; where prefix and stage do not
both fit its deadline, as `replace`. replace: one of prefix and deeper stages instead; the prefix
stands for all the stages it covers. Draws are functions of (seed, round, client) and, for `needy`,
of how many clients trained each stage so far: a stage's chance is proportional to 1 / (1 + owners).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from coordinator.cohort import Client
from coordinator.config import RotationOptions
from coordinator.sampling import job_seed
from edge_sdk.wire import Segment

# (client, round, owners of each stage so far) -> segments
Rule: TypeAlias = Callable[[Client, int, Sequence[float]], tuple[Segment, ...]]


def fixed(exit: int) -> Rule:
    """Stages up to `exit` for everybody, whatever it can hold."""
    return lambda client, round, owners: (Segment(first=1, last=exit),)


def rotation(options: RotationOptions, seed: int) -> Rule:
    def rule(client: Client, round: int, owners: Sequence[float]) -> tuple[Segment, ...]:
        prefix = Segment(first=1, last=client.exit)
        deeper = [stage for stage in sorted(client.stages) if stage > client.exit]
        if options.mode == "off" or not deeper:
            return (prefix,)
        if options.mode == "tail":
            return (prefix, Segment(first=client.exit + 1, last=max(deeper)))
        if options.mode == "all":
            return (prefix, *(Segment(first=s, last=s) for s in deeper))
        is_added = options.mode == "add" and set(deeper) <= set(client.both)
        stages = deeper if is_added else [*range(1, client.exit + 1), *deeper]
        chances = [1.0 if options.draw == "uniform" else 1 / (1 + owners[s - 1]) for s in stages]
        point = job_seed(seed, round, f"stage/{client.id}") / 2**62 * sum(chances)
        for drawn, chance in zip(stages, chances, strict=True):  # noqa: B007 drawn is used below
            point -= chance
            if point < 0:
                break
        alone = Segment(first=drawn, last=drawn)
        if is_added:
            return (prefix, alone)
        return (prefix,) if drawn <= client.exit else (alone,)

    return rule
