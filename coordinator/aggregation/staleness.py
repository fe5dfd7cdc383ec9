"""Late updates: brought forward to the model that they arrive at.

A job that began from w_s and returned w_i moved w_i - w_s. Used at w, s rounds later, it counts as
w + 0.5^(s / half-life) (w_i - w_s), with its own weight in the mean: the step of FedBuff (Nguyen et
al. 2022) with a half-life for its polynomial. Statistics of BatchNorm go the same share of the way
from w's to their own; counters stay as they came.

An update of parts of tensors, as of a narrower model or under masks, is passed on as it came: the
method that cut them knows where they lie.

What else is no tensor of the model (a vector of all weights: see fields.Role) has no w here: it
comes as sent + 0.5^(s / half-life) (returned - sent), what was not sent counting as zeros, and its
method is told `sent`. A correction is a difference already, and the client keeps all of it: it
stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from coordinator.cohorts.base import ClientUpdate
from edge_sdk.protocol.tensor_lists import role_of
from edge_sdk.protocol.tensors import Tensors


def rebase_late_updates(
    updates: Iterable[ClientUpdate],
    current: Mapping[str, Tensor],
    parameters: set[str],
    half_life: float,
) -> Iterator[ClientUpdate]:
    """The updates, late ones as if they had begun from `current`. parameters: names of those."""
    for update in updates:
        if update.staleness and not _is_of_parts(update, current):
            share = 0.5 ** (update.staleness / half_life)
            beside = {name: t for name, t in update.sent.items() if name not in current}
            moved = _moved(update, current, parameters, share)
            update = replace(update, tensors=moved, sent=beside)
        yield update
        del update  # no reference stays here


def _is_of_parts(update: ClientUpdate, current: Mapping[str, Tensor]) -> bool:
    return any(
        role_of(name)[0] == "packed" or (name in current and current[name].shape != tensor.shape)
        for name, tensor in update.tensors.items()
    )


def _moved(
    update: ClientUpdate, current: Mapping[str, Tensor], parameters: set[str], share: float
) -> Tensors:
    moved: Tensors = {}
    for name, tensor in update.tensors.items():
        if not tensor.is_floating_point() or role_of(name)[0] == "correction":
            moved[name] = tensor
        elif name not in current:
            began = update.sent.get(name)
            moved[name] = torch.lerp(
                torch.zeros_like(tensor) if began is None else began, tensor, share
            )
        elif name in parameters:
            now, limit = current[name], torch.finfo(tensor.dtype).max
            step = share * (tensor.double() - update.sent[name].double())  # of finite ones, finite
            moved[name] = (now.double() + step).clamp(-limit, limit).to(now.dtype)
        else:
            moved[name] = torch.lerp(current[name], tensor, share)
    return moved
