"""Tensors under masks: a boolean mask says which entries of a weight are kept. What travels of such
a weight NAME is "mask/NAME", one bit an entry, and "packed/NAME", the values that are kept: of n
entries n / 8 bytes and the values, instead of all n."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from edge_sdk.errors import ShapeError
from edge_sdk.protocol.tensor_lists import role_of
from edge_sdk.protocol.tensors import Tensors


def maskable(model: nn.Module) -> list[str]:
    """Names of the convolutions, linear and recurrent matrices: parameters of at least two axes.
    Biases and the scales of norms are never under a mask."""
    return [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]


def mask_bits(mask: Tensor) -> Tensor:
    """A bool mask of n entries as uint8 (ceil(n / 8),): entry i is bit i % 8 of byte i // 8."""
    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy(), bitorder="little"))


def mask_of(bits: Tensor, shape: torch.Size, name: str) -> Tensor:
    """The mask of `shape` that mask_bits made. Raises ShapeError for other bits."""
    size = shape.numel()
    if bits.dtype != torch.uint8 or bits.shape != (-(-size // 8),):
        raise ShapeError(
            f"mask of {name} is {tuple(bits.shape)} {bits.dtype}, expected uint8 "
            f"({-(-size // 8)},): a bit for each of {size} entries"
        )
    entries = np.unpackbits(bits.numpy(), bitorder="little")
    if entries[size:].any():
        raise ShapeError(f"mask of {name} has bits set behind the {size} entries of the weight")
    return torch.from_numpy(entries[:size].astype(bool)).view(shape)


def packed(tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> Tensors:
    """`tensors` as they travel, in their order: those of `masks` as their bits and kept values,
    the others as they are."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        if name in masks:
            made[f"mask/{name}"] = mask_bits(masks[name])
            # numpy's, as torch's first makes the places of all entries: 32 bytes for each
            values = tensor.detach().cpu().numpy()[masks[name].numpy()]
            made[f"packed/{name}"] = torch.from_numpy(values)
        else:
            made[name] = tensor
    return made


def unpacked(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
) -> tuple[Tensors, Tensors]:
    """The weights that travelled so, 0 where they are not kept, in their order, and the masks.
    shapes: of the model's tensors. Tensors of other roles are left out. Raises ShapeError for masks
    and values that do not fit each other or the model."""
    made: Tensors = {}
    masks: Tensors = {}
    for name, tensor in tensors.items():
        role, weight = role_of(name)
        if role == "weight":
            made[name] = tensor
        if role not in ("mask", "packed"):
            continue
        if weight not in shapes:
            raise ShapeError(f"{name}: {weight!r} does not belong to the model; rebuild its spec")
        if role == "mask":
            masks[weight] = mask_of(tensor, shapes[weight], weight)
            continue
        if weight not in masks:
            raise ShapeError(f"{name} came without mask/{weight} before it")
        kept = int(masks[weight].sum())
        if tensor.shape != (kept,):
            raise ShapeError(f"{name} is {tuple(tensor.shape)}, its mask keeps {kept} values")
        made[weight] = torch.zeros(shapes[weight], dtype=tensor.dtype)
        made[weight].numpy()[masks[weight].numpy()] = tensor.numpy()
    if lacking := sorted(masks.keys() - made.keys()):
        raise ShapeError(f"mask/{lacking[0]} came without packed/{lacking[0]}")
    return made, masks
