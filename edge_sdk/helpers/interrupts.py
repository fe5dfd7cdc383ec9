"""A command that is to end: by Ctrl-C while torch or numpy are imported, which takes seconds and
more on a board, or as nobody reads what it prints.

numpy, imported by torch, swallows KeyboardInterrupt or makes an ImportError of it."""

from __future__ import annotations

import functools
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec

Given = ParamSpec("Given")
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


def ends_unread(main: Callable[Given, int]) -> Callable[Given, int]:
    """A command's main that ends quietly when who read its standard output is gone, as by `| head`:
    all was told that anybody wanted, so the status is 0 unless it had another."""

    @functools.wraps(main)
    def run(*args: Given.args, **named: Given.kwargs) -> int:
        if isinstance(sys.stdout, io.TextIOWrapper):  # an ASCII terminal shows ? for what it lacks
            sys.stdout.reconfigure(errors="replace")
        status = 0
        try:
            try:
                status = main(*args, **named)
            finally:
                sys.stdout.flush()  # now, or Python does it after the last `except`
        except BrokenPipeError:
            if not is_unread():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is buffered
        return status

    return run


def is_unread() -> bool:
    """Whether standard output is a pipe that nobody reads: another one may have broken."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


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
