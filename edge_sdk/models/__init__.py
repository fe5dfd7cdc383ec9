"""Multi-exit model families by name. A user's family is registered on both sides:

    from edge_sdk.models import register_family
    register_family("mine", build)   # build(spec: ModelSpec) -> StagedModel of spec.exit exits

and loaded with `--import MODULE` on the command lines. With a struct of options, build(spec,
options) gets them checked (options.py). Exit e of a family must hold the same tensors under the
same names and shapes whatever deeper exits exist: a prefix is a real cut. Which of them a
coordinator may generate is `StagedModel.main_weights`; name a subset to leave some out.

A family made of a model that is known by other tensor names, as public weights are, also gives a
function from the spec to those names: `register_family("mine", build, names=names)`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.registry import Registry
from edge_sdk.models.adapters.attach import adapted
from edge_sdk.models.factorised import factorised
from edge_sdk.models.options import read_options
from edge_sdk.models.own_code import own_code
from edge_sdk.models.staged import StagedModel
from edge_sdk.models.structure import check_structure
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.table import task_of

__all__ = [
    "FAMILIES",
    "StagedModel",
    "build",
    "family_code",
    "find_family",
    "initial_tensors",
    "original_names",
    "register_family",
]


ONE_OUTPUT: tuple[Task, ...] = ("classify", "multilabel", "regress")  # (B, K) of an exit


@dataclass(frozen=True)
class Family:
    """build: of (spec), and (spec, options) where it has some. names: of the same, the original
    name of each tensor that has one. tasks: whose outputs its exits can give; takes_ids: inputs may
    be token ids, where the spec has a vocabulary. makes_any: what it makes is not known here, as
    the modules of a package are not, and is tried as a person's own."""

    build: Callable[..., StagedModel]
    options: type[msgspec.Struct] | None = None
    names: Callable[..., Mapping[str, str]] | None = None
    tasks: Collection[Task] = ONE_OUTPUT
    takes_ids: bool = False
    makes_any: bool = False

    @property
    def is_built_in(self) -> bool:
        """Of this package, whose contract suite knows what others are asked at run time."""
        return self.build.__module__.startswith(f"{__name__}.") and not self.makes_any


FAMILIES: Registry[Family] = Registry(
    "model family",
    "register_family",
    __name__,
    Path(__file__).parent,
    "; load your own with --import MODULE on both sides",
)


def register_family(
    name: str,
    build: Callable[..., StagedModel],
    options: type[msgspec.Struct] | None = None,
    names: Callable[..., Mapping[str, str]] | None = None,
    *,
    tasks: Collection[Task] = ONE_OUTPUT,
    takes_ids: bool = False,
    makes_any: bool = False,
) -> None:
    """Add a family; see Family. Raises ConfigError if the name is taken by another builder."""
    family = Family(build, options, names, tasks, takes_ids, makes_any)
    FAMILIES.add(name, family, build.__module__)


def find_family(name: str) -> Family:
    """Raises ConfigError, which lists the known ones."""
    return FAMILIES[name]


def original_names(spec: ModelSpec) -> dict[str, str]:
    """By the name of a tensor in the model, its name in the module that the family was made of, as
    files of pre-trained weights have it; several may have one. {}: the family has no other names.
    Raises ConfigError, also for what a family's own code raises."""
    family = FAMILIES[spec.family]
    if family.names is None:
        return {}
    with own_code(spec.family, "names", family.names):
        return dict(family.names(spec, *_options(family, spec)))


def build(spec: ModelSpec) -> StagedModel:
    """The model of `spec`, randomly initialised, with factors in the place of layers where its rank
    is below 1 (factorised.py), and with its adapters (adapters/). Raises ConfigError, also for what
    a family's own code raises and for what is no StagedModel of such tensors (structure.py)."""
    family = FAMILIES[spec.family]
    try:
        _check_task(family, spec)
        with own_code(spec.family, "build", family.build):
            model = family.build(spec, *_options(family, spec))
            if not family.is_built_in:
                check_structure(model, spec.exit)
        return adapted(factorised(model, spec.rank), spec.adapters)
    except ConfigError as error:
        if (name := f"family {spec.family!r}") in str(error):
            raise
        raise type(error)(f"{name}: {error}") from error


def _check_task(family: Family, spec: ModelSpec) -> None:
    task_of(spec.task).check(spec)
    if spec.task not in family.tasks:
        known = ", ".join(family.tasks)
        able = " or ".join(name for name in FAMILIES if spec.task in FAMILIES[name].tasks)
        raise ConfigError(f"it has no task {spec.task!r}, only {known}; take {able}")
    if spec.vocabulary and not family.takes_ids:
        got = f"takes floats, got token ids of a vocabulary of {spec.vocabulary}"
        raise ConfigError(f"family {spec.family!r} {got}; take the family transformer or llama")


def _options(family: Family, spec: ModelSpec) -> tuple[msgspec.Struct, ...]:
    """As the last argument of a family's functions, if it has any. Raises ConfigError."""
    return () if family.options is None else (read_options(spec, family.options),)


def family_code(
    spec: ModelSpec, doing: str, model: StagedModel | None = None
) -> AbstractContextManager[None]:
    """A context for calls into the code of a model's family: what it raises is a ConfigError that
    names family, layer and place. doing: what runs, where no layer of `model` is at work."""
    return own_code(spec.family, doing, FAMILIES[spec.family].build, model)


def initial_tensors(spec: ModelSpec, seed: int) -> dict[str, Tensor]:
    """Parameters and buffers of a fresh model, a function of (spec, seed) alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(spec).tensors()
