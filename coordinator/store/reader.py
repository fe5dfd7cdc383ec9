"""The rounds of a run from its database, for who only looks. Imports no torch: looking is quick."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import msgspec

from coordinator.config import RunConfig, read_config
from coordinator.store import failures
from coordinator.store.database import DATABASE, connect_to_read
from edge_sdk.errors import StoreError
from edge_sdk.helpers.files import is_there
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import ExitResult, Holdout
from edge_sdk.tasks.metrics import METRICS

T = TypeVar("T")
DAMAGED = "it is damaged: put back a copy of the run's folder, or start another run"
# Fields of RoundRow, by the names of the figures that they come from, and their columns for people.
# {key}: the metric's of the run's task.
BY_EXIT = {
    "metric": "{key}_exit_",
    "metric_served": "{key}_served_exit_",
    "perplexity": "perplexity_exit_",
    "loss": "loss_exit_",
    "train_metric": "train_{key}_exit_",
}
ALONE = {"holdout_metric": "holdout_{key}", "personal_metric": "personal_{key}"}
COLUMNS = {"holdout_metric": "hold-out", "personal_metric": "own"}

TASK = "coalesce(json_extract(config, '$.model.task'), 'classify')"
OF_CLIENT = ("train_s", "exits", "holdout")  # of ClientRow, that are more than a column


class RoundRow(msgspec.Struct, frozen=True, kw_only=True):
    """One committed round. By exit, exit 1 first, the metric of the task (tasks/metrics.py):
    metric, metric_served, perplexity: of the model and of the one that is served, on the test set;
    loss, train_metric: of its participants on what they trained on, weighted by their examples.
    None where there is no figure of an exit. families: of a run of several models, the metric of
    each that is served, by name.

    holdout_metric: of the models that its participants received, on what they set aside;
    personal_metric: of every client's own model on its own; None where that was not asked."""

    round: int
    started_utc: str
    wall_s: float
    chosen: int
    returned: int
    stale: int
    stragglers: int
    failures: int
    bytes_down: int
    bytes_up: int
    task: Task = "classify"
    metric: tuple[float | None, ...] = ()
    metric_served: tuple[float | None, ...] = ()
    perplexity: tuple[float | None, ...] = ()
    loss: tuple[float | None, ...] = ()
    train_metric: tuple[float | None, ...] = ()
    families: dict[str, tuple[float | None, ...]] = {}
    holdout_metric: float | None = None
    personal_metric: float | None = None


class ClientRow(msgspec.Struct, frozen=True, kw_only=True):
    """What one participant returned, or why nothing, in the round that it counts in. exit: the
    deepest that it can train; segments: of its job, as "1-1,3-3". exits: loss and metric of each
    exit on what it trained on, last epoch. train_s, holdout: None where not told."""

    round: int
    client_id: str
    exit: int
    segments: str
    outcome: str
    code: str
    detail: str
    num_examples: int
    num_steps: int
    bytes_down: int
    bytes_up: int
    peak_memory_bytes: int
    train_s: float | None
    exits: tuple[ExitResult, ...]
    holdout: Holdout | None = None


class RunRow(msgspec.Struct, frozen=True, kw_only=True):
    """kind: "serve" or "emulate". finished: rounds that are saved, of `rounds`."""

    run: str
    kind: str
    finished: int
    rounds: int
    task: Task = "classify"


def run_row(folder: Path) -> RunRow:
    """What the run is, and how far. Raises StoreError."""
    return _read(folder, _run)


def kept_config(folder: Path) -> RunConfig:
    """The settings that the run began with. Raises StoreError."""
    text = _read(folder, lambda db: db.execute("SELECT config FROM runs").fetchone()[0])
    return read_config(text, str(folder))


def last_rounds(folder: Path, count: int) -> list[RoundRow]:
    """The newest `count` rounds, oldest first. Raises StoreError."""
    return _read(folder, lambda db: _rounds(db, count))


def client_rows(folder: Path) -> list[ClientRow]:
    """Every participation in a committed round, by round and name. Raises StoreError."""
    return _read(folder, _clients)


def last_failures(folder: Path, most: int) -> list[failures.Failures]:
    """The newest of each client, at most so many. Raises StoreError."""
    return _read(folder, lambda db: failures.last_of_clients(db, most))


def _read(folder: Path, query: Callable[[sqlite3.Connection], T]) -> T:
    path = folder / DATABASE
    if not is_there(path):
        raise StoreError(f"{path} is not there, so the run's rounds are not known")
    try:
        with closing(connect_to_read(folder)) as db:
            db.execute("BEGIN")  # one state: a round that ends meanwhile is not half in it
            return query(db)
    except (sqlite3.Error, msgspec.MsgspecError) as error:
        is_sound = isinstance(error, sqlite3.OperationalError) and "no such" not in str(error)
        step = "ask as the user who runs the coordinator" if is_sound else DAMAGED
        raise StoreError(f"{path} cannot be read: {error}; {step}") from error


def _run(db: sqlite3.Connection) -> RunRow:
    names = (
        "run, kind, json_extract(config, '$.rounds'), (SELECT count(*) FROM rounds),"
        f" {TASK} AS task"
    )
    found = db.execute(f"SELECT {names} FROM runs").fetchone()
    if found is None:
        raise sqlite3.DatabaseError("it holds no run")
    run, kind, rounds, finished, task = found
    return msgspec.convert(
        {"run": run, "kind": kind, "finished": finished, "rounds": rounds, "task": task}, RunRow
    )


def _rounds(db: sqlite3.Connection, count: int) -> list[RoundRow]:
    task = _run(db).task
    key, beside = METRICS[task].key, {*BY_EXIT, *ALONE, "families", "task"}
    columns = [name for name in RoundRow.__struct_fields__ if name not in beside]
    statement = f"SELECT {', '.join(columns)} FROM rounds ORDER BY round DESC LIMIT ?"
    rows = [dict(zip(columns, row, strict=True)) for row in db.execute(statement, (count,))]
    found = []
    for row in reversed(rows):
        values = dict(
            db.execute("SELECT name, value FROM metrics WHERE round = ?", (row["round"],))
        )
        by_exit = {f: _by_exit(values, name.format(key=key)) for f, name in BY_EXIT.items()}
        alone = {f: values.get(name.format(key=key)) for f, name in ALONE.items()}
        ends = f".{key}_exit_1"
        names = [name.removesuffix(ends) for name in values if name.endswith(ends)]
        families = {name: _by_exit(values, f"{name}.{key}_exit_") for name in names}
        told = {"families": families, "task": task}
        found.append(msgspec.convert(row | by_exit | alone | told, RoundRow))
    return found


def _by_exit(values: dict[str, float | None], prefix: str) -> tuple[float | None, ...]:
    found = {int(name[len(prefix) :]): v for name, v in values.items() if name.startswith(prefix)}
    return tuple(found.get(exit) for exit in range(1, max(found, default=0) + 1))


def _clients(db: sqlite3.Connection) -> list[ClientRow]:
    columns = [name for name in ClientRow.__struct_fields__ if name not in OF_CLIENT]
    names = ", ".join(f"p.{name}" for name in columns)
    rows = db.execute(
        f"SELECT {names}, t.wall_s, p.exits, p.holdout FROM participations AS p"
        " JOIN rounds USING (round)"
        " LEFT JOIN phases AS t ON t.round = p.round AND t.client_id = p.client_id"
        " AND t.phase = 'train' AND p.outcome = 'ok' ORDER BY p.round, p.client_id"
    )
    return [
        msgspec.convert(
            dict(zip([*columns, "train_s"], row, strict=True))
            | {"exits": msgspec.json.decode(exits), "holdout": msgspec.json.decode(held or "null")},
            ClientRow,
        )
        for *row, exits, held in rows
    ]
