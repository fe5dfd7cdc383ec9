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

VERSION = 4
PARTICIPATIONS = {
    "round": "INTEGER",  # that it counts in
    "client_id": "TEXT",
    "exit": "INTEGER",
    "segments": "TEXT",
    "outcome": "TEXT",
    "code": "TEXT",
    "detail": "TEXT",
    "num_examples": "INTEGER",
    "num_steps": "INTEGER",
    "bytes_down": "INTEGER",
    "bytes_up": "INTEGER",
    "peak_memory_bytes": "INTEGER",
    "retries": "INTEGER",
    "exits": "TEXT",
    "micro_batch": "INTEGER",
    "recompute": "INTEGER",
    "staleness": "INTEGER",
    "job": "TEXT",
    "digest": "TEXT",
}
TOLD = PARTICIPATIONS.keys() & set(Update.__struct_fields__) - {"round"}
SCHEMA = f"""
CREATE TABLE runs (version INTEGER, run TEXT, created_utc TEXT, config TEXT, kind TEXT);
CREATE TABLE clients (client_id TEXT PRIMARY KEY, exit INTEGER, stages TEXT,
    prefix_s REAL, stage_s TEXT, num_examples INTEGER,
    platform TEXT, board TEXT, is_emulated INTEGER, cpu_scale REAL, link_mbit_s REAL, profile TEXT);
CREATE TABLE rounds (round INTEGER PRIMARY KEY, started_utc TEXT, wall_s REAL, chosen INTEGER,
    returned INTEGER, stragglers INTEGER, failures INTEGER, retries INTEGER, bytes_down INTEGER,
    bytes_up INTEGER, stale INTEGER, checkpoint TEXT);
CREATE TABLE participations ({", ".join(f"{name} {kind}" for name, kind in PARTICIPATIONS.items())},
    PRIMARY KEY (round, client_id, job));
CREATE INDEX jobs ON participations (job);
CREATE TABLE phases (round INTEGER, client_id TEXT, phase TEXT, wall_s REAL, cpu_s REAL);
CREATE TABLE metrics (round INTEGER, name TEXT, value REAL, PRIMARY KEY (round, name));
"""


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
    profile = client.profile
    return {
        "client_id": client.id,
        "exit": client.exit,
        "stages": _list(client.stages),
        "prefix_s": client.prefix_s,
        "stage_s": _list(client.stage_s),
        "num_examples": client.num_examples,
        "platform": profile.platform if profile else "in-process",
        "board": profile.board if profile else "",
        "is_emulated": bool(profile and profile.is_emulated),
        "cpu_scale": profile.cpu_scale if profile else None,
        "link_mbit_s": profile.link_mbit_s if profile else None,
        "profile": msgspec.json.encode(profile).decode() if profile else None,
    }


def participation_row(round: int, result: ClientUpdate | Absence) -> dict[str, object]:
    """round: that the result counts in."""
    row: dict[str, object] = {
        "round": round,
        "client_id": result.client.id,
        "exit": result.client.exit,
        "segments": _segments(result.segments),
        "bytes_down": result.bytes_down,
        "bytes_up": result.bytes_up,
    }
    match result:
        case ClientUpdate(told=told, staleness=staleness):
            row |= {"outcome": "ok", "code": "", "detail": "", "staleness": staleness}
        case Absence(outcome=outcome, code=code, detail=detail):
            told = BLANK
            row |= {"outcome": outcome, "code": code, "detail": detail, "staleness": 0}
    return row | {name: _value(getattr(told, name)) for name in TOLD}


def _value(told: object) -> object:
    """As SQLite keeps it: lists as JSON."""
    return told if isinstance(told, int | float | str) else msgspec.json.encode(told).decode()


def _segments(segments: Sequence[Segment]) -> str:
    """As first-last, e.g. "1-1,3-3": prefix 1, and stage 3 alone."""
    return ",".join(f"{segment.first}-{segment.last}" for segment in segments)


def _list(numbers: Sequence[float]) -> str:
    return ",".join(str(number) for number in numbers)
