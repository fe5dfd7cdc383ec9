"""Settings by their paths and their flags: what each is called, checked, changed and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec
from msgspec import UNSET
from msgspec.structs import replace

from coordinator.config import PARTS, Backbone, Options, Own, RunConfig
from edge_sdk.data.contract import NOT_KNOWN, TrainedOn
from edge_sdk.errors import ConfigError, DataError, UsageError
from edge_sdk.helpers.text import destination, one_line, plain_words
from edge_sdk.protocol.fields import Adapters, Task
from edge_sdk.protocol.messages import Plan

Checked = TypeVar("Checked")


ADAPT = "model.adapters.kind"  # which a method may have a default of
OTHER_FLAGS = {  # of settings that do not say it themselves
    "data": "--data (serve: --test)",
    "trained_on.class_names": "class_names of --data (serve: --test)",
    "model.family": "--model",
    "model.exit": "--exits",
    "model.options": "--option",
    "model.adapters": "--adapt",
    ADAPT: "--adapt",
    "model.adapters.rank": "--adapt-rank",
    "model.adapters.branches": "--adapt-branches",
    "model.adapters.targets": "--adapt-targets",
    "model.adapters.first": "--adapt-from",
    "model.input_shape": "--input",
    "model.num_classes": "--classes",
    "model.task": "--task",
    "model.vocabulary": "--vocabulary",
}


@dataclass(frozen=True)
class Flag:
    """Of one field of a struct. hint: its type. kind: of its values. is_list: numbers with commas
    between them. choices: () for any. default: None where the field has none. only: another flag
    and its values, with which alone this one counts; (): always."""

    name: str
    help: str
    metavar: str | None
    hint: Any
    kind: type[bool | int | float | str]
    is_list: bool
    choices: tuple[str, ...]
    default: Any
    only: tuple[str, ...]

    @property
    def destination(self) -> str:
        return destination(self.name)


def flags_of(kind: type[msgspec.Struct]) -> dict[str, Flag]:
    """By field, in order: of those that are described with `flag` (config.py)."""
    hints = get_type_hints(kind, include_extras=True)
    found = ((info, _flag(info, hints[info.name])) for info in msgspec.structs.fields(kind))
    return {info.name: flag for info, flag in found if flag}


def _flag(info: msgspec.structs.FieldInfo, hint: Any) -> Flag | None:
    metas = [meta for meta in getattr(hint, "__metadata__", ()) if meta.description]
    if not metas:
        return None
    plain = get_args(hint)[0]
    if type(None) in get_args(plain):  # int | None
        plain = next(kind for kind in get_args(plain) if kind is not type(None))
    while get_origin(plain) is Annotated:
        plain = get_args(plain)[0]
    choices = get_args(plain) if get_origin(plain) is Literal else ()
    extra = metas[-1].extra or {}
    return Flag(
        name=extra.get("flag") or "--" + info.name.replace("_", "-"),
        help=metas[-1].description,
        metavar=extra.get("metavar") or None,
        hint=hint,
        kind=plain if plain in (bool, int, float) else str,
        is_list=get_origin(plain) is tuple,
        choices=choices,
        default=None if info.default is msgspec.NODEFAULT else info.default,
        only=tuple(extra.get("only", ())),
    )


def checked(config: RunConfig) -> RunConfig:
    """The same config, its constraints checked, and those of the plan that devices get: a struct
    made in Python is not by itself. Raises UsageError naming the flag."""
    good = _converted(config, RunConfig)
    if good.exit_weights and len(good.exit_weights) != good.model.exit:
        raise UsageError(
            f"--exit-weights are {len(good.exit_weights)}, expected one for each of the "
            f"{good.model.exit} --exits"
        )
    if good.mode == "async" and good.late == "drop":
        raise UsageError(
            "--late drop has no place with --mode async, where most updates come late; leave it out"
        )
    if good.exit_weights and not any(good.exit_weights):
        raise UsageError("--exit-weights are all 0, so nothing would be trained; give one above 0")
    _converted(good.plan(good.rounds), Plan)
    return good


def _converted(settings: msgspec.Struct, kind: type[Checked]) -> Checked:
    return _read(msgspec.to_builtins(settings), kind, flag_of)


def _read(value: Any, kind: type[Checked], flag: Callable[[str], str]) -> Checked:
    """flag: of a setting's path."""
    try:
        return msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        expected, _, place = str(error).partition(" - at ")
        found = re.search(r"\$\.([a-z0-9_.]+)", place)
        if not found:
            raise UsageError(f"setting refused: {plain_words(expected)}; see --help") from error
        for part in found[1].split("."):
            value = value[part]
        raise UsageError(
            f"{flag(found[1])} is {one_line(repr(value))}, {plain_words(expected)}; see --help"
        ) from error


def own_options(given: Own, kind: type[Options] | None, whose: str) -> tuple[Options, ...]:
    """The struct of what a method, rule or generator has of its own, or nothing where it has none.
    Raises ConfigError for names that it does not have, which lists its own, and for values."""
    values = {} if given is UNSET else given
    flags = flags_of(kind) if kind else {}
    if unknown := sorted(set(values) - set(kind.__struct_fields__ if kind else ())):
        known = ", ".join(kind.__struct_fields__) if kind else "none"
        raise UsageError(f"{whose} has no option {', '.join(unknown)}; known: {known}")
    if kind is None:
        return ()
    return (_read(values, kind, lambda field: flags[field].name if field in flags else field),)


def flag_of(path: str) -> str:
    """The flag of a setting such as "generator.epochs"."""
    if path in OTHER_FLAGS:
        return OTHER_FLAGS[path]
    *part, field = path.split(".")
    kind = PARTS.get(".".join(part)) if part else RunConfig
    flags = flags_of(kind) if kind else {}
    return flags[field].name if field in flags else "--" + field.replace("_", "-")


@cache
def shared_flags() -> dict[str, Flag]:
    """By path, e.g. "server.lr": the flags of all settings that every run has."""
    parts: dict[str, type[Options]] = {"": RunConfig, **PARTS}
    return {
        f"{part}.{field}".lstrip("."): flag
        for part, kind in parts.items()
        for field, flag in flags_of(kind).items()
    }


def value_at(config: RunConfig, path: str) -> Any:
    return attrgetter(path)(config)


def changed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """With other values at some paths, e.g. {"server.lr": 0.5}; "own.": of what the method has of
    its own; ADAPT: of a model that has adapters already nothing is changed."""
    for path, value in values.items():
        part, _, field = path.rpartition(".")
        if path == ADAPT:
            adapters = config.model.adapters or Adapters(kind=value)
            config = replace(config, model=replace(config.model, adapters=adapters))
            continue
        if part == "own":
            value = ({} if config.own is UNSET else config.own) | {field: value}
            config = replace(config, own=value)
            continue
        if part:
            value = replace(getattr(config, part), **{field: value})
        config = replace(config, **{part or field: value})
    return config


def shaped(
    config: RunConfig,
    input_shape: tuple[int, ...],
    num_classes: int,
    trained_on: TrainedOn = NOT_KNOWN,
    task: Task = "classify",
    vocabulary: int = 0,
) -> RunConfig:
    """With a model for that data. Raises DataError for data of one class, or UsageError."""
    from edge_sdk.tasks.table import task_of  # loads numpy

    spec = replace(
        config.model,
        input_shape=tuple(input_shape),
        num_classes=num_classes,
        task=task,
        vocabulary=vocabulary,
    )
    try:
        task_of(task).check(spec)
    except ConfigError as error:
        kind = DataError if config.data else UsageError
        raise kind(f"{config.data or '--classes'}: {error}") from error
    return replace(config, model=spec, trained_on=trained_on)


def with_backbones(config: RunConfig, backbones: tuple[Backbone, ...]) -> RunConfig:
    """With these models; `model` is then the first of the deepest, by whose exits all is bounded.
    Raises UsageError for two of one name."""
    if not backbones:
        return config
    names = [backbone.name for backbone in backbones]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"--backbones: two are named {twice[0]}; give each a name of its own")
    deepest = config.of_backbone(max(backbones, key=lambda backbone: backbone.exits)).model
    return replace(config, model=deepest, backbones=backbones)


def differences(old: RunConfig, new: RunConfig) -> str:
    """The settings that differ, with both values; "" if none do."""
    before, now = _flat(old), _flat(new)
    return ", ".join(
        f"{flag_of(key)} {one_line(repr(before.get(key)))} (now {one_line(repr(now.get(key)))})"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    )


def _flat(config: RunConfig) -> dict[str, object]:
    """Every setting by its path; a family's options are one."""
    whole = msgspec.to_builtins(config)
    if config.population:
        whole["population"] = json.loads(config.population)
    return _leaves(whole)


def _leaves(values: Mapping[str, Any], path: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "options":
            flat |= _leaves(value, f"{path}{name}.")
        else:
            flat[path + name] = value
    return flat
