"""Flags that several subcommands share."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.text import parse_size

MAX_THREADS = 1024
# A round's training where no flag tells: what a run asks of its devices, and `plan` predicts.
DEFAULT_EPOCHS, DEFAULT_BATCH_SIZE = 2, 32


def print_step(step: str) -> None:
    """Say what a command does for seconds: a line on stderr, as stdout is for results."""
    print(f"edge-sdk: {step}", file=sys.stderr, flush=True)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Tells each flag's default, unless its text does, and leaves an example as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_told = "default" in text or isinstance(action.default, bool)
        if is_told or not isinstance(action.default, int | float | str | Path):
            return text
        if action.default in ("", argparse.SUPPRESS):
            return text
        return f"{text}; default %(default)s"


def add_command(commands: Any, name: str, about: str, *examples: str) -> argparse.ArgumentParser:
    """A subcommand: `about` in the list of commands and above its flags, examples below them."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog="\n  ".join([f"example{'s' * (len(examples) > 1)}:", *examples]),
        formatter_class=HelpFormatter,
    )
    return parser


def add_memory_cap(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--memory-cap", type=size_flag, metavar="512M", help="most that training may use in all"
    )


def add_imports(parser: argparse._ActionsContainer) -> None:
    """--import MODULE, any number of times: a list `imports`, or None."""
    said = "Python module that registers your model families or readers"
    parser.add_argument("--import", dest="imports", action="append", metavar="MODULE", help=said)


def whole_flag(least: int, most: int) -> Callable[[str], int]:
    """A whole number within bounds, for argparse."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            wanted = f"expected a whole number from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r}, {wanted}")
        return int(text)

    return parse


def rate_flag(text: str) -> float:
    """Mbit/s, for argparse."""
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate <= 10**6:
        raise argparse.ArgumentTypeError(f"{text!r}, expected Mbit/s such as 94 or 7.5")
    return rate


def duration_flag(text: str) -> float:
    """Seconds, for argparse; 0 is one."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 10**9:
        raise argparse.ArgumentTypeError(f"{text!r}, expected seconds, 0 or more")
    return seconds


def path_flag(text: str) -> Path:
    """A path for argparse; an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("'', expected a path")
    return Path(text)


def shape_flag(text: str) -> tuple[int, ...]:
    """(1, 28, 28) of 1x28x28, for argparse."""
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}, expected sizes such as 1x28x28")
    return tuple(map(int, sizes))


def option_flag(text: str) -> tuple[str, Any]:
    """("channels", (16, 32)) of channels=16,32; also number, true, false, text; for argparse."""
    key, _, value = text.partition("=")
    if not (key and value):
        raise argparse.ArgumentTypeError(f"{text!r}, expected KEY=VALUE, e.g. channels=32,64,128")
    if "," in value:
        parts = value.split(",")
        if not all(part.isdecimal() for part in parts):
            raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers with commas")
        return key, tuple(map(int, parts))
    if value in ("true", "false"):
        return key, value == "true"
    for kind in (int, float):
        try:
            return key, kind(value)
        except ValueError:
            continue
    return key, value


def size_flag(text: str) -> int:
    """parse_size for argparse, where a wrong size is wrong usage."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
