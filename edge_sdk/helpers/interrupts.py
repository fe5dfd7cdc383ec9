"""Ctrl-C while torch or numpy are imported, which takes seconds and more on a board.

numpy, imported by torch, swallows KeyboardInterrupt or makes an ImportError of it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

INTERRUPTED = 130  # exit status, by Ctrl-C


@contextmanager
def ends_by_interrupt() -> Iterator[None]:
    """Ctrl-C ends the process at once: nothing has begun that had to be tidied up. A program that
    handles it in a way of its own is left alone."""
    is_plain = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if is_plain:
        signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    try:
        yield
    finally:
        if is_plain:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets an entry when SIGTERM or SIGINT arrives; a second SIGINT interrupts."""
    stopping: list[int] = []

    def note(number: int, frame: object) -> None:
        if stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
