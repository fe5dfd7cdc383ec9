"""Participants that hold parts of a tensor: the weighted mean of each element over those who hold
it.

    theta[x] = sum_i a_i w_i[x] / sum_i a_i   over the i whose part contains the element x

A part is an index per axis (width methods: the product of output and input channels), or a boolean
mask of elements. As in mean.py a running mean: identical clients in, identical model out, to the
last bit; an element that nobody holds keeps its value, bit by bit; integers take the largest; half
precision is summed in float32; another order changes the result by float32 rounding only.

Memory: one model, and its weights, one for each combination of indices on the axes that anybody
cuts: of a 3 x 3 convolution a ninth of its size, of a whole tensor one number, of a masked one its
size. It does not grow with the clients.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from coordinator.aggregation.mean import as_float32
from edge_sdk.errors import ShapeError
from edge_sdk.protocol.tensors import Tensors

# Of a tensor: per axis the indices that are held (1-D int64, each once) or None for all of it, and
# nothing for axes that are left out at the end; or a bool mask of the tensor's shape.
Part: TypeAlias = tuple[Tensor | None, ...] | Tensor
WHOLE: Part = ()


def cut(tensors: Mapping[str, Tensor], parts: Mapping[str, Part]) -> Tensors:
    """The parts of `tensors`, as new tensors; a tensor without a part is itself. What a mask leaves
    is 1-D, in the order of the elements. Raises ShapeError for a part that does not fit."""
    made = dict(tensors)
    for name in tensors.keys() & parts.keys():
        _check(parts[name], tensors[name].shape, name)
        made[name] = tensors[name][_index(parts[name], tensors[name].shape)].clone()
    return made


class SlicedMean:
    """One round's updates to a new model. sent: the whole model that the parts were cut from."""

    def __init__(self, sent: Mapping[str, Tensor]) -> None:
        self._sent = sent
        self._means: Tensors = {}
        self._weights: Tensors = {}  # float32, size 1 on axes that nobody cuts

    def add_(self, tensors: Mapping[str, Tensor], weight: float, parts: Mapping[str, Part]) -> None:
        """Fold one contribution in; its tensors may be freed then. parts: where they lie in the
        whole, as `cut` takes them; whole tensors need none. weight 0 changes nothing. Raises
        ShapeError for a tensor that is not of the model, or not of its part's shape."""
        if weight < 0:
            raise ValueError(f"aggregation weight {weight} is negative")
        if weight == 0:
            return
        for name, tensor in tensors.items():
            if (whole := self._sent.get(name)) is None:
                raise ShapeError(f"tensor {name!r} does not belong to the model; rebuild its spec")
            part = parts.get(name, WHOLE)
            wanted = _check(part, whole.shape, name)
            if tuple(tensor.shape) != wanted:
                raise ShapeError(
                    f"{name} is {tuple(tensor.shape)}, expected {wanted} of the model's "
                    f"{tuple(whole.shape)}; both sides must build the same ModelSpec"
                )
            self._fold_(name, tensor, weight, part)

    def _fold_(self, name: str, tensor: Tensor, weight: float, part: Part) -> None:
        whole = self._sent[name]
        if name not in self._means:
            self._means[name] = as_float32(whole).clone()
            self._weights[name] = torch.zeros([1] * whole.ndim)
        mean, weights = self._means[name], self._widened(name, part)
        here, there = _index(part, mean.shape), _index(part, weights.shape)
        held, before = mean[here], weights[there]
        total = before + weight
        if mean.is_floating_point():
            # x / x is 1 where the same product with 1 / x may not be: the first owner's value stays
            share = torch.full_like(total, weight) / total
            mean[here] = torch.lerp(held, tensor.to(mean.dtype), share.to(mean.dtype))
        else:
            mean[here] = torch.where(before > 0, torch.maximum(held, tensor), tensor)
        weights[there] = total

    def _widened(self, name: str, part: Part) -> Tensor:
        """The tensor's weights, with an entry for each index of the axes that `part` cuts."""
        weights, shape = self._weights[name], self._sent[name].shape
        axes = range(len(shape))
        cuts = (
            axes if isinstance(part, Tensor) else [a for a, i in enumerate(part) if i is not None]
        )
        wanted = [shape[axis] if axis in cuts else weights.shape[axis] for axis in axes]
        if list(weights.shape) != wanted:
            self._weights[name] = weights.expand(wanted).clone()
        return self._weights[name]

    def owned(self, name: str) -> Tensor:
        """Whether anybody held each element of tensor `name`: bool, size 1 on axes that nobody
        cut."""
        unheld = torch.zeros([1] * self._sent[name].ndim)
        return self._weights.get(name, unheld) > 0

    def coverage(self, names: Collection[str]) -> float:
        """The share of the elements of these tensors that somebody held."""
        sizes = {name: size for name in names if (size := self._sent[name].numel())}
        held = sum(size * float(self.owned(name).float().mean()) for name, size in sizes.items())
        return held / sum(sizes.values())

    def result(self) -> Tensors:
        """The new model: means where there is an owner, else what was sent; tensors without any
        owner are those themselves. Same order and dtypes."""
        return {
            name: torch.where(self.owned(name), self._means[name].to(old.dtype), old)
            if name in self._means
            else old
            for name, old in self._sent.items()
        }


def _check(part: Part, shape: torch.Size, name: str) -> tuple[int, ...]:
    """The shape of a part. Raises ShapeError for one that does not fit a tensor of `shape`."""
    where = f"part of {name}, which is {tuple(shape)}"
    if isinstance(part, Tensor):
        if part.dtype != torch.bool or part.shape != shape:
            raise ShapeError(
                f"{where}: the mask is {tuple(part.shape)} {part.dtype}, not bool of it"
            )
        return (int(part.sum()),)
    if len(part) > len(shape):
        raise ShapeError(f"{where}: it has indices of {len(part)} axes")
    sizes = list(shape)
    for axis, kept in enumerate(part):
        if kept is None:
            continue
        if kept.ndim != 1 or kept.dtype != torch.int64 or len(kept.unique()) != len(kept):
            raise ShapeError(f"{where}: indices of axis {axis} are not a list of different int64")
        if len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < shape[axis]:
            raise ShapeError(f"{where}: indices of axis {axis} reach {int(kept.max())}")
        sizes[axis] = len(kept)
    return tuple(sizes)


def _index(part: Part, shape: torch.Size) -> tuple[slice | Tensor, ...] | Tensor:
    """What a tensor of `shape` is indexed with. A prefix or window is a view; else the axes from
    the first index to the last are a mesh, for torch moves axes that others stand between."""
    if isinstance(part, Tensor):
        return part
    axes: list[slice | Tensor] = [slice(None) if kept is None else _run(kept) for kept in part]
    listed = [axis for axis, kept in enumerate(axes) if isinstance(kept, Tensor)]
    if len(listed) < 2:
        return tuple(axes)
    first, last = listed[0], listed[-1]
    for axis in range(first, last + 1):
        kept = part[axis]
        indices = torch.arange(shape[axis]) if kept is None else kept
        axes[axis] = indices.reshape(-1, *[1] * (last - axis))
    return tuple(axes)


def _run(kept: Tensor) -> slice | Tensor:
    """The indices as a slice, if each is the next one."""
    if len(kept) and bool((kept.diff() == 1).all()):
        return slice(int(kept[0]), int(kept[-1]) + 1)
    return kept
