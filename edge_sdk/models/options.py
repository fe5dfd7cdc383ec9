"""What a family can be told with `--option KEY=VALUE`: a struct of its file, whose fields have
their defaults, bounds and descriptions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any, TypeAlias, TypeVar, get_type_hints

import msgspec
from msgspec import Meta

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.text import plain_words
from edge_sdk.protocol.messages import ModelSpec

MOST = 1_000_000  # channels or features; sizes of tensors then stay below 2^63
Size: TypeAlias = Annotated[int, Meta(ge=1, le=MOST)]
Sizes: TypeAlias = tuple[Size, ...] | Size  # a lone one is a list of one; (): the family's own
Read = TypeVar("Read", bound=msgspec.Struct)


class FamilyOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frozen, checked options of a family."""


def read_options(spec: ModelSpec, kind: type[Read]) -> Read:
    """The spec's options. Raises ConfigError, which lists the family's own for an unknown one and
    says what it expects for a wrong value."""
    known = kind.__struct_fields__
    if unknown := sorted(set(spec.options) - set(known)):
        wanted = f"known: {', '.join(known)}"
        raise ConfigError(f"family {spec.family!r} has no option {', '.join(unknown)}; {wanted}")
    for name, value in spec.options.items():
        try:
            msgspec.convert({name: value}, kind)
        except msgspec.ValidationError as error:
            expected = plain_words(str(error).partition(" - at ")[0])
            said = f"{name}: {described(kind)[name]}"
            raise ConfigError(f"model option {name} is {value!r}, {expected}; {said}") from error
    return msgspec.convert(spec.options, kind)


def described(kind: type[msgspec.Struct]) -> dict[str, str]:
    """What each option is, by name."""
    hints = get_type_hints(kind, include_extras=True)
    metas: dict[str, Any] = {
        n: getattr(hints[n], "__metadata__", ()) for n in kind.__struct_fields__
    }
    return {name: next((m.description for m in metas[name] if m.description), "") for name in metas}


def sizes(
    spec: ModelSpec, name: str, given: Sizes, default: Sequence[int], least: int
) -> list[int]:
    """At least `least` of them; the default where none are given. Raises ConfigError."""
    values = list(given) if isinstance(given, tuple) else [given]
    values = values or list(default)
    if len(values) < least:
        wanted = f"expected at least {least} positive integers up to {MOST} for {spec.exit} exits"
        raise ConfigError(f"model option {name} is {tuple(values)}, {wanted}")
    return values


def widths(
    spec: ModelSpec, name: str, given: Sizes, default: Sequence[int], least: int
) -> list[int]:
    """`sizes`, each scaled by the spec's width and rounded up: channels or features."""
    given_sizes = sizes(spec, name, given, default, least)
    return [math.ceil(round(size * spec.width, 6)) or 1 for size in given_sizes]  # 0.07 * 100 > 7
