"""An aggregation rule of your own: the geometric median of the updates (Pillutla et al. 2022).

    PYTHONPATH=examples edge-coordinator emulate --import own_rule --aggregation geometric-median

Weiszfeld's steps: each owner's tensor is weighted by one over its distance to the mean before.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from msgspec import Meta
from torch import Tensor

from coordinator.aggregation.mean import Kernel, OwnersMean
from coordinator.aggregation.registry import register_rule
from coordinator.aggregation.robust import RobustMean, squared_distance
from coordinator.config import AggregationOptions, Options, flag


class Weiszfeld(Options, frozen=True, kw_only=True):
    steps: Annotated[int, Meta(ge=1, le=100), flag("towards the geometric median")] = 4


@register_rule("geometric-median", options=Weiszfeld)
def geometric_median(settings: AggregationOptions, options: Weiszfeld) -> Kernel:
    return RobustMean(partial(median_of, options.steps))


def median_of(steps: int, owners: Sequence[Tensor], weights: Sequence[float], sent: Tensor):
    centre, shares = sent, list(weights)
    for _ in range(steps):
        mean = OwnersMean()
        for tensor, share in zip(owners, shares, strict=True):
            mean.add_({"": tensor}, share)
        centre = mean.result({"": sent})[""]
        distances = [max(1e-6, math.sqrt(squared_distance(t, centre))) for t in owners]
        shares = [weight / far for weight, far in zip(weights, distances, strict=True)]
    return centre
