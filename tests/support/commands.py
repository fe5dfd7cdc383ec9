"""A command line as a person meets it: its exit status, whether it returns or exits."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def status_of(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """argparse ends what is wrong usage itself."""
    try:
        return main(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
