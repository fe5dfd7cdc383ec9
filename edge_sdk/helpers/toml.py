"""TOML to plain values, by the standard library from Python 3.11 on and by tomli before that."""

from __future__ import annotations

import sys
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TOMLDecodeError = tomllib.TOMLDecodeError


def loads(text: str) -> dict[str, Any]:
    """Raises TOMLDecodeError, a ValueError."""
    found: dict[str, Any] = tomllib.loads(text)
    return found
