"""Standard input, output and error where whoever started the program closed them, as some starters
of daemons do: they are opened on /dev/null, before a socket or a file gets one of their numbers and
what is printed goes into it."""

from __future__ import annotations

import os
import sys

NAMES = ("stdin", "stdout", "stderr")  # in the order of their descriptors


def open_closed_streams() -> None:
    """Open whichever of descriptors 0 to 2 is closed, and give Python the streams that it lacks."""
    for number, name in enumerate(NAMES):
        place: int | str = os.devnull  # its number may be a file of the program's by now
        if _is_closed(number):
            place = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: all below are open
            assert place == number
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            stream = open(place, mode, encoding="utf-8", closefd=place != number)  # noqa: SIM115
            setattr(sys, name, stream)


def _is_closed(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return True
    return False
