"""The version of this package, light enough for every room."""

from __future__ import annotations

__version__ = "0.1.0"
