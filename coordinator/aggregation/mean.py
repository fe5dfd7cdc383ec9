"""The aggregation kernel: the weighted mean of each tensor over those who own it; what withstands
harmful updates, behind the same interface, is in robust.py.

A running mean rather than a running sum: identical clients in give the identical model out, to the
last bit, and memory is one model whatever the number of clients. A tensor that nobody brought keeps
its old value. Float statistics of BatchNorm follow the same rule; integers take the largest.
Another order of arrival changes the result by float32 rounding only; sums in float64 would not, for
the memory of a second model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from coordinator.aggregation.registry import register_rule
from coordinator.config import AggregationOptions
from edge_sdk.errors import ShapeError
from edge_sdk.protocol.tensors import Tensors


class Kernel(Protocol):
    """One round's updates to a new model. What is added after the first `result` is folded into it
    as into a mean of the weights so far."""

    def add_(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """One contribution, whose tensors nobody changes from now on. weight 0 changes nothing.
        Raises ShapeError."""

    def weight(self, name: str) -> float:
        """Sum of the weights of those who brought tensor `name`."""

    def result(self, previous: Mapping[str, Tensor]) -> Tensors:
        """The new model: an aggregate where there is an owner, else `previous` itself. Same order
        and dtypes as `previous`, the model that was sent out."""


class OwnersMean:
    """theta[k] = sum_i a_i w_i[k] / sum_i a_i over the i that brought tensor k, in float32."""

    def __init__(self) -> None:
        self._means: Tensors = {}
        self._weights: dict[str, float] = {}

    def add_(self, tensors: Mapping[str, Tensor], weight: float) -> None:
        """Fold one contribution in; its tensors may be freed then. weight 0 changes nothing."""
        if weight < 0:
            raise ValueError(f"aggregation weight {weight} is negative")
        if weight == 0:
            return
        for name, tensor in tensors.items():
            mean = self._means.get(name)
            total = self._weights.get(name, 0.0) + weight
            self._weights[name] = total
            if mean is None:
                self._means[name] = as_float32(tensor).clone()
            elif mean.shape != tensor.shape:
                raise ShapeError(f"{name} is {tuple(tensor.shape)}, expected {tuple(mean.shape)}")
            elif mean.is_floating_point():
                mean.lerp_(tensor.to(mean.dtype), weight / total)  # what is generated is float32
            else:
                torch.maximum(mean, tensor, out=mean)

    def weight(self, name: str) -> float:
        """Sum of the weights of those who brought tensor `name`."""
        return self._weights.get(name, 0.0)

    def result(self, previous: Mapping[str, Tensor]) -> Tensors:
        """The new model: means where there is an owner, else `previous` itself. Same order and
        dtypes as `previous`."""
        return {
            name: self._means[name].to(old.dtype) if name in self._means else old
            for name, old in previous.items()
        }


def as_float32(tensor: Tensor) -> Tensor:
    """Itself, half precision as float32: for sums."""
    return tensor.float() if tensor.dtype == torch.float16 else tensor


@register_rule("mean")
def mean_kernel(settings: AggregationOptions) -> Kernel:
    return OwnersMean()
