"""What a built model must be before anything is computed with it: every tensor in a stage or an
exit, once in memory, of a kind that travels."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import DTYPES, NAMES


def check_structure(model: Any, exits: int) -> None:
    """Raise ConfigError, without the family's name, for what `build` returned."""
    if not isinstance(model, StagedModel):
        raise ConfigError(
            f"build returns {type(model).__name__}, expected a StagedModel; return "
            "edge_sdk.models.StagedModel(stages, exits)"
        )
    if not (len(model.stages) == len(model.exits) == exits):
        raise ConfigError(
            f"built {len(model.stages)} stages, {len(model.exits)} exits; expected {exits} of each"
        )
    if type(model).forward is not StagedModel.forward or "forward" in vars(model):
        raise ConfigError(
            "forward of the StagedModel is replaced, which training does not call; put what it "
            "does into the stages"
        )
    named, default = list(named_tensors(model)), torch.empty(0).device
    for name, tensor in named:
        _check_tensor(name, tensor, default)
    _check_shared(named)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every name of every tensor: a shared one has several."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _check_tensor(name: str, tensor: Tensor, default: torch.device) -> None:
    try:
        stage_of(name)
    except ShapeError as error:
        step = "it would be neither trained nor sent; put its layer into a stage or an exit"
        raise ConfigError(f"{error}: {step}") from error
    if is_lazy(tensor):
        raise ConfigError(
            f"{name} has no shape yet, its layer is lazy; give the layer its sizes (Linear "
            "instead of LazyLinear), or run one input through it in build"
        )
    if isinstance(tensor, nn.Parameter) and not tensor.is_floating_point():
        raise ConfigError(
            f"parameter {name} is {tensor.dtype}, expected floating point, as parameters are "
            "trained; make it a buffer (register_buffer)"
        )
    if tensor.dtype not in NAMES:
        raise ConfigError(
            f"{name} is {tensor.dtype}, which does not travel; use {', '.join(DTYPES)}"
        )
    if tensor.device != default or tensor.layout is not torch.strided:
        raise ConfigError(
            f"{name} is {tensor.layout} on {tensor.device}, expected a dense tensor on {default}; "
            "where training runs is chosen by --device"
        )


def _check_shared(named: list[tuple[str, Tensor]]) -> None:
    """Each stage is sent, trained and averaged with its exit and without the others, so a tensor
    that two stages hold would be another one in each. Two tensors in one piece of memory would be
    two on the way, and no longer one after it."""
    first: dict[int, str] = {}
    for name, tensor in named:
        other = first.setdefault(id(tensor), name)
        if stage_of(name)[1] != stage_of(other)[1]:
            raise ConfigError(
                f"{other} and {name} are one tensor, which only a stage and its own exit can "
                "share; give each its own (copy.deepcopy)"
            )
    own = {id(tensor): (name, tensor) for name, tensor in reversed(named)}.values()
    held = sorted((*_extent(tensor), name) for name, tensor in own)
    for (_, end, one), (start, _, other) in itertools.pairwise(held):
        if 0 < start < end:  # 0: no memory
            raise ConfigError(
                f"{one} and {other} lie in the same memory; clone one, or within one stage and its "
                "exit make them one Parameter"
            )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses of its whole storage: safetensors refuses even views that do not overlap."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
