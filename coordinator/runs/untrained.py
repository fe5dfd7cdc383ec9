"""Exits that no device has trained: their weights are as random as at the start, or generated from
nothing, and look like any other's. So they are told, and are no part of what is exported."""

from __future__ import annotations

import logging
from collections.abc import Collection

from coordinator.store.store import Store

log = logging.getLogger(__name__)


def untrained_exits(store: Store, num_exits: int) -> list[int]:
    """Of the model's exits those that no counted update of the run trained. None of a run that
    began from given weights: nobody knows how those were trained."""
    if store.config.init:
        return []
    segments = {part for *_, held, _ in store.trained() for part in held.split(",")}
    ends = [tuple(map(int, segment.split("-"))) for segment in segments]
    trained = {exit for first, last in ends for exit in range(first, last + 1)}
    return [exit for exit in range(1, num_exits + 1) if exit not in trained]


def deepest_trained(untrained: Collection[int], num_exits: int) -> int:
    return max((e for e in range(1, num_exits + 1) if e not in untrained), default=num_exits)


def tell_untrained(untrained: Collection[int], num_exits: int) -> None:
    """One line, if there are any, with what becomes of them."""
    if not untrained:
        return
    which = ", ".join(map(str, untrained))
    deepest = deepest_trained(untrained, num_exits)
    said = (
        "no device trained exit %s of %d, whose answers are chance: use exits 1 to %d; give "
        "deeper stages to weak devices (--rotation, or devices with more memory), or fewer --exits"
    )
    log.warning(said, which, num_exits, deepest)
