"""The last rounds from a run's database, for who only looks."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec

from coordinator.store.database import DATABASE, connect_to_read
from edge_sdk.errors import StoreError

ACCURACIES = "SELECT name, value FROM metrics WHERE round = ? AND name GLOB 'accuracy_exit_*'"


class RoundRow(msgspec.Struct, frozen=True, kw_only=True):
    """One committed round. accuracy: of each exit on the test set; () where it was not measured."""

    round: int
    wall_s: float
    chosen: int
    returned: int
    stragglers: int
    failures: int
    bytes_down: int
    bytes_up: int
    accuracy: tuple[float, ...] = ()


def last_rounds(folder: Path, count: int) -> list[RoundRow]:
    """The newest `count` rounds, oldest first. Raises StoreError."""
    path = folder / DATABASE
    try:
        with closing(connect_to_read(folder)) as db:
            db.execute("BEGIN")  # one state: a round that ends meanwhile is not half in it
            return _read(db, count)
    except sqlite3.Error as error:
        raise StoreError(
            f"{path} cannot be read: {error}; ask as the user who runs the coordinator"
        ) from error


def _read(db: sqlite3.Connection, count: int) -> list[RoundRow]:
    names = [name for name in RoundRow.__struct_fields__ if name != "accuracy"]
    statement = f"SELECT {', '.join(names)} FROM rounds ORDER BY round DESC LIMIT ?"
    rows = [dict(zip(names, row, strict=True)) for row in db.execute(statement, (count,))]
    found = []
    for row in reversed(rows):
        values = dict(db.execute(ACCURACIES, (row["round"],)))
        exits = sorted(int(name.rpartition("_")[2]) for name in values)
        accuracy = tuple(values[f"accuracy_exit_{exit}"] for exit in exits)
        found.append(RoundRow(**row, accuracy=accuracy))
    return found
