"""The deepest exit, or the largest of several models, that fits: pure functions of costs, profile
and deadline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import msgspec
from msgspec.structs import replace

from edge_sdk.capacity.costs import (
    SegmentCost,
    error_bytes,
    in_model,
    memory_savings,
    peak_bytes,
    seconds,
)
from edge_sdk.errors import CapacityError
from edge_sdk.helpers.text import duration, mebibytes
from edge_sdk.protocol.messages import DeviceProfile


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One segment judged, with the first levers that make it fit. seconds is None where the profile
    has no measured compute. cache_bytes: features of the frozen prefix that are kept; 0 where every
    step makes its own, as they would not fit beside it. micro_batch, recompute: as in a plan."""

    first: int
    last: int
    variant: int = 0  # the place of its model among several, from 1
    peak_bytes: int
    error_bytes: int = 0  # by how much the peak may be off
    runtime_bytes: int  # of the peak: what no lever changes
    cache_bytes: int
    micro_batch: int = 0
    recompute: bool = False
    seconds: float | None
    is_feasible: bool
    reason: str = ""  # why not: "needs 600.0 MiB, ..."


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """What a device could train. exit: the deepest e whose prefix (1, e) fits, 0 if none does; of
    several models the exit of the chosen one, whose place among them, from 1, is `variant` and
    which has num_weights parameters.
    stages: deeper ones that would each fit alone, with everything before frozen. prefix_s,
    stage_s: what prefix and stages take; 0 where compute was not measured. A job of several
    takes the sum, and the memory of the largest row: one is trained after the other, in one
    model, which is as deep as the deepest of `stages`. reason: what limits, one line."""

    exit: int
    variant: int = 0
    num_weights: int = 0
    stages: tuple[int, ...]
    prefix_s: float
    stage_s: tuple[float, ...]
    reason: str
    rows: tuple[Row, ...]


def choose_exit(
    costs: Sequence[SegmentCost],
    profile: DeviceProfile,
    *,
    deadline_s: float | None,
    num_examples: int,
    epochs: int,
) -> Choice:
    """The deepest exit that fits in memory and, with a deadline (None or 0: none), in time; then
    the deepest stage alone, and what else, that leaves room for it in one job.

    A shallower exit need not fit: an exit is one classifier on wide features and may cost more than
    a deeper one. The order of `costs` does not matter. Raises CapacityError for an empty list."""
    judge = partial(
        _judge, profile=profile, deadline_s=deadline_s, num_examples=num_examples, epochs=epochs
    )
    by_name = {(cost.first, cost.last): cost for cost in costs}
    rows = {name: judge(cost) for name, cost in by_name.items()}
    prefixes = sorted((row for row in rows.values() if row.first == 1), key=lambda row: row.last)
    if not prefixes:
        raise CapacityError("no exit was costed, so none can be chosen; count segment_costs first")
    chosen = max((row.last for row in prefixes if row.is_feasible), default=0)
    deeper = [row for row in prefixes if row.last > chosen]
    prefix = [(1, chosen)] if chosen else []
    alone = sorted(
        n for n, row in rows.items() if n[0] == n[1] > max(chosen, 1) and row.is_feasible
    )
    stages: list[int] = []
    for deepest in reversed(alone):
        names = [*prefix, *(name for name in alone if name <= deepest)]
        job = {name: judge(in_model(by_name[name], by_name[deepest])) for name in names}
        if all(job[name].is_feasible for name in prefix):
            rows |= job
            stages = [n[0] for n in names[len(prefix) :] if job[n].is_feasible]
            break
    reason = f"exit {chosen} is the deepest of the model"
    if deeper:
        reason = f"exit {deeper[0].last} {deeper[0].reason}"
    return Choice(
        exit=chosen,
        stages=tuple(stages),
        prefix_s=sum(rows[name].seconds or 0.0 for name in prefix),
        stage_s=tuple(rows[stage, stage].seconds or 0.0 for stage in stages),
        reason=reason,
        rows=tuple(rows.values()),
    )


def choose_variant(
    costs: Sequence[SegmentCost],
    num_variants: int,
    profile: DeviceProfile,
    *,
    deadline_s: float | None,
    num_examples: int,
    epochs: int,
) -> Choice:
    """Of so many models, of which `costs` knows the first, cheapest first and each trained as one
    segment up to its exit: the last that fits in memory and in time. Raises CapacityError for an
    empty list."""
    if not costs:
        raise CapacityError("no variant was costed, so none can be chosen; count them first")
    judge = partial(
        _judge, profile=profile, deadline_s=deadline_s, num_examples=num_examples, epochs=epochs
    )
    rows = tuple(replace(judge(cost), variant=n) for n, cost in enumerate(costs, 1))
    chosen = max((row.variant for row in rows if row.is_feasible), default=0)
    reason = f"variant {chosen} is the largest of {num_variants}"
    if chosen < len(rows):
        reason = f"variant {chosen + 1} of {num_variants} {rows[chosen].reason}"
    elif chosen < num_variants:
        reason = f"memory did not do for counting what variant {chosen + 1} takes"
    return Choice(
        exit=costs[chosen - 1].last if chosen else 0,
        variant=chosen,
        num_weights=costs[chosen - 1].num_weights if chosen else 0,
        stages=(),
        prefix_s=rows[chosen - 1].seconds or 0.0 if chosen else 0.0,
        stage_s=(),
        reason=reason,
        rows=rows,
    )


def _judge(
    cost: SegmentCost,
    profile: DeviceProfile,
    deadline_s: float | None,
    num_examples: int,
    epochs: int,
) -> Row:
    tried = list(memory_savings(cost))
    fitting = (c for c in tried if peak_bytes(c) <= profile.memory_available_bytes)
    cost, asked = next(fitting, min(tried, key=peak_bytes)), cost
    how = "".join(f" ({words})" for words in [in_words(cost, asked)] if words)
    peak = peak_bytes(cost)
    needed_s = seconds(cost, profile, num_examples, epochs) if profile.gflops > 0 else None
    reasons = []
    if peak > profile.memory_available_bytes:
        have = f"{mebibytes(profile.memory_available_bytes)} available ({profile.memory_bound})"
        reasons.append(f"needs {mebibytes(peak)}{how}, {have}")
    if deadline_s and needed_s is None:
        reasons.append("cannot be held against the deadline without measured compute")
    elif deadline_s and needed_s is not None and needed_s > deadline_s:
        reasons.append(f"takes {duration(needed_s)}{how}, the deadline is {duration(deadline_s)}")
    return Row(
        first=cost.first,
        last=cost.last,
        peak_bytes=peak,
        error_bytes=error_bytes(cost),
        runtime_bytes=cost.runtime_bytes,
        cache_bytes=cost.cache_bytes,
        micro_batch=cost.micro_batch,
        recompute=cost.recompute,
        seconds=needed_s,
        is_feasible=not reasons,
        reason=" and ".join(reasons),
    )


def as_chosen(cost: SegmentCost, row: Row) -> SegmentCost:
    """The segment with the levers that made it fit, as its row tells them."""
    told = (row.cache_bytes, row.micro_batch, row.recompute)
    return next(
        c for c in memory_savings(cost) if (c.cache_bytes, c.micro_batch, c.recompute) == told
    )


def in_words(cost: SegmentCost, asked: SegmentCost) -> str:
    """What differs from the segment as it was asked for, e.g. "without a cache, 8 at once"."""
    parts = ["without a cache"] if asked.cache_bytes and not cost.cache_bytes else []
    parts += [f"{cost.micro_batch} at once"] if cost.micro_batch != asked.micro_batch else []
    parts += ["stages run again"] if cost.recompute and not asked.recompute else []
    return ", ".join(parts)
