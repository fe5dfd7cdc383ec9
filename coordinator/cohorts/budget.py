"""Which of a method's variants an emulated client trains: the largest that its memory holds.

A client of group e has as much memory as training the prefix up to exit e takes by the run's plain
plan, and takes the last variant whose predicted peak, by the method's plan, is no more. That is the
predictor by which devices choose (capacity/costs.py), so methods are compared at one budget instead
of one ratio of widths. Levers are left out on both sides: a micro-batch would change the training
that is compared. So are data and runtime, which are the same for every model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from coordinator.cohorts.base import Offer
from edge_sdk.capacity.costs import peak_bytes
from edge_sdk.capacity.counting import each_variant_cost
from edge_sdk.errors import ConfigError
from edge_sdk.hardware.speed import torch_threads
from edge_sdk.protocol.messages import ModelSpec, Plan

log = logging.getLogger(__name__)


class Variant(NamedTuple):
    """number: its place among those offered, from 1. num_weights: 0 unless the plan is flat."""

    number: int
    exit: int
    num_weights: int


def check_numbers(numbers: Sequence[int], offer: Offer, num_groups: int) -> None:
    """Raise ConfigError unless `numbers` can be the variants of the groups (--variants)."""
    most = len(offer.variants)
    if not most:
        raise ConfigError("--variants is for a method that offers variants; leave it out")
    if len(numbers) != num_groups or not any(numbers) or not all(0 <= n <= most for n in numbers):
        raise ConfigError(
            f"--variants {','.join(map(str, numbers))}, expected one for each of the {num_groups} "
            f"--groups, from 1 to {most}, or 0 for a group that takes no part"
        )


def chosen_variants(
    offer: Offer,
    model: ModelSpec,
    plain: Plan,
    exits: Mapping[str, int],
    numbers: Sequence[int] = (),
) -> dict[str, Variant]:
    """The variant of each client, by the exit that tells its group. model, plain: of the run, which
    tell the groups' memory. numbers: of groups 1, 2, ... as they were asked for; (): by memory. A
    group whose memory does for none takes no part, which is said once. Raises ConfigError if that
    is every one."""
    found = {}
    for group in sorted(set(exits.values())):
        number = (
            numbers[group - 1] if numbers else _largest(offer, replace(model, exit=group), plain)
        )
        if number:
            found[group] = _variant(offer, number)
    if not found:
        raise ConfigError(
            f"no group has the memory for any of the method's {len(offer.variants)} variants, the "
            "smallest of which is said above; give others by its options, or --variants"
        )
    return {name: found[exit] for name, exit in exits.items() if exit in found}


def _largest(offer: Offer, prefix: ModelSpec, plain: Plan) -> int:
    """The place of the last variant that takes no more than this prefix; 0: none."""
    budget, _ = _cost(prefix, plain)
    peaks = []
    for spec in offer.variants:
        peaks.append(_cost(spec, offer.plan)[0])
        if peaks[-1] > budget:
            break
    number = sum(peak <= budget for peak in peaks)
    has = f"group {prefix.exit} has {_kibibytes(budget)}, as training exit {prefix.exit} takes"
    if number:
        takes = _kibibytes(peaks[number - 1])
        said = "%s: variant %d of %d, which takes %s"
        log.info(said, has, number, len(offer.variants), takes)
    else:
        log.warning("%s, and takes no part: variant 1 takes %s", has, _kibibytes(peaks[0]))
    return number


def _kibibytes(num_bytes: int) -> str:
    return f"{num_bytes / 1024:,.0f} KiB"


def _variant(offer: Offer, number: int) -> Variant:
    spec = offer.variants[number - 1]
    weights = _cost(spec, offer.plan)[1] if offer.plan.flat else 0
    return Variant(number, spec.exit, weights)


def _cost(spec: ModelSpec, plan: Plan) -> tuple[int, int]:
    """Predicted peak of training the model whole, in bytes, and how many parameters it has."""
    return _counted(msgspec.json.encode(spec), msgspec.json.encode(replace(plan, seed=0)))


@lru_cache(maxsize=512)  # experiments make many runs of one model in one process
def _counted(spec: bytes, plan: bytes) -> tuple[int, int]:
    model = msgspec.json.decode(spec, type=ModelSpec)
    how = msgspec.json.decode(plan, type=Plan)
    with torch_threads(1):
        (cost,) = each_variant_cost([model], how, how.batch_size, 0)
    return peak_bytes(cost), cost.num_weights
