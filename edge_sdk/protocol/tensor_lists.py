"""Lists of tensors by name and spec, without the tensors: which of a model's a job takes and
returns, and how two lists differ.

`stages.0.*` and `exits.0.*` belong to stage and exit 1."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import cast, get_args

from msgspec.structs import replace

from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.fields import Role
from edge_sdk.protocol.messages import Segment, TensorSpec

ADAPTER = "adapter"  # the module of what is trained within what is frozen
ROLES = frozenset(get_args(Role)) - {"weight"}


def role_of(name: str) -> tuple[Role, str]:
    """What a tensor of a transfer is, by its name, and the name of the weight that it goes with:
    ("mask", "stages.0.0.weight") of "mask/stages.0.0.weight"; without a role it is a weight."""
    role, _, rest = name.partition("/")
    return (cast(Role, role), rest) if rest and role in ROLES else ("weight", name)


def weight_names(names: Iterable[str]) -> list[str]:
    """Those of the model's own tensors, without what travels beside them."""
    return [name for name in names if role_of(name)[0] == "weight"]


def stage_of(name: str) -> tuple[str, int]:
    """Where a tensor of a model belongs: ("stages" or "exits", number from 1)."""
    kind, _, rest = name.partition(".")
    number = rest.partition(".")[0]
    if kind not in ("stages", "exits") or not number.isdigit():
        raise ShapeError(f"tensor {name!r} is outside stages.N and exits.N of a StagedModel")
    return kind, int(number) + 1


def is_frozen(name: str, frozen: Collection[str]) -> bool:
    """Whether a tensor or module is one of these, or lies within: "stages" is all stages. What lies
    in a module named `adapter` never is."""
    is_within = any(name == prefix or name.startswith(f"{prefix}.") for prefix in frozen)
    return is_within and ADAPTER not in name.split(".")


def frozen_prefixes(freeze: str, num_exits: int, *, has_adapters: bool = False) -> tuple[str, ...]:
    """What a plan says as `frozen` of "stages=1,2", of "backbone": all stages, of "all": exits too,
    or of "": nothing. has_adapters: of the model, which then is frozen. Raises ConfigError."""
    if has_adapters and freeze not in ("", "backbone", "all"):
        raise ConfigError(f"--freeze {freeze} with --adapt, expected backbone or all")
    if freeze == "all" and not has_adapters:
        raise ConfigError("--freeze all leaves nothing to train; give --adapt too, or backbone")
    if freeze in ("", "backbone", "all"):
        frozen = ("stages",) * bool(freeze or has_adapters)
        return (*frozen, "exits") if freeze == "all" else frozen
    kind, _, listed = freeze.partition("=")
    numbers = listed.split(",")
    if kind != "stages" or not all(re.fullmatch(r"[0-9]{1,3}", number) for number in numbers):
        got = one_line(repr(freeze))
        raise ConfigError(f"--freeze is {got}, expected backbone, or stages as in stages=1,2")
    stages = sorted({int(number) for number in numbers})
    if stages[0] < 1 or stages[-1] > num_exits:
        raise ConfigError(
            f"--freeze {freeze}: the model has stages 1 to {num_exits}; give some of them"
        )
    return tuple(f"stages.{stage - 1}" for stage in stages)


def check_segments(segments: Sequence[Segment], num_exits: int) -> None:
    """Raise ConfigError unless the segments are within 1..num_exits and do not overlap."""
    taken: set[int] = set()
    for segment in segments:
        stages = set(range(segment.first, segment.last + 1))
        if not stages or segment.last > num_exits or stages & taken:
            raise ConfigError(
                f"segment ({segment.first}, {segment.last}) is empty, overlaps another or exceeds "
                f"exit {num_exits}"
            )
        taken |= stages


def trained_names(
    names: Iterable[str], segments: Sequence[Segment], frozen: Collection[str] = ()
) -> list[str]:
    """Names of the tensors that training `segments` changes: those of their stages and exits, but
    for what is frozen."""
    stages = {s for g in segments for s in range(g.first, g.last + 1)}
    names = [name for name in names if stage_of(name)[1] in stages]
    return [name for name in names if not is_frozen(name, frozen)] if frozen else names


def needed_names(names: Iterable[str], segments: Sequence[Segment]) -> list[str]:
    """Names of the tensors that a device needs to train `segments`: theirs and the stages before
    them, without the exits of these."""
    deepest = max(segment.last for segment in segments)
    trained = set(trained_names(names := list(names), segments))
    return [
        name
        for name in names
        if name in trained or (stage_of(name)[0] == "stages" and stage_of(name)[1] <= deepest)
    ]


def check_specs(
    got: Sequence[TensorSpec], want: Sequence[TensorSpec], where: str, *, is_ordered: bool = True
) -> None:
    """Raise ShapeError with the first difference of two tensor lists. "packed" tensors may have
    fewer values than they are wanted with: how many there are the mask tells."""
    have = {spec.name: spec for spec in got}
    wanted = {spec.name: spec for spec in want}
    missing, extra = sorted(set(wanted) - set(have)), sorted(set(have) - set(wanted))
    if missing or extra or len(have) != len(got):
        said = f"not expected: {some_of(extra)}; named {len(got)}, expected {len(want)}"
        raise ShapeError(f"{where}: tensors missing: {some_of(missing)}; {said}")
    for spec in got:
        target = wanted[spec.name]
        if spec != target and not _is_shorter(spec, target):
            raise ShapeError(
                f"{where}: {spec.name} is {spec.shape} {spec.dtype} {spec.role}, expected "
                f"{target.shape} {target.dtype} {target.role}"
            )
    if is_ordered and [spec.name for spec in got] != [spec.name for spec in want]:
        raise ShapeError(f"{where}: tensors are not in the order of the model")


def _is_shorter(spec: TensorSpec, target: TensorSpec) -> bool:
    is_packed = target.role == "packed" and len(spec.shape) == len(target.shape) == 1
    is_like = replace(spec, shape=target.shape) == target
    return is_packed and is_like and spec.shape[0] <= target.shape[0]


def some_of(names: Sequence[str]) -> str:
    """The first five names and how many more there are: a peer may name thousands."""
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
