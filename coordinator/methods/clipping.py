"""`--clip FACTOR`: no update moves a stage further than FACTOR times what is usual.

Each stage (its exit included) is on its own (aggregation/movement.py): d = trained minus sent is
taken times min(1, FACTOR median / |d|), the median over the last MEMORY updates that owned the
stage, before this round. Within a round the bound is fixed, and what is remembered is in an order
drawn from (seed, round, client): the order of arrival changes nothing.

In a stage's first round there is nothing to compare with. The updates that hold such a stage are
kept until all of the round are here and are clipped by their own median; so the very first is
clipped too if others came beside it, and alone it is its own median: not clipped from FACTOR 1 on.

Statistics of BatchNorm are a group of their own in each stage, with their own median: left alone
(or taken along only when the weights are clipped) they would be a way around the clip. Counters are
left as they are. What travels beside the weights, such as differences of control variates, is a
third group, measured from zero. Norms are remembered before clipping: the bound can rise when
everybody's do, and a minority of absurd norms does not move a median.

In a first round all its updates are held by reference, as in robust.py.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from coordinator.aggregation.movement import Group, NormMemory
from coordinator.aggregation.robust import lower_median, shortened, squared_distance
from coordinator.cohorts.base import ClientUpdate
from coordinator.cohorts.sampling import job_seed
from coordinator.methods.base import Metrics
from edge_sdk.protocol.tensor_lists import role_of, stage_of

log = logging.getLogger(__name__)
KINDS = ("weights", "statistics", "tensors beside the weights")


class NormClip:
    """Bounds how far an update may move, by the norms of earlier ones. num_kinds: of KINDS, as many
    as updates bring."""

    def __init__(
        self,
        factor: float,
        parameters: Collection[str],
        num_stages: int,
        seed: int,
        *,
        num_kinds: int = 2,
    ) -> None:
        self.memory = NormMemory(num_stages, num_kinds)
        self._factor = factor
        self._parameters = frozenset(parameters)
        self._seed = seed

    def clipped(
        self,
        round: int,
        updates: Iterable[ClientUpdate],
        sent: Mapping[str, Tensor],
        metrics: Metrics,
    ) -> Iterator[ClientUpdate]:
        """The updates, those too long shortened, as soon as their bounds are known. When all have
        been taken, `metrics` has the figure `clipped_updates` and the norms are remembered."""
        bounds = {group: self._factor * m for group, m in self.memory.medians().items()}
        waiting: list[tuple[ClientUpdate, dict[Group, float]]] = []
        seen: list[tuple[int, dict[Group, float]]] = []
        metrics.values["clipped_updates"] = 0.0
        for update in updates:
            norms = self._norms_of(update, sent)
            seen.append((job_seed(self._seed, round, f"clip/{update.client.id}"), norms))
            if norms.keys() <= bounds.keys():
                yield self._shortened(round, update, norms, bounds, sent, metrics)
            else:
                waiting.append((update, norms))
        for group in {group for _, norms in waiting for group in norms} - bounds.keys():
            found = [norms[group] for _, norms in waiting if group in norms]
            bounds[group] = self._factor * lower_median(found)
        for update, norms in waiting:
            yield self._shortened(round, update, norms, bounds, sent, metrics)
        self.memory.remember(norms for _, norms in sorted(seen, key=lambda each: each[0]))

    def _norms_of(self, update: ClientUpdate, sent: Mapping[str, Tensor]) -> dict[Group, float]:
        squares: dict[Group, float] = {}
        for name, tensor in update.tensors.items():
            if group := self._group(name, tensor):
                squares[group] = squares.get(group, 0.0) + squared_distance(
                    tensor, _start(name, tensor, sent)
                )
        return {group: math.sqrt(total) for group, total in squares.items()}

    def _group(self, name: str, tensor: Tensor) -> Group | None:
        """None: a counter."""
        if not tensor.is_floating_point():
            return None
        role, weight = role_of(name)
        kind = 2 if role != "weight" else 0 if name in self._parameters else 1
        return stage_of(weight)[1] - 1, kind

    def _shortened(
        self,
        round: int,
        update: ClientUpdate,
        norms: Mapping[Group, float],
        bounds: Mapping[Group, float],
        sent: Mapping[str, Tensor],
        metrics: Metrics,
    ) -> ClientUpdate:
        shares = {g: bounds[g] / norm for g, norm in norms.items() if norm > bounds[g]}
        if not shares:
            return update
        metrics.values["clipped_updates"] += 1
        for (stage, kind), share in shares.items():
            said = "round %d: %s moved the %s of stage %d by %.3g, clipped to %.3g times that"
            what = (KINDS[kind], stage + 1, norms[stage, kind], share)
            log.info(said, round, update.client.id, *what)
        tensors = dict(update.tensors)
        for name, tensor in update.tensors.items():
            if (group := self._group(name, tensor)) in shares:
                tensors[name] = shortened(tensor, _start(name, tensor, sent), shares[group])
        return dataclasses.replace(update, tensors=tensors)


def _start(name: str, tensor: Tensor, sent: Mapping[str, Tensor]) -> Tensor:
    """What a tensor's movement is measured from."""
    return sent[name] if name in sent else torch.zeros_like(tensor)
