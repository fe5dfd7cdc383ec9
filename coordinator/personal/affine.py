"""Where generated weights begin. A hypernetwork begins all tensors alike, about 0 with a spread of
0.06: scales of BatchNorm too, which a fresh model has at 1, and convolutions whatever their size,
so that models learn slowly at first. The remedy (ours) is an offset and a scale for each tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edge_sdk.models.flat import flatten


@dataclass(frozen=True)
class Affine:
    """weights = offset + scale * generated; both (K,)."""

    offset: Tensor
    scale: Tensor

    def weights(self, made: Tensor) -> Tensor:
        return torch.addcmul(self.offset, self.scale, made)

    def delta(self, moved: Tensor) -> Tensor:
        """From what training moved the weights to what it would have the generated ones moved: the
        gradient of 1/2 |weights - trained|^2 by them."""
        return self.scale * moved


def fresh_start(
    fresh: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], hidden: int
) -> Affine:
    """With which the tensors of a generated model begin about as those of a `fresh` one: a tensor
    that is the same number throughout has that as its offset, another has its spread. shapes: of
    the parameters; hidden: the width of the hypernetwork's heads, whose first weights have a spread
    of about 1 / sqrt(3 hidden)."""
    offset, scale = {}, {}
    for name, shape in shapes.items():
        low, high = (float(end) for end in fresh[name].aminmax())
        offset[name] = torch.full(shape, low if low == high else 0.0)
        spread = float(fresh[name].std()) * math.sqrt(3 * hidden) if low < high else 1.0
        scale[name] = torch.full(shape, spread)
    return Affine(flatten(offset, shapes), flatten(scale, shapes))
