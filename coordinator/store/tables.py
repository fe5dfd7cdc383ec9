"""The tables of a run's database, and what their rows are made of, by name.

A column of `participations` that has the name of a field of the wire's Update is filled with what
the participant told there, so a new one is a line in PARTICIPATIONS (and a new VERSION).
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from coordinator.cohorts.base import BLANK, Absence, Client, ClientUpdate
from edge_sdk.protocol.messages import Segment, Update

VERSION = 6
PARTICIPATIONS = """round INTEGER, client_id TEXT, exit INTEGER, variant INTEGER, segments TEXT,
    outcome TEXT, code TEXT, detail TEXT, num_examples INTEGER, num_steps INTEGER,
    bytes_down INTEGER, bytes_up INTEGER, peak_memory_bytes INTEGER, retries INTEGER,
    exits TEXT, micro_batch INTEGER, recompute INTEGER, staleness INTEGER, job TEXT, digest TEXT,
    holdout TEXT, state_round INTEGER"""
COLUMNS = {column.split()[0] for column in PARTICIPATIONS.split(",")}
FROM_UPDATE = COLUMNS & set(Update.__struct_fields__) - {"round"}  # that is the one it counts in
SCHEMA = f"""
CREATE TABLE runs (version INTEGER, run TEXT, created_utc TEXT, config TEXT, kind TEXT);
CREATE TABLE clients (client_id TEXT PRIMARY KEY, exit INTEGER, stages TEXT,
    variant INTEGER, num_weights INTEGER,
    prefix_s REAL, stage_s TEXT, num_examples INTEGER,
    platform TEXT, board TEXT, is_emulated INTEGER, cpu_scale REAL, link_mbit_s REAL, profile TEXT);
CREATE TABLE rounds (round INTEGER PRIMARY KEY, started_utc TEXT, wall_s REAL, chosen INTEGER,
    returned INTEGER, stragglers INTEGER, failures INTEGER, retries INTEGER, bytes_down INTEGER,
    bytes_up INTEGER, stale INTEGER, checkpoint TEXT);
CREATE TABLE participations ({PARTICIPATIONS},
    PRIMARY KEY (round, client_id, job));
CREATE INDEX jobs ON participations (job);
CREATE TABLE phases (round INTEGER, client_id TEXT, phase TEXT, wall_s REAL, cpu_s REAL);
CREATE TABLE metrics (round INTEGER, name TEXT, value REAL, PRIMARY KEY (round, name));
"""


# Of a round seconds by phase, the counts of RoundTotals behind `chosen`, and whose updates count.
SECONDS = "SELECT phase, SUM(COALESCE(cpu_s, wall_s)) FROM phases WHERE round = ? GROUP BY phase"
COUNTS = (
    "SELECT TOTAL(outcome = 'ok' AND NOT staleness), TOTAL(outcome = 'straggler'),"
    " TOTAL(outcome = 'failed'), TOTAL(retries), TOTAL(bytes_down), TOTAL(bytes_up),"
    " TOTAL(outcome = 'ok' AND staleness) FROM participations WHERE round = ?"
)
TRAINED = "SELECT round, exit, segments, num_examples FROM participations WHERE outcome = 'ok'"
COUNTED = (
    "SELECT client_id FROM participations WHERE round = ? AND outcome = 'ok' AND NOT staleness"
)


@dataclass(frozen=True)
class RoundTotals:
    """A round in numbers, by the names of the table `rounds`. returned: participants of this round;
    stale: updates of rounds before, which came late and count in this one."""

    wall_s: float
    chosen: int
    returned: int
    stragglers: int
    failures: int
    retries: int
    bytes_down: int
    bytes_up: int
    stale: int = 0


def insert(db: sqlite3.Connection, table: str, row: Mapping[str, object], how: str = "") -> None:
    """how: "OR REPLACE" where the same key may be there. Raises sqlite3.Error."""
    names, values = ", ".join(row), ", ".join(f":{name}" for name in row)
    db.execute(f"INSERT {how} INTO {table} ({names}) VALUES ({values})", row)


def client_row(client: Client) -> dict[str, object]:
    row: dict[str, object] = {"client_id": client.id, "exit": client.exit}
    row |= {"variant": client.variant, "num_weights": client.num_weights}
    row |= {"stages": _list(client.stages), "num_examples": client.num_examples}
    row |= {"prefix_s": client.prefix_s, "stage_s": _list(client.stage_s)}
    if (profile := client.profile) is None:
        return row | {"platform": "in-process", "board": "", "is_emulated": False}
    row |= {"platform": profile.platform, "board": profile.board, "profile": _value(profile)}
    row |= {"is_emulated": profile.is_emulated, "cpu_scale": profile.cpu_scale}
    return row | {"link_mbit_s": profile.link_mbit_s}


def participation_row(round: int, result: ClientUpdate | Absence) -> dict[str, object]:
    """round: that the result counts in."""
    row: dict[str, object] = {"round": round, "client_id": result.client.id}
    row |= {"exit": result.client.exit, "variant": result.client.variant}
    row |= {"segments": _segments(result.segments)}
    row |= {"bytes_down": result.bytes_down, "bytes_up": result.bytes_up}
    match result:
        case ClientUpdate(message=message, staleness=staleness):
            row |= {"outcome": "ok", "code": "", "detail": "", "staleness": staleness}
        case Absence(outcome=outcome, code=code, detail=detail):
            message = BLANK
            row |= {"outcome": outcome, "code": code, "detail": detail, "staleness": 0}
    return row | {name: _value(getattr(message, name)) for name in FROM_UPDATE}


def _value(value: object) -> object:
    """As SQLite keeps it: lists and structs as JSON."""
    if value is None or isinstance(value, int | float | str):
        return value
    return msgspec.json.encode(value).decode()


def _segments(segments: Sequence[Segment]) -> str:
    """As first-last, e.g. "1-1,3-3": prefix 1, and stage 3 alone."""
    return ",".join(f"{segment.first}-{segment.last}" for segment in segments)


def _list(numbers: Sequence[float]) -> str:
    return ",".join(str(number) for number in numbers)
