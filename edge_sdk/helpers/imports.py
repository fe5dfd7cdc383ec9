"""torch is an extra of this package: inference needs none, and a Jetson's comes from NVIDIA.

What trains or counts asks here first, so that a torch that is missing, broken or too old is one
line instead of a traceback. Importing this module imports no torch."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from edge_sdk.errors import ConfigError, EdgeError, LackError
from edge_sdk.helpers.interrupts import ends_by_interrupt
from edge_sdk.helpers.text import one_line
from edge_sdk.version import __version__

OLDEST = (2, 1)  # as the extra in pyproject.toml


def install(extra: str) -> str:
    """What to type for an extra of this package. Its wheel is named by the file: on the public
    index its name is another project's."""
    return f'pip install "./edge_sdk-{__version__}-py3-none-any.whl[{extra}]"'


INSTALL = (
    f"{install('torch')}, or on a Jetson the wheel that NVIDIA makes for its JetPack, in "
    "a venv made with --system-site-packages"
)


def require_torch(what: str) -> None:
    """Import torch. Raises ConfigError, which says that `what` needs it and how to get it."""
    try:
        with ends_by_interrupt():
            import torch
    except (ImportError, OSError) as error:  # OSError: a library of CUDA is missing
        reason = f"does not load: {' '.join(str(error).split())}; install it again: "
        if isinstance(error, ModuleNotFoundError) and error.name == "torch":
            reason = "is not installed; "
        raise LackError(f"{what} needs torch, which {reason}{INSTALL}") from error
    if is_too_old(torch.__version__):
        raise LackError(f"{what} needs torch {oldest()}, this is {torch.__version__}; {INSTALL}")


def is_too_old(version: str) -> bool:
    """Whether this version of torch is too old. 2.1.0a0+41361538.nv23.06 is not: NVIDIA's wheels of
    a release carry such names."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return found is None or (int(found[1]), int(found[2])) < OLDEST


def oldest() -> str:
    return f"{OLDEST[0]}.{OLDEST[1]} or later"


def optional_module(name: str, what: str, extra: str) -> Any:
    """A module of a package that comes with an extra. Raises ConfigError, which says that `what`
    needs it and how to get it."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: made for another torch
        reason = f"does not load: {one_line(str(error))}"
        if isinstance(error, ModuleNotFoundError):
            reason = "is not installed"
        step = install(extra)
        if isinstance(error, RuntimeError):  # what is there is installed again by no extra
            step = (
                "it, or what it needs, is for another torch; reinstall that from this torch's index"
            )
        raise LackError(f"{what} needs {name}, which {reason}; {step}") from error


def import_module(name: str) -> None:
    """Import a module for what it registers. Raises EdgeError: ConfigError, or the module's own."""
    try:
        importlib.import_module(name)
    except EdgeError:
        raise
    except ImportError as error:
        raise ConfigError(f"--import {name}: {error}; is it on PYTHONPATH?") from error
    except Exception as error:
        kind = type(error).__name__
        raise ConfigError(f"--import {name}: it raises {kind}: {error}; mend the module") from error


@contextmanager
def heavy_imports() -> Iterator[None]:
    """A context for imports of what runs rounds. Raises ConfigError without the extra."""
    try:
        with ends_by_interrupt():
            yield
    except ModuleNotFoundError as error:
        raise LackError(f"{error}; {install('coordinator')}") from error
