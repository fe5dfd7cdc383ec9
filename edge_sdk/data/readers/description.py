"""`data.toml` in the folder of the data: what the files cannot say of themselves, such as which
column is the label. One file for all parts, which is copied to every device with the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edge_sdk.data.contract import bad
from edge_sdk.data.readers.class_folders import PARTS
from edge_sdk.helpers import toml
from edge_sdk.helpers.files import read_user_text
from edge_sdk.helpers.text import one_line, plain_words

NAME = "data.toml"
STEP = "correct it; docs/data.md lists its keys"


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a reader asks of data.toml; each has its own fields. classes: the names of all classes
    in the order of their labels, which a device that lacks some needs."""

    classes: tuple[str, ...] = ()


Kind = TypeVar("Kind", bound=Description)


def described_by(folder: Path, kind: type[Kind]) -> Kind:
    """The data.toml for a folder; where there is none, the defaults. Raises DataError, which names
    the key."""
    path = folder_of(folder) / NAME
    return _read(path, kind) if path.exists() or path.is_symlink() else kind()


def folder_of(folder: Path) -> Path:
    """Where the data.toml for a folder lies: in it, or in the one that holds it as one of two
    parts."""
    is_part = folder.name in PARTS and not (folder / NAME).exists()
    return folder.parent if is_part else folder


def _read(path: Path, kind: type[Kind]) -> Kind:
    try:
        found: dict[str, Any] = toml.loads(read_user_text(path))
        return msgspec.convert(found, kind)
    except OSError as error:
        raise bad(path, error.strerror or str(error), "a file that can be read", STEP) from error
    except msgspec.ValidationError as error:  # which names the key as $.key
        known = ", ".join(field.name for field in msgspec.structs.fields(kind))
        got = one_line(plain_words(str(error)))
        raise bad(path, got, f"keys of this kind of data: {known}", STEP) from error
    except (ValueError, RecursionError) as error:
        got = one_line(f"{type(error).__name__} ({error})")
        raise bad(path, got, "TOML, as in docs/data.md", STEP) from error
