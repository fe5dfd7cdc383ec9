"""The channels of one axis of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Integers: TypeAlias = NDArray[np.int64]
NO_GROUP = -1


@dataclass(frozen=True)
class Axis:
    """Of each index of an axis: its group of channels, NO_GROUP for one that no width takes away,
    and which channel of the group it is. Both (n,)."""

    groups: Integers
    channels: Integers


def joined(axes: list[Axis]) -> Axis:
    """One axis after the other."""
    groups, channels = zip(*((axis.groups, axis.channels) for axis in axes), strict=True)
    return Axis(np.concatenate(groups), np.concatenate(channels))
