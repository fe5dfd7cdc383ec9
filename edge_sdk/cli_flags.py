"""Flags that several subcommands share."""

from __future__ import annotations

import argparse

from edge_sdk.errors import ConfigError

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}


def add_memory_cap(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory-cap", type=size_flag, metavar="512M", help="most that training may use in all"
    )


def parse_size(text: str) -> int:
    """Bytes of a size such as 512M; K, M and G are powers of 1024. Raises ConfigError."""
    unit = text[-1:].upper() if text[-1:].upper() in UNITS else ""
    try:
        num_bytes = round(float(text[: len(text) - len(unit)]) * UNITS[unit])
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes < 1:
        raise ConfigError(f"size {text!r}, expected one such as 512M or 1.5G")
    return num_bytes


def size_flag(text: str) -> int:
    """parse_size for argparse, where a wrong size is wrong usage."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
