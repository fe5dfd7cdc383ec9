"""Examples for training and inference: readers, shards, splits."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_sdk.data.examples import Examples
    from edge_sdk.data.loading import DataSet, load, load_dataset, load_shard, load_test, save_shard

__all__ = ["DataSet", "Examples", "load", "load_dataset", "load_shard", "load_test", "save_shard"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("edge_sdk.data.loading"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
