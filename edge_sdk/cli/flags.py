"""Flags that several subcommands share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.text import parse_size

MAX_THREADS = 1024


def add_memory_cap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-cap", type=size_flag, metavar="512M", help="most that training may use in all"
    )


def whole_flag(least: int, most: int) -> Callable[[str], int]:
    """A whole number within bounds, for argparse."""

    def parse(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(
                f"{text!r}, expected a whole number from {least} to {most}"
            )
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


def size_flag(text: str) -> int:
    """parse_size for argparse, where a wrong size is wrong usage."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
