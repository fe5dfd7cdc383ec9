"""The models that clients choose among, as vectors of weights and as tensors by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator.cohorts.base import Client
from coordinator.personal.affine import Affine, fresh_start
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.flat import flatten, num_weights, parameter_shapes, unflatten
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensors import Tensors


@dataclass(frozen=True)
class Variant:
    """One of the models. order: of all its tensors; shapes: of its parameters; buffers: of a fresh
    one; affine: None where what is generated are the weights themselves."""

    spec: ModelSpec
    order: tuple[str, ...]
    shapes: Mapping[str, torch.Size]
    buffers: Tensors
    affine: Affine | None

    @property
    def num_weights(self) -> int:
        return num_weights(self.shapes)

    def weights(self, made: Tensor) -> Tensor:
        """(K,) as generated -> (K,) as they travel."""
        return self.affine.weights(made) if self.affine else made

    def delta(self, moved: Tensor) -> Tensor:
        """The gradient by what was generated, of that by the weights."""
        return self.affine.delta(moved) if self.affine else moved

    def tensors(self, weights: Tensor, buffers: Mapping[str, Tensor] | None = None) -> Tensors:
        """By name, in the model's order, each of its own memory. buffers: a fresh model's by
        default."""
        held = unflatten(weights, self.shapes) | dict(self.buffers if buffers is None else buffers)
        return {name: held[name].clone() for name in self.order}

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        return flatten(tensors, self.shapes)


def make_variant(spec: ModelSpec, seed: int, hidden: int, *, is_fresh: bool) -> Variant:
    """hidden: of the hypernetwork. is_fresh: its tensors begin as those of a fresh model."""
    fresh, shapes = initial_tensors(spec, seed), parameter_shapes(build(spec))
    affine = fresh_start(fresh, shapes, hidden) if is_fresh else None
    buffers = {name: tensor for name, tensor in fresh.items() if name not in shapes}
    return Variant(spec, tuple(fresh), shapes, buffers, affine)


def variant_of(client: Client, variants: Sequence[Variant]) -> Variant | None:
    """The client's model: the one that it chose; None: one of its own, of which nothing but the
    number of weights is known. Who says neither has the one of its exit."""
    if client.num_weights and not client.variant:
        return None
    return variants[(client.variant or max(1, min(client.exit, len(variants)))) - 1]
