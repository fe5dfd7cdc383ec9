"""Readers of data files; table.py has the table of them.

Scaling never depends on the shard, so that every device scales alike: uint8 to x / 127.5 - 1,
digits to x / 8 - 1, UniMiB SHAR to units of 2 g; float arrays are taken as they are. The
alternative, standardising by the shard's own mean, would feed one model inputs of other scales.
Class counts come from the source where it has them. IDX files, and .npz files without
`num_classes`, have only their largest label + 1, so hand skewed shards out with `save_shard`."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules

from edge_sdk.data.readers.table import register_reader

__all__ = ["register_reader"]
for _module in iter_modules(__path__):  # each puts its rows into the table
    import_module(f"{__name__}.{_module.name}")
