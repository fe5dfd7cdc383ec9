"""Use what was trained: export, early exit by onnxruntime, thresholds."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_sdk.infer.early_exit import NEVER, EarlyExit, Prediction

__all__ = ["NEVER", "EarlyExit", "Prediction"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("edge_sdk.infer.early_exit"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
