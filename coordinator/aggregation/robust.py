"""Aggregation that a minority of harmful clients cannot lead away, behind OwnersMean's interface.

trimmed-mean   coordinate-wise: of a tensor's n owners ceil(trim n) values are left out at each end
               (Yin et al. 2018). Rounded up, which the paper leaves open: down, 5 owners and a trim
               of 0.1 would be the plain mean. Where nothing would be left it is the median
median         coordinate-wise, the mean of the two middle values if n is even (Yin et al. 2018)
norm-bounded   mean of movements, each scaled down to at most the median norm of the round's owners
               (Sun et al. 2019, whose bound is a constant); of an even n the lower middle, so that
               one of two owners cannot lift the bound

A norm is that of one tensor, not of a stage: who may move a stage so far cannot spend it all on the
few numbers of an exit, and statistics of BatchNorm, in units of their own, need no rule of their
own. Price: of n different owners half are scaled a little in each tensor.

As in the mean a tensor has only its owners: one alone gives its value, identical ones give it to
the last bit, integers take the largest. The order of arrival does not matter, for norm-bounded but
for float32 rounding. Coordinate-wise rules ignore the weights, of examples or of staleness: a
harmful client names its own. `weight` reports them still: damping and generators count with them.

Memory: every update of a round at once, by reference until the first `result`: for emulated clients
n updates; for devices pages of mapped files, which the kernel drops when memory is short. Beside
them CHUNK_BYTES and one tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from coordinator.aggregation.mean import Kernel, OwnersMean, as_float32
from coordinator.aggregation.registry import register_rule
from coordinator.config import AggregationOptions
from edge_sdk.errors import ShapeError
from edge_sdk.protocol.tensors import Tensors

CHUNK_BYTES = 16 * 1024**2  # of coordinates sorted at once, all owners together
COLUMNS = 2**18  # entries taken to float64 at once
# (the owners' tensors, their weights, the tensor sent) -> aggregate
Rule: TypeAlias = Callable[[Sequence[Tensor], Sequence[float], Tensor], Tensor]


class RobustMean:
    """Holds the round's updates, aggregates them in the first `result`, and is a mean from then."""

    def __init__(self, rule: Rule) -> None:
        self._rule = rule
        self._held: list[tuple[Mapping[str, Tensor], float]] = []
        self._mean: OwnersMean | None = None

    def add_(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        if self._mean:
            self._mean.add_(tensors, weight)
        elif weight < 0:
            raise ValueError(f"aggregation weight {weight} is negative")
        elif weight > 0:
            self._held.append((tensors, weight))

    def weight(self, name: str) -> float:
        if self._mean:
            return self._mean.weight(name)
        return sum(weight for tensors, weight in self._held if name in tensors)

    def result(self, previous: Mapping[str, Tensor]) -> Tensors:
        if self._mean is None:
            self._mean = self._closed(previous)
            self._held = []
        return self._mean.result(previous)

    def _closed(self, previous: Mapping[str, Tensor]) -> OwnersMean:
        """A mean that holds each tensor's aggregate with the weight of all its owners."""
        mean = OwnersMean()
        for name, sent in previous.items():
            owners = [(tensors[name], w) for tensors, w in self._held if name in tensors]
            if not owners:
                continue
            brought, weights = zip(*owners, strict=True)
            for tensor in brought:
                if tensor.shape != sent.shape:
                    raise ShapeError(
                        f"{name} is {tuple(tensor.shape)}, expected {tuple(sent.shape)}"
                    )
            if sent.is_floating_point():
                mean.add_({name: self._rule(brought, weights, sent)}, sum(weights))
            else:
                for tensor, weight in owners:
                    mean.add_({name: tensor}, weight)
        return mean


def trimmed_mean(
    trim: float, owners: Sequence[Tensor], weights: Sequence[float], sent: Tensor
) -> Tensor:
    """Mean of what is left of each coordinate without the share `trim` at each end."""
    n = len(owners)
    cut = math.ceil(trim * n - 1e-9)  # 0.07 * 100 is a little more than 7
    return _middle_mean(owners, min(cut, (n - 1) // 2))


def median(owners: Sequence[Tensor], weights: Sequence[float], sent: Tensor) -> Tensor:
    return _middle_mean(owners, (len(owners) - 1) // 2)


def _middle_mean(owners: Sequence[Tensor], cut: int) -> Tensor:
    """Mean of each coordinate's values but the `cut` smallest and largest. Sums in float64, so that
    equal values give themselves and nothing leaves the range of those kept."""
    flats = [tensor.reshape(-1) for tensor in owners]  # each (P,)
    made = torch.empty(flats[0].shape, dtype=as_float32(flats[0]).dtype)
    columns = max(1, CHUNK_BYTES // (len(flats) * made.element_size()))
    for start in range(0, len(made), columns):
        end = start + columns
        rows = torch.stack([as_float32(flat[start:end]) for flat in flats]).numpy()  # (n, columns)
        rows.sort(axis=0)  # numpy takes a tenth of torch's time, which sorts indices too
        kept = rows[cut : len(rows) - cut]
        found = kept.mean(axis=0, dtype="float64").clip(kept[0], kept[-1])
        made[start:end] = torch.from_numpy(found)
    return made.reshape(owners[0].shape)


def norm_bounded(owners: Sequence[Tensor], weights: Sequence[float], sent: Tensor) -> Tensor:
    norms = [math.sqrt(squared_distance(tensor, sent)) for tensor in owners]
    bound = lower_median(norms)
    mean = OwnersMean()
    for tensor, norm, weight in zip(owners, norms, weights, strict=True):
        kept = tensor if norm <= bound else shortened(tensor, sent, bound / norm)
        mean.add_({"": kept}, weight)
    return mean.result({"": sent})[""]


def lower_median(values: Sequence[float]) -> float:
    """The middle value; of an even number the smaller of the two in the middle."""
    return sorted(values)[(len(values) - 1) // 2]


def squared_distance(tensor: Tensor, sent: Tensor) -> float:
    """|tensor - sent|^2, in float64: squares of finite float32 numbers stay finite."""
    parts = zip(tensor.reshape(-1).split(COLUMNS), sent.reshape(-1).split(COLUMNS), strict=True)
    return sum(float((new.double() - old.double()).square().sum()) for new, old in parts)


def shortened(tensor: Tensor, sent: Tensor, share: float) -> Tensor:
    """sent + share (tensor - sent), a new tensor; in float64, where no difference overflows."""
    if not share:
        return sent.clone()  # of an infinite movement too
    made = torch.empty(sent.shape, dtype=sent.dtype)
    flats = (each.reshape(-1).split(COLUMNS) for each in (made, tensor, sent))
    for part, new, old in zip(*flats, strict=True):
        part.copy_(torch.lerp(old.double(), new.double(), share))
    return made


@register_rule("trimmed-mean")
def trimmed_mean_kernel(settings: AggregationOptions) -> Kernel:
    return RobustMean(partial(trimmed_mean, settings.trim))


@register_rule("median")
def median_kernel(settings: AggregationOptions) -> Kernel:
    return RobustMean(median)


@register_rule("norm-bounded")
def norm_bounded_kernel(settings: AggregationOptions) -> Kernel:
    return RobustMean(norm_bounded)
