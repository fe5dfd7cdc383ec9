"""How far updates move: norms of trained minus sent by group, and a memory of earlier ones.

The norm of an update depends on how many stages it holds, so each stage (its exit included) is on
its own; and so are statistics of BatchNorm, which are in other units than weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch

from coordinator.aggregation.robust import lower_median

MEMORY = 64  # updates
NONE = -1.0
Group: TypeAlias = tuple[int, int]  # (stage from 0, kind from 0)


class NormMemory:
    """The norms of the last MEMORY updates of each group. norms: (stages, kinds, MEMORY) float64,
    the newest last, -1 where there is none yet: 1 kB a stage and two kinds."""

    def __init__(self, num_stages: int, num_kinds: int) -> None:
        self.norms = torch.full((num_stages, num_kinds, MEMORY), NONE, dtype=torch.float64)

    def medians(self, least: int = 1) -> dict[Group, float]:
        """Of the groups that know at least so many norms; of an even number the lower middle."""
        found = {}
        for stage, kinds in enumerate(self.norms.tolist()):
            for kind, held in enumerate(kinds):
                if len(known := [norm for norm in held if norm != NONE]) >= least:
                    found[stage, kind] = lower_median(known)
        return found

    def remember(self, seen: Iterable[Mapping[Group, float]]) -> None:
        """Those of one update after another; the memory is a new tensor."""
        self.norms = self.norms.clone()
        for norms in seen:
            for (stage, kind), norm in norms.items():
                held = self.norms[stage, kind]
                self.norms[stage, kind] = torch.cat([held[1:], held.new_tensor([norm])])
