"""What the families of packages share: a module of torchvision, timm or transformers, made by its
name without its weights, and cut (from_module.py)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from msgspec.structs import replace
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models.cutting.stages import nearest
from edge_sdk.models.from_module import from_module, module_names, named_cuts
from edge_sdk.models.options import FamilyOptions
from edge_sdk.models.staged import StagedModel, drawn_inputs
from edge_sdk.protocol.messages import ModelSpec


class PackageOptions(FamilyOptions, frozen=True):
    model: Annotated[str, Meta(description="its name in the package")] = ""
    cuts: Annotated[
        str, Meta(description="modules to cut behind, with commas, or auto:N for N exits")
    ] = ""
    exits: Annotated[
        str, Meta(description="pool-linear, class-token or last-token (by the model)")
    ] = ""


MakeModule = Callable[[ModelSpec, Any], nn.Module]


def staged(
    spec: ModelSpec, options: PackageOptions, make: MakeModule, exits: str = "pool-linear"
) -> StagedModel:
    """make: the module of a spec and its options; exits: their kind where no option says it."""
    return from_module(
        make(spec, options),
        _cuts(type(options), make, msgspec.json.encode(replace(spec, exit=1))),
        input_shape=spec.input_shape,
        num_classes=spec.num_classes,
        exits=options.exits or exits,
        exit=spec.exit,
        vocabulary=spec.vocabulary,
        task=spec.task,
    )


def names_of(
    build: Callable[[ModelSpec, Any], StagedModel],
) -> Callable[[ModelSpec, Any], dict[str, str]]:
    """The function for `register_family(names=)`."""

    def names(spec: ModelSpec, options: PackageOptions) -> dict[str, str]:
        return module_names(build(spec, options))

    return names


@functools.lru_cache(maxsize=16)
def _cuts(kind: type[PackageOptions], make: MakeModule, encoded: bytes) -> tuple[str, ...]:
    """The names, the same for every depth of a model: found once in a process."""
    spec = msgspec.json.decode(encoded, type=ModelSpec)
    options = msgspec.convert(spec.options, kind)
    if not options.cuts:
        raise ConfigError("cuts are not said; give --cuts auto, or the names of modules")
    if not options.cuts.startswith("auto:"):
        return tuple(options.cuts.split(","))

    def inputs(count: int) -> Tensor:
        return drawn_inputs(spec, count)

    with torch.random.fork_rng(devices=[]):
        found = named_cuts(make(spec, options), options.cuts, inputs, spec.num_classes)
    return tuple(found)


def check_name(options: PackageOptions, package: str, known: list[str]) -> None:
    """Raises ConfigError for a model that the package has not, with the nearest."""
    if options.model in known:
        return
    if not options.model:
        raise ConfigError(f"no model is named; name one of {package}, as in {package}:{known[0]}")
    raise ConfigError(f"{package} has no model {options.model!r}; {nearest(options.model, known)}")


def check_whole(spec: ModelSpec, package: str) -> None:
    """Raises ConfigError for a narrower model."""
    if spec.width < 1:
        raise ConfigError(
            f"width {spec.width:g}: a model of {package} comes in one width; take a method that "
            "cuts by depth"
        )


def image_axes(spec: ModelSpec, package: str) -> tuple[int, int, int]:
    """(C, H, W). Raises ConfigError for other inputs."""
    if len(spec.input_shape) != 3 or spec.vocabulary:
        raise ConfigError(
            f"models of {package} take images (C, H, W), got {spec.input_shape}; take another "
            "family"
        )
    channels, height, width = spec.input_shape
    return channels, height, width
