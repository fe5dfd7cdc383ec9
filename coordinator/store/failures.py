"""Why participants returned nothing that counts, in a run's database: also in a round that was
never finished. Imports no torch: looking is quick."""

from __future__ import annotations

import sqlite3

import msgspec

UNFINISHED = "round NOT IN (SELECT round FROM rounds)"


class Failures(msgspec.Struct, frozen=True, kw_only=True):
    """One kind in one round: how many clients, and what the first of them said."""

    round: int
    outcome: str  # "straggler" | "failed"
    code: str
    clients: int
    client_id: str  # the first
    detail: str

    @property
    def why(self) -> str:
        return f"{self.outcome}: {self.code}: {self.detail}"


def by_kind(db: sqlite3.Connection) -> list[Failures]:
    """Of every round, the unfinished one too, in the order of the rounds."""
    return _read(
        db,
        "SELECT round, outcome, code, COUNT(DISTINCT client_id), client_id, detail, MIN(rowid)"
        " FROM participations WHERE outcome != 'ok' GROUP BY round, outcome, code"
        " ORDER BY round, MIN(rowid)",
    )


def last_of_clients(db: sqlite3.Connection, most: int) -> list[Failures]:
    """The newest of each client, those of the newest rounds first, at most so many."""
    return _read(
        db,
        "SELECT MAX(round), outcome, code, 1, client_id, detail FROM participations"
        f" WHERE outcome != 'ok' GROUP BY client_id ORDER BY 1 DESC, client_id LIMIT {most:d}",
    )


def keep(db: sqlite3.Connection) -> None:
    """Commit what is recorded of absences in a round that ends unfinished, and nothing else of it:
    its updates count once it is done again. Raises sqlite3.Error."""
    db.execute(f"DELETE FROM participations WHERE outcome = 'ok' AND {UNFINISHED}")
    for table in ("phases", "metrics"):
        db.execute(f"DELETE FROM {table} WHERE {UNFINISHED}")
    db.commit()


def _read(db: sqlite3.Connection, statement: str) -> list[Failures]:
    names = Failures.__struct_fields__
    rows = db.execute(statement).fetchall()
    return [msgspec.convert(dict(zip(names, row, strict=False)), Failures) for row in rows]
