"""Which part of each tensor a narrower model of the same family holds: `ModelSpec.width` is the
share of the channels of each group, and `slice_of` says which ones."""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from edge_sdk.errors import ConfigError
from edge_sdk.models import StagedModel, build, family_code, find_family
from edge_sdk.models.channel_axes import NO_GROUP, Axis
from edge_sdk.models.channels import Channels, trace_channels
from edge_sdk.models.staged import drawn_inputs
from edge_sdk.protocol.messages import ModelSpec


def slice_of(spec: ModelSpec, width: float, shift: int = 0) -> dict[str, tuple[Tensor | None, ...]]:
    """Of each tensor of `spec`, by name: per axis the indices that the model of width `width`
    holds, 1-D int64 in the order of that model, or None for all.

    spec: the wider model. Of a group of C channels the c that the narrow model has: the first ones
    (HeteroFL), or with a shift s those from s on, beginning anew after the last one (FedRolex);
    s counts modulo C, the same channels in every tensor of the group. Raises ConfigError for a
    width that is larger than the model's own, and for a family that cannot be followed."""
    if not 0 < width <= spec.width:
        raise ConfigError(f"width {width} of a model of width {spec.width}, expected a part of it")
    found, ndims = _channels(find_family(spec.family).build, msgspec.json.encode(spec), width)
    return {
        name: tuple(
            _kept(held, found, shift) if (held := found.axes.get(name, {}).get(axis)) else None
            for axis in range(ndim)
        )
        for name, ndim in ndims.items()
    }


@functools.lru_cache(maxsize=64)
def _channels(
    made_by: Callable[..., StagedModel], encoded: bytes, width: float
) -> tuple[Channels, dict[str, int]]:
    """And the number of axes of each tensor. made_by: a family's name may be registered again."""
    spec = msgspec.json.decode(encoded, type=ModelSpec)
    with torch.random.fork_rng(devices=[]):
        whole, narrow = build(spec).eval(), build(replace(spec, width=width))
        x = drawn_inputs(spec, 2)
    ndims = {name: tensor.ndim for name, tensor in whole.tensors().items()}
    parts = narrow.tensors()
    try:
        if ndims != {name: tensor.ndim for name, tensor in parts.items()}:
            raise ConfigError(f"at width {width} it has other tensors, not only smaller ones")
        with family_code(spec, "following its channels", whole):
            found = trace_channels(whole, parts, x)
        for name, axes in found.axes.items():
            for axis, held in axes.items():
                got, wanted = len(_kept(held, found, 0)), parts[name].shape[axis]
                if got != wanted:
                    raise ConfigError(
                        f"axis {axis} of {name} is {wanted} at width {width}, its channels make "
                        f"{got}; give all layers of the same channels the same share of them"
                    )
    except ConfigError as error:
        if (name := f"family {spec.family!r}") in str(error):
            raise
        raise ConfigError(f"{name}: {error}") from error
    return found, ndims


def _kept(held: Axis, found: Channels, shift: int) -> Tensor:
    """The indices of an axis that the narrow model has. A channel that stands there several times
    (positions that were flattened, gates) is kept each time: where the narrow model has the r-th of
    its channel c, the whole one has the r-th of channel (c + shift) mod C."""
    places = np.arange(len(held.groups))
    for group in np.unique(held.groups[held.groups != NO_GROUP]).tolist():
        size, small = found.sizes[group]
        own = np.flatnonzero(held.groups == group)
        by_channel = own[np.argsort(held.channels[own], kind="stable")].reshape(size, -1)
        moved_to = by_channel[(np.arange(size) + shift) % size]
        moved_to[small:] = -1
        places[by_channel] = moved_to
    return torch.from_numpy(places[places >= 0])
