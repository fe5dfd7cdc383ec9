"""A run's database, opened to write, or by who only looks: then nothing in the folder is changed.

A run in progress has its newest rows in run.sqlite-wal; with it SQLite reads without any lock that
a writer waits for, also for a user who may only read. Without it, after a clean end, SQLite would
make that file anew, and it would be this user's, or fail where nothing may be written: the database
is then opened as one that does not change (immutable). A coordinator that was killed leaves the
file, whose rows count. Imports no torch: looking is quick.
"""

from __future__ import annotations

import sqlite3
from pathlib import Path

from edge_sdk.errors import StoreError

DATABASE = "run.sqlite"


def connect_to_read(folder: Path) -> sqlite3.Connection:
    """Raises StoreError where this user cannot read the database, sqlite3.Error if it is none."""
    path = folder / DATABASE
    log = path.with_name(f"{DATABASE}-wal")
    try:
        how = "mode=ro" if log.exists() and log.stat().st_size else "mode=ro&immutable=1"
        uri = f"{path.resolve().as_uri()}?{how}"
        db = sqlite3.connect(uri, uri=True, timeout=5, isolation_level=None)
        return _told(db, "schema_version")  # only now SQLite opens the files
    except (OSError, sqlite3.OperationalError) as error:
        raise StoreError(
            f"{path} cannot be read: {error}; ask as the user who runs the coordinator, or copy "
            "the folder to where you may write"
        ) from error


def connect_to_write(folder: Path) -> sqlite3.Connection:
    """Raises StoreError where it cannot be written, sqlite3.Error if it is none."""
    try:
        db = sqlite3.connect(folder / DATABASE, timeout=30)
        return _told(db, "journal_mode = WAL", "synchronous = FULL")
    except sqlite3.OperationalError as error:
        raise StoreError(
            f"{folder} cannot be written: {error}; free space or give this user the right to "
            "write there, then go on with --resume"
        ) from error


def _told(db: sqlite3.Connection, *pragmas: str) -> sqlite3.Connection:
    try:
        for pragma in pragmas:
            db.execute(f"PRAGMA {pragma}")
    except sqlite3.Error:
        db.close()
        raise
    return db
