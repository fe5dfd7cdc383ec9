"""A command line as a person meets it: its exit status, whether it returns or exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# A small run of six clients, two of each exit.
EMULATE = [
    "emulate",
    "--data",
    "digits",
    "--clients",
    "6",
    "--groups",
    "2,2,2",
    "--rounds",
    "2",
    "--participants",
    "4",
    "--batch-size",
    "8",
    "--epochs",
    "1",
    "--examples",
    "300",
]


def status_of(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """argparse ends what is wrong usage itself."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
