"""Boards: which one this is, and their files, profiles/*.toml and those that `edge-sdk measure
--save` makes of a real device."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_sdk.errors import ConfigError
from edge_sdk.hardware.jetson import jetson_module
from edge_sdk.hardware.procfs import ROOT, meminfo, read_text
from edge_sdk.helpers import toml
from edge_sdk.helpers.files import home, is_there, make_parent, read_user_text, why_not, write_whole

GIB = 1024**3
OWN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
Positive = Annotated[float, Meta(gt=0, le=10**9)]
PositiveInt = Annotated[int, Meta(gt=0, le=2**53)]


class Board(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A board's file: figures, and for every figure where it comes from. None: not known."""

    platform: str
    board: str
    machine: str
    memory_total_bytes: PositiveInt
    memory_available_bytes: PositiveInt  # what training may use: in profiles/ an estimate
    cores: Annotated[float, Meta(gt=0, le=4096)]
    gflops: Positive
    layer_s: Annotated[float, Meta(gt=0, le=1000)] | None = None
    link_mbit_s: Annotated[float, Meta(gt=0, le=10**6)] | None = None
    # A board is this one if its device tree's model holds one of these: lower case, " " for "-".
    device_tree: tuple[str, ...] = ()
    source: dict[str, str]


# -- this board -----------------------------------------------------------------------------------


def board_name(root: Path = ROOT) -> tuple[str, str]:
    """Platform, which is the name of a file in profiles/ ("generic": none is of this board), and
    the model string that the board gives of itself."""
    model = ""
    for path in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        model = model or read_text(root / path)
    name = _platform(model.lower().replace("-", " "), memory_gib(root) * GIB)
    if name.startswith("jetson"):
        model = jetson_module() or model
    shown = "".join(letter if letter.isprintable() else " " for letter in model)
    return name, shown[:200]


def _platform(model: str, memory_bytes: int) -> str:
    """Of the package's boards whose device tree fits, the one that was sold with this memory, else
    the first by name."""
    fitting = [b for b in _packaged_boards() if any(part in model for part in b.device_tree)]
    fitting.sort(key=lambda b: (b.memory_total_bytes != memory_bytes, b.platform))
    return fitting[0].platform if fitting else "generic"


def processor(root: Path = ROOT) -> str:
    """The processor as the kernel names it: by its name, or on ARM by implementer and part."""
    lines = read_text(root / "proc/cpuinfo").splitlines()
    told = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    values = {name.strip(): value.strip() for name, value in told.items()}
    parts = ("model name", "CPU implementer", "CPU part")
    return " ".join(values[name] for name in parts if name in values)[:200]


def memory_gib(root: Path = ROOT) -> int:
    """Memory that the board was sold with: the kernel and the GPU take some of it, so the least
    power of two that holds MemTotal. 0: not known, or less than 1 GiB."""
    total = meminfo(root).get("MemTotal", 0)
    sizes = (2**power for power in range(10))
    return next((gib for gib in sizes if total <= gib * GIB), 0) if total > GIB / 2 else 0


# -- their files ----------------------------------------------------------------------------------


def board_folder() -> Path:
    """The folder profiles/, of the installed package or else of the source tree."""
    package = Path(__file__).parents[1]
    packaged = package / "profiles"
    return packaged if packaged.is_dir() else package.parent / "profiles"


@cache
def _packaged_boards() -> tuple[Board, ...]:
    """The boards in profiles/. They are read once, as every heartbeat asks what board this is."""
    return tuple(board(str(path)) for path in board_folder().glob("*.toml"))


def own_folder() -> Path:
    """The folder of the boards that this user measured. Raises ConfigError without a home."""
    return home() / ".config" / "edge-sdk" / "boards"


def board_files() -> dict[str, Path]:
    """The files of all boards by name; of two of one name the package's counts."""
    found = list(board_folder().glob("*.toml"))
    with suppress(ConfigError):  # without a home there are none of one's own
        found = [*own_folder().glob("*.toml"), *found]
    return {path.stem: path for path in found if OWN_NAME.fullmatch(path.stem)}


def board_names() -> list[str]:
    return sorted(board_files())


def board(name_or_path: str) -> Board:
    """A board by its name or by the path of a .toml file.

    Raises ConfigError: unknown name (lists the known ones), or bad file (names file and key)."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        files = board_files()
        if name_or_path not in files:
            known = ", ".join(sorted(files))
            step = "or give the path of a .toml file"
            raise ConfigError(f"unknown board {name_or_path!r}; known: {known}; {step}")
        path = files[name_or_path]
    try:
        found = msgspec.convert(toml.loads(read_user_text(path)), Board)
    except OSError as error:
        raise ConfigError(f"board file {path}: {error.strerror}") from error
    except (ValueError, msgspec.MsgspecError) as error:  # which names the key as $.key
        raise ConfigError(f"board file {path}: {error}; see profiles/generic.toml") from error
    unsourced = [field for field in _figures(found) if not found.source.get(field)]
    if unsourced:
        raise ConfigError(f"board file {path}: [source] lacks {', '.join(unsourced)}")
    return found


def save_path(name_or_path: str) -> Path:
    """Where a board is saved: FILE.toml as given, NAME in your own folder. Raises ConfigError."""
    path = Path(name_or_path)
    if path.suffix == ".toml":
        return path
    if not OWN_NAME.fullmatch(name_or_path):
        wanted = "expected 1 to 60 letters, digits, dots, - or _, or the path of a .toml file"
        raise ConfigError(f"board name {name_or_path!r}: {wanted}")
    if (board_folder() / f"{name_or_path}.toml").exists():
        raise ConfigError(f"{name_or_path} is a board of this package; choose another name")
    return own_folder() / f"{name_or_path}.toml"


def check_free(path: Path, *, is_forced: bool) -> None:
    """Raises ConfigError if saving would overwrite without leave."""
    if not is_forced and is_there(path, ConfigError):
        raise ConfigError(f"board file {path} exists; choose another name, or give --force")


def save_board(board: Board, path: Path, *, is_forced: bool = False) -> None:
    """Whole or not at all. Raises ConfigError: it exists, or it cannot be written."""
    check_free(path, is_forced=is_forced)
    try:
        make_parent(path)
        write_whole(path, board_text(board), mode=0o644)
    except OSError as error:
        raise ConfigError(f"board file {path} cannot be written: {why_not(error)}") from error


def board_text(board: Board) -> str:
    """The board as TOML that board() reads again."""
    values = {name: getattr(board, name) for name in Board.__struct_fields__ if name != "source"}
    lines = [
        f"{name} = {_toml(value)}" for name, value in values.items() if value not in (None, ())
    ]
    sources = [f"{name} = {_toml(text)}" for name, text in board.source.items()]
    return "\n".join([*lines, "", "[source]", *sources, ""])


def _figures(board: Board) -> list[str]:
    names = Board.__struct_fields__
    return [name for name in names if isinstance(getattr(board, name), (int, float))]


def _toml(value: str | float | tuple[str, ...]) -> str:
    """JSON's strings, numbers and lists are TOML's too, but for DEL, which TOML wants escaped."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
