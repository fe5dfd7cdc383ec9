"""A model's parameters as one vector, and back: the one list of their order for both sides.

The order is that in which the model registers them, stages before exits; buffers, such as the
statistics of BatchNorm, are no part of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edge_sdk.errors import ShapeError
from edge_sdk.protocol.tensors import Tensors


def parameter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """By name, in the vector's order."""
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def num_weights(shapes: Mapping[str, torch.Size]) -> int:
    """Length of the vector."""
    return sum(shape.numel() for shape in shapes.values())


def flatten(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> Tensor:
    """The vector (K,) of the named tensors, a copy. Raises ShapeError for one that is missing or
    otherwise shaped."""
    for name, shape in shapes.items():
        if name not in tensors or tensors[name].shape != shape:
            got = tuple(tensors[name].shape) if name in tensors else "missing"
            raise ShapeError(f"{name} is {got}, expected {tuple(shape)}; rebuild the model's spec")
    return torch.cat([tensors[name].detach().reshape(-1) for name in shapes])


def unflatten(flat: Tensor, shapes: Mapping[str, torch.Size]) -> Tensors:
    """The tensors of a vector (K,), by name; views of it. Raises ShapeError for another length."""
    wanted = num_weights(shapes)
    if flat.shape != (wanted,):
        raise ShapeError(
            f"a vector of {tuple(flat.shape)} weights came for a model of {wanted}; both sides "
            "must have the same model, so tell the coordinator the number of weights of this one"
        )
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {
        name: part.view(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)
    }
