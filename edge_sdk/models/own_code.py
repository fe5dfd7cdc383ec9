"""What the code of a model family raises, as one line that names the family and the place: a
family may be anybody's module, and its layers may raise anything."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType, TracebackType
from typing import Any

from torch import nn

from edge_sdk.errors import ConfigError, EdgeError
from edge_sdk.hardware.process_memory import is_for_memory
from edge_sdk.helpers.text import one_line

NOT_THEIRS = {"edge_sdk", "coordinator", "torch", "numpy", *sys.stdlib_module_names}
INSTALLED = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


@contextmanager
def own_code(
    family: str, doing: str, build: Callable[..., Any], model: nn.Module | None = None
) -> Iterator[None]:
    """A context for calls into a family. doing: what runs, where no layer of `model` is at work.

    Raises ConfigError for what is raised within; EdgeErrors and lack of memory pass."""
    try:
        yield
    except EdgeError:
        raise
    except (Exception, SystemExit) as error:
        if is_for_memory(error):
            raise
        raise ConfigError(_told(family, doing, build, model, error)) from error


def _told(
    family: str,
    doing: str,
    build: Callable[..., Any],
    model: nn.Module | None,
    error: BaseException,
) -> str:
    frames = list(_frames(error.__traceback__))
    what = _layer(frames, model) or doing
    said = f": {one_line(str(error))}" if str(error) else ""
    place = _place(frames, build)
    return f"family {family!r}: {what} raises {type(error).__name__}{said} ({place}); mend it there"


def _frames(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    """Outermost first, with the line at work."""
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _layer(frames: list[tuple[FrameType, int]], model: nn.Module | None) -> str:
    """The innermost layer of the model at work, e.g. "exits.0.2 (Linear)"; "" if none was."""
    if model is None:
        return ""
    names = {id(module): name for name, module in model.named_modules() if name}
    for frame, _ in reversed(frames):
        at_work = frame.f_locals.get("self")
        if id(at_work) in names:
            return f"{names[id(at_work)]} ({type(at_work).__name__})"
    return ""


def _place(frames: list[tuple[FrameType, int]], build: Callable[..., Any]) -> str:
    """FILE:LINE of the innermost frame that is the author's, else of where `build` begins: a layer
    that gets a wrong size is torch's own code from there on."""
    for frame, line in reversed(frames):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        path = frame.f_code.co_filename
        is_theirs = package == build.__module__.partition(".")[0]
        if is_theirs or not (package in NOT_THEIRS or any(name in path for name in INSTALLED)):
            return f"{path}:{line}"
    return place_of(build)


def place_of(build: Callable[..., Any]) -> str:
    """FILE:LINE of a family's function, or its module's name."""
    code = getattr(build, "__code__", None)
    if isinstance(code, CodeType):
        return f"{code.co_filename}:{code.co_firstlineno}"
    return build.__module__
