"""What families of clients, each with a model of its own size, have in common: tensors whose shape
is the same in all of them (adapters' insides), by slots of relative depth. Pure functions.

A family moves such a tensor by the mean over its own clients. shared: all families that have the
slot move it by one step, the mean of their movements. aligned: where the movements of two families
point against each other, each loses the component along the other before that mean, as in PCGrad
(Yu et al. 2020), in a drawn order.

A family counts by its examples, but for no more than CAP times another: by examples alone a small
one would get the step of a large one, whatever that does to it; and a small one takes from another
no more of its movement than it weighs against that, else one of few examples could stop all.

A reconstruction of HeteroTune's CMGA (arXiv 2411.16796), of which only the abstract is known to us.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

CAP = 3.0


class Slot(NamedTuple):
    """A place that families have in common. part: what of a block it is, such as "adapter.gate";
    depth: from 0, of as many as the family with most of such blocks has."""

    part: str
    depth: int


def slots(shared: Mapping[str, Sequence[str]]) -> dict[Slot, dict[str, str]]:
    """By slot and family the tensor that has it. shared: by family the names of its tensors that
    may be shared, in the model's order. Block l of L has the slot floor(l * most / L), where most
    is the largest L."""
    parts: dict[str, dict[str, list[str]]] = {}
    for family, names in shared.items():
        for name in names:
            parts.setdefault(_part(name), {}).setdefault(family, []).append(name)
    found: dict[Slot, dict[str, str]] = {}
    for part, by_family in parts.items():
        most = max(map(len, by_family.values()))
        for family, names in by_family.items():
            for place, name in enumerate(names):
                slot = Slot(part, place * most // len(names))
                found.setdefault(slot, {})[family] = name
    return found


def _part(name: str) -> str:
    """What follows stage and block: "adapter.gate" of "stages.0.1.adapter.gate"."""
    return re.sub(r"^stages\.\d+\.(\d+\.)?", "", name)


def family_weights(examples: Mapping[str, float]) -> dict[str, float]:
    """By family, with the sum 1. examples: of each that moved, above 0."""
    most = CAP * min(examples.values())
    capped = {family: min(count, most) for family, count in examples.items()}
    total = sum(capped.values())
    return {family: count / total for family, count in capped.items()}


def aligned(
    moved: Mapping[str, Tensor], weights: Mapping[str, float], order: Collection[str]
) -> dict[str, Tensor]:
    """The movements of one slot by family, each without what of it points against another: for
    every other b in `order` with <g, g_b> < 0, g - min(1, w_b / w) <g, g_b> / |g_b|^2 g_b."""
    flat = {family: move.flatten().double() for family, move in moved.items()}
    found = {}
    for family, move in moved.items():
        left = flat[family].clone()
        for other in order:
            if other == family or (against := float(left @ flat[other])) >= 0:
                continue
            share = min(1.0, weights[other] / weights[family])
            left -= share * against / float(flat[other] @ flat[other]) * flat[other]
        found[family] = left.reshape(move.shape).to(move.dtype)
    return found


def common_step(moved: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """The mean of the movements, in float64 and in the order of names."""
    steps = [weights[family] * moved[family].double() for family in sorted(moved)]
    first = next(iter(moved.values()))
    return torch.stack(steps).sum(0).to(first.dtype)
