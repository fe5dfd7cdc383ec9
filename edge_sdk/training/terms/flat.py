"""All parameters as one vector (MH-pFedHN): who sends it knows of this model the number of its
weights. Statistics of BatchNorm, and other buffers, are no part of it: they stay here from round to
round, a fresh model's at first."""

from __future__ import annotations

from edge_sdk.models.flat import flatten, parameter_shapes, unflatten
from edge_sdk.protocol.plan_tensors import FLAT
from edge_sdk.protocol.tensor_lists import trained_names
from edge_sdk.protocol.tensors import Tensors
from edge_sdk.training.terms.base import Context, Term

KEPT = "statistics/"  # before a buffer's name, among what is kept


class Flat(Term):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        shapes = parameter_shapes(context.model)
        self._shapes = {name: shapes[name] for name in trained_names(shapes, self.plan.segments)}
        buffers = {f"{KEPT}{name}" for name, _ in context.model.named_buffers()}
        self._kept = {name: t.clone() for name, t in context.kept.items() if name in buffers}

    def received(self, tensors: Tensors) -> Tensors:
        rest = {name: tensor for name, tensor in tensors.items() if name != FLAT}
        statistics = {name.removeprefix(KEPT): t for name, t in self._kept.items()}
        return rest | unflatten(tensors[FLAT], self._shapes) | statistics

    def returned(self, tensors: Tensors) -> Tensors:
        vector = flatten(tensors, self._shapes)
        rest = {name: tensor for name, tensor in tensors.items() if name not in self._shapes}
        self._kept = {f"{KEPT}{name}": tensor.clone() for name, tensor in rest.items()}
        return {FLAT: vector}

    def kept(self) -> Tensors:
        return self._kept
