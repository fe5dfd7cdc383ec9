"""Multi-exit model families by name. A user's family is registered on both sides:

    from edge_sdk.models import register_family
    register_family("mine", build)   # build(spec: ModelSpec) -> StagedModel of spec.exit exits

and loaded with `--import MODULE` on the command lines. Exit e of a family must hold the same
tensors under the same names and shapes whatever deeper exits exist: a prefix is a real cut. Which
of them a coordinator may generate is `StagedModel.main_weights`; name a subset to leave some out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from edge_sdk.errors import ConfigError
from edge_sdk.models.cnn import build_cnn
from edge_sdk.models.lstm import build_lstm
from edge_sdk.models.mlp import build_mlp
from edge_sdk.models.resnet import build_resnet18
from edge_sdk.models.staged import StagedModel
from edge_sdk.models.vgg import build_vgg
from edge_sdk.protocol.messages import ModelSpec

Build: TypeAlias = Callable[[ModelSpec], StagedModel]
FAMILIES: dict[str, Build] = {
    "cnn": build_cnn,
    "lstm": build_lstm,
    "mlp": build_mlp,
    "resnet18": build_resnet18,
    "vgg": build_vgg,
}

__all__ = ["FAMILIES", "StagedModel", "build", "find_family", "initial_tensors", "register_family"]


def register_family(name: str, build: Build) -> None:
    """Add a family. Raises ConfigError if the name is taken by another builder."""
    if FAMILIES.setdefault(name, build) is not build:
        raise ConfigError(f"model family {name!r} is registered already; choose another name")


def find_family(name: str) -> Build:
    """Raises ConfigError, which lists the known ones."""
    if name not in FAMILIES:
        raise ConfigError(
            f"unknown model family {name!r}; known: {', '.join(sorted(FAMILIES))}; "
            "load your own with --import MODULE on both sides"
        )
    return FAMILIES[name]


def build(spec: ModelSpec) -> StagedModel:
    """The model of `spec`, randomly initialised. Raises ConfigError."""
    model = find_family(spec.family)(spec)
    if not (len(model.stages) == len(model.exits) == spec.exit):
        raise ConfigError(
            f"family {spec.family!r} built {len(model.stages)} stages, {len(model.exits)} exits; "
            f"expected {spec.exit} of each"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(
                f"family {spec.family!r}: parameter {name} is {parameter.dtype}, expected floating "
                "point, as parameters are trained; make it a buffer (register_buffer)"
            )
    return model


def initial_tensors(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Parameters and buffers of a fresh model, a function of (spec, seed) alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(spec).tensors()
