"""--backbones FILE.toml: several models of unequal size, a table for each, the smallest first.

[small]
model = "llama"
exits = 2
options = {dim = 64, heads = 4}
init = "small.safetensors"   # beside this file

[large]
..."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from coordinator.config import BACKBONE_NAME, BACKBONE_NAME_IN_WORDS, Backbone
from edge_sdk.cli.flags import DEFAULT_EXITS, model_parts
from edge_sdk.errors import ConfigError
from edge_sdk.helpers import toml
from edge_sdk.helpers.files import read_user_text
from edge_sdk.helpers.text import one_line, plain_words
from edge_sdk.protocol.fields import MAX_LINE, Name, Option, Struct


class Table(Struct, frozen=True, kw_only=True):
    """One of the file's tables, as --model, --exits, --option, --cuts and --init tell it of a
    single model."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    exits: Annotated[int, Meta(ge=1, le=100)] = DEFAULT_EXITS
    options: dict[Name, Option] = msgspec.field(default_factory=dict)
    cuts: Annotated[str, Meta(max_length=MAX_LINE)] = ""
    init: Annotated[str, Meta(max_length=MAX_LINE)] = ""


def read_backbones(path: Path) -> tuple[Backbone, ...]:
    """In the order of the file; their weights, which are not read here, lie beside it or have a
    path of their own. Raises ConfigError."""
    where = f"--backbones {path}"
    try:
        tables = toml.loads(read_user_text(path))
    except OSError as error:
        why = error.strerror or one_line(str(error))
        raise ConfigError(f"{where} cannot be read: {why}; give another") from error
    except ValueError as error:  # of no UTF-8 too
        raise ConfigError(f"{where}: {one_line(str(error))}; see docs/adapters.md") from error
    if not tables:
        raise ConfigError(f"{where} has no table; give one for each model, see docs/adapters.md")
    return tuple(_backbone(where, path.parent, name, table) for name, table in tables.items())


def _backbone(where: str, folder: Path, name: str, table: Any) -> Backbone:
    shown = one_line(name)
    if not re.fullmatch(BACKBONE_NAME, name):
        raise ConfigError(f"{where}: [{shown}], expected a name of {BACKBONE_NAME_IN_WORDS}")
    try:
        told = msgspec.convert(table, Table)
        given = argparse.Namespace(
            model=told.model, exits=told.exits, cuts=told.cuts, option=list(told.options.items())
        )
        family, exits, options = model_parts(given)
    except msgspec.ValidationError as error:
        known = ", ".join(Table.__struct_fields__)
        raise ConfigError(
            f"{where}: [{shown}]: {plain_words(one_line(str(error)))}; known: {known}"
        ) from error
    except ConfigError as error:
        raise ConfigError(f"{where}: [{shown}]: {error}") from error
    init = str((folder / Path(told.init).expanduser()).resolve()) if told.init else ""
    return Backbone(name=name, family=family, exits=exits, options=options, init=init)
