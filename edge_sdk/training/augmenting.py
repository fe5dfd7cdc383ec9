"""A user's own change of the training inputs at random: each batch is changed anew in every epoch.

It is named MODULE:FUNCTION and imported by the trainer, a process of its own that has none of the
program's objects; pickling them would run what a file says. A callable of torchvision.transforms.v2
in a module is such a function."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from edge_sdk.errors import ConfigError, EdgeError
from edge_sdk.hardware.process_memory import is_for_memory
from edge_sdk.helpers.imports import import_module
from edge_sdk.helpers.text import one_line

Augment: TypeAlias = Callable[[Tensor], Tensor]


def load_augment(name: str, x: Tensor) -> Augment:
    """The function of this name, tried on inputs x (n, *input_shape). It takes a batch as a model
    does, scaled float32 or token ids (B, *input_shape), and returns another of that shape. What it
    draws by torch's global generator is a function of the job's seed. Raises ConfigError, also when
    called, for what it raises or returns."""
    module, _, function = name.partition(":")
    import_module(module)
    found = getattr(importlib.import_module(module), function, None)
    if not callable(found):
        got = "nothing of that name" if found is None else type(found).__name__
        raise ConfigError(f"augment {name!r}: got {got}, expected a function of the module")

    @torch.no_grad()
    def augment(batch: Tensor) -> Tensor:
        shape = tuple(batch.shape)
        try:
            made = found(batch)
        except EdgeError:
            raise
        except Exception as error:
            if is_for_memory(error):
                raise
            said = one_line(f"{type(error).__name__}: {error}")
            raise ConfigError(f"augment {name!r} raises {said}; mend it") from error
        if not isinstance(made, Tensor) or tuple(made.shape) != shape or made.dtype != batch.dtype:
            got = type(made).__name__
            if isinstance(made, Tensor):
                got = f"{tuple(made.shape)} of {made.dtype}"
            raise ConfigError(f"augment {name!r}: got {got}, expected {shape} of {batch.dtype}")
        if not bool(torch.isfinite(made).all()):
            raise ConfigError(f"augment {name!r} gives NaN or infinite inputs; mend it")
        return made

    with torch.random.fork_rng(devices=[]):
        augment(x[:2].clone())
    return augment
