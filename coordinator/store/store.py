"""A run's memory: one folder with SQLite for what happened and safetensors for the model.

Order of a commit: checkpoint written, synced, renamed, folder synced; then the database row that
names it, in the same transaction as everything recorded about the round. Killed anywhere, the last
row names a whole checkpoint; begun.json names the participants of the round after it, and spool/
holds what they had sent. The newest two checkpoints are kept, so the folder grows by rows only:
about (participants x 5) phases a round.
"""

from __future__ import annotations

import logging
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError
from torch import Tensor

from coordinator.cohorts.base import Absence, Client, ClientUpdate
from coordinator.config import RunConfig, read_config
from coordinator.methods.base import Metrics
from coordinator.store import failures
from coordinator.store.checkpoints import checkpoint_name, read_checkpoint, sweep, write_checkpoint
from coordinator.store.database import DATABASE, connect_to_read, connect_to_write
from coordinator.store.lock import RunLock
from coordinator.store.round_journal import RoundJournal
from coordinator.store.tables import (
    COUNTED,
    COUNTS,
    SCHEMA,
    SECONDS,
    TRAINED,
    VERSION,
    RoundTotals,
    client_row,
    insert,
    participation_row,
)
from edge_sdk.data.contract import ModelNote
from edge_sdk.errors import StoreError
from edge_sdk.helpers.files import is_there, sync, why_not
from edge_sdk.protocol.messages import ModelSpec, Phase
from edge_sdk.protocol.tensors import Tensors
from edge_sdk.protocol.timing import clock, since
from edge_sdk.tasks.metrics import METRICS

log = logging.getLogger(__name__)
KEPT_CHECKPOINTS = 2
BEGUN = "begun.json"
SPOOL = "spool"


class Store:
    """Opened by `create` for a new run, `resume` to go on with one, `open_readonly` to read it."""

    def __init__(self, folder: Path, config: RunConfig, run: str, db: sqlite3.Connection) -> None:
        self.folder = folder
        self.config = config
        self.run = run
        self.is_temporary = False  # deleted when the program ends
        self._journal = RoundJournal(folder / BEGUN)
        self._lock: RunLock | None = None
        self._db = db

    def lock(self) -> None:
        """Keep every other process from writing until this store is closed. Raises StoreError."""
        self._lock = RunLock(self.folder)

    def check_held(self) -> None:
        """Raise StoreError if the folder was deleted or replaced since it was locked."""
        if self._lock:
            self._lock.check()

    def amend(self, config: RunConfig) -> None:
        """The run goes on with these settings, that of it which may change. Raises StoreError."""
        self.config = config
        with self._writing():
            self._db.execute("UPDATE runs SET config = ?", (self.config.to_json(),))
            self._db.commit()

    def sweep(self) -> None:
        """Delete checkpoints that no committed round names, as a kill leaves them."""
        sweep(self.folder, (path.name for _, path in self.checkpoints()))

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Round and file of those that are kept, the newest first."""
        kept = "SELECT round, checkpoint FROM rounds ORDER BY round DESC LIMIT ?"
        rows = self._read(kept, KEPT_CHECKPOINTS)
        return [(round, self.folder / name) for round, name in rows]

    def go_back(self, round: int) -> None:
        """Forget every round after this one, and what the spool holds. Raises StoreError."""
        with self._writing():
            for table in ("rounds", "participations", "phases", "metrics"):
                self._db.execute(f"DELETE FROM {table} WHERE round > ?", (round,))
            self._db.commit()
        for path in (self.folder / SPOOL).glob("*"):
            path.unlink(missing_ok=True)

    @staticmethod
    def check_free(folder: Path) -> None:
        """Raise StoreError if a run is in `folder`."""
        if is_there(folder / DATABASE):
            raise StoreError(
                f"{folder} holds a run already; go on with --resume or choose another --run-dir"
            )

    @classmethod
    def create(cls, folder: Path, config: RunConfig, kind: str) -> Store:
        """Start a run in `folder`. Raises StoreError if one is there already."""
        cls.check_free(folder)
        run = os.urandom(6).hex()
        draft = folder / (DATABASE + ".new")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in (draft, *(folder / (DATABASE + end) for end in ("-wal", "-shm"))):
                stale.unlink(missing_ok=True)  # SQLite would replay a deleted run's log
            with closing(sqlite3.connect(draft)) as db, db:
                db.executescript(SCHEMA)
                about = {"version": VERSION, "run": run, "config": config.to_json(), "kind": kind}
                insert(db, "runs", about | {"created_utc": _utc()})
            os.replace(draft, folder / DATABASE)
            sync(folder)
        except (OSError, sqlite3.Error) as error:
            raise StoreError(f"cannot start a run in {folder}: {why_not(error)}") from error
        return cls(folder, config, run, connect_to_write(folder))

    @classmethod
    def resume(cls, folder: Path) -> Store:
        """Go on with the run in `folder`. Raises StoreError: none there, another version, corrupt,
        not to be written."""
        return cls._open(folder, connect_to_write, "start one without --resume")

    @classmethod
    def open_readonly(cls, folder: Path) -> Store:
        """Open the run to read it, also where nothing may be written. Raises StoreError."""
        return cls._open(folder, connect_to_read, "give the --run-dir of a run")

    @classmethod
    def _open(cls, folder: Path, connect: Callable[[Path], sqlite3.Connection], step: str) -> Store:
        """step: what to do where no run is. Raises StoreError."""
        if not is_there(folder / DATABASE):
            raise StoreError(f"{folder} holds no run; {step}")
        with ExitStack() as stack:  # closes it after an error
            try:
                db = stack.enter_context(closing(connect(folder)))
                version, run, text = db.execute("SELECT version, run, config FROM runs").fetchone()
            except (sqlite3.Error, TypeError, ValueError) as error:
                raise StoreError(f"{folder / DATABASE} is not a run's database: {error}") from error
            if version != VERSION:
                raise StoreError(
                    f"{folder} was written by run format {version}, this is format {VERSION}; "
                    "use the version that made it or another --run-dir"
                )
            config = read_config(text, str(folder / DATABASE))
            stack.pop_all()
        return cls(folder, config, run, db)

    def way_on(self, round: int | None = None) -> str:
        """What to do after a stop or an error, as the end of its message."""
        if self.is_temporary:
            return "nothing was kept without --run-dir"
        return "go on with --resume" + (f" at round {round}" if round else "")

    def next_round(self) -> int:
        """The round after the last that was committed; 1 for a new run."""
        return int(self._read("SELECT COALESCE(MAX(round), 0) + 1 FROM rounds")[0][0])

    @property
    def is_finished(self) -> bool:
        """Whether every round of the settings is committed."""
        return self.next_round() > self.config.rounds

    def load_checkpoint(self) -> Tensors | None:
        """The method's state after the last committed round; None before the first. Raises
        StoreError."""
        rows = self._read("SELECT checkpoint FROM rounds ORDER BY round DESC LIMIT 1")
        if not rows:
            return None
        return read_checkpoint(self.folder / rows[0][0])

    def history(self) -> list[dict[str, object]]:
        """Every committed round: the metric per exit (last and served), seconds by phase (CPU where
        measured, summed over clients), bytes, counts, and the method's own figures."""
        rounds, totals = [], [field.name for field in fields(RoundTotals)]
        metric = METRICS[self.config.model.task]
        by_exit = [metric.key, f"{metric.key}_served", "loss", f"train_{metric.key}"]
        by_exit += ["perplexity"] * metric.has_perplexity  # of the served model
        for row in self._read(f"SELECT round, {', '.join(totals)} FROM rounds ORDER BY round"):
            values = dict(self._read("SELECT name, value FROM metrics WHERE round = ?", row[0]))
            rounds.append(
                {
                    "round": row[0],
                    **{name: _per_exit(values, f"{name}_exit_") for name in by_exit},
                    "seconds": dict(self._read(SECONDS, row[0])),
                    **dict(zip(totals, row[1:], strict=True)),
                    "figures": {k: v for k, v in values.items() if "_exit_" not in k},
                }
            )
        return rounds

    def client_models(self) -> dict[str, Client]:
        """Every client that was ever chosen, with the model that it trains, as last known."""
        rows = self._read("SELECT client_id, exit, variant, num_weights FROM clients")
        return {name: Client(name, exit, variant=v, num_weights=n) for name, exit, v, n in rows}

    def client_examples(self) -> dict[str, int]:
        """The examples, as last told, of every client that was ever chosen."""
        return dict(self._read("SELECT client_id, num_examples FROM clients"))

    def trained(self) -> list[tuple[int, int, str, int]]:
        """Of every update that counts: round, the client's exit, segments ("1-1,3-3"), examples."""
        return self._read(TRAINED)

    def failures(self) -> list[failures.Failures]:
        """Why participants returned nothing, by round and kind; of the round in progress too."""
        with self._reading():
            return failures.by_kind(self._db)

    def begin(self, round: int, chosen: Iterable[Client]) -> None:
        """Note that these clients take part in the round too. Raises StoreError."""
        self.check_held()
        try:
            self._journal.add(round, chosen)
        except OSError as error:
            raise StoreError(
                f"{self._journal.path} cannot be written: {error}; free space; {self.way_on(round)}"
            ) from error

    def participants_of(self, round: int) -> tuple[list[Client], int]:
        """Who takes part in a round that was not finished, and how many were chosen for it at
        first; nobody if it was not begun."""
        return self._journal.read(round)

    def was_counted(self, job: str) -> bool:
        """Whether the update of this job is part of a committed round."""
        return bool(
            self._read("SELECT 1 FROM participations JOIN rounds USING (round) WHERE job = ?", job)
        )

    def counted(self, round: int) -> list[str]:
        """The clients with an update of this round that counts in it."""
        return [name for (name,) in self._read(COUNTED, round)]

    def record_clients(self, clients: Iterable[Client]) -> None:
        """Record what is known of each client now, for the next commit."""
        for client in clients:
            self._insert("clients", client_row(client), "OR REPLACE")

    def record_results(
        self, round: int, results: Iterable[ClientUpdate | Absence]
    ) -> Iterator[ClientUpdate]:
        """Pass the updates on, having recorded every result for the next commit."""
        for result in results:
            if isinstance(result, ClientUpdate):
                self._record_update(round, result)
                yield result
            else:
                self._insert("participations", participation_row(round, result), "OR REPLACE")

    def commit(
        self,
        round: int,
        metrics: Metrics,
        state: Mapping[str, Tensor],
        started_utc: str,
        wall_s: float,
    ) -> RoundTotals:
        """Make the round final. Raises StoreError (disk full, read-only) and then changes nothing:
        the run resumes at this round."""
        self.check_held()
        name = checkpoint_name(round)
        for phase, time in metrics.phases.items():
            self._phase(round, None, phase, time)
        for key, value in metrics.values.items():
            self._insert("metrics", {"round": round, "name": key, "value": value})
        try:
            start = clock()
            write_checkpoint(self.folder / name, state)
            self._phase(round, None, "checkpoint", since(start))
            totals = self._totals(round, wall_s)
            row = {"round": round, "started_utc": started_utc, "checkpoint": name}
            insert(self._db, "rounds", row | asdict(totals))
            self._db.commit()
        except (OSError, sqlite3.Error, SafetensorError) as error:
            self.rollback()
            raise StoreError(
                f"round {round} could not be saved in {self.folder}: {error}; free space or make "
                f"it writable; {self.way_on(round)}"
            ) from error
        with suppress(OSError):  # the round is final, whether or not this can be deleted
            (self.folder / checkpoint_name(round - KEPT_CHECKPOINTS)).unlink()
        return totals

    def write_model(self, spec: ModelSpec, tensors: Tensors, name: str = "model") -> Path:
        """The model to use as `NAME.safetensors`; its metadata: a ModelNote as JSON."""
        path = self.folder / f"{name}.safetensors"
        note = ModelNote(spec=spec, data=self.config.trained_on)
        self.write_tensors(path, tensors, {"model": msgspec.json.encode(note).decode()})
        return path

    def write_tensors(
        self, path: Path, tensors: Mapping[str, Tensor], about: dict[str, str] | None = None
    ) -> None:
        """A file of the run's folder, whole or not at all. Raises StoreError."""
        self.check_held()
        try:
            write_checkpoint(path, tensors, about)
        except (OSError, SafetensorError) as error:
            raise StoreError(
                f"{path} cannot be written: {error}; free space; {self.way_on()}"
            ) from error

    def write_endpoint(self, endpoint: str) -> None:
        """Tell scripts where the coordinator listens: the port may be any free one."""
        path = self.folder / "endpoint"
        try:
            path.write_text(endpoint + "\n")
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error}; free space, --resume") from error

    def rollback(self) -> None:
        """Forget what was recorded since the last commit."""
        try:
            self._db.rollback()
        except sqlite3.Error:
            log.exception("rollback failed; the database keeps its last commit")

    def close(self) -> None:
        """Only why participants failed is kept of a round that is not finished."""
        if self._lock:
            with suppress(sqlite3.Error):
                failures.keep(self._db)
        self.rollback()
        self._db.close()
        if self._lock:
            self._lock.release()
            self._lock = None

    def _totals(self, round: int, wall_s: float) -> RoundTotals:
        (row,) = self._read(COUNTS, round)
        return RoundTotals(wall_s, self._journal.count(round), *(int(value) for value in row))

    def _record_update(self, round: int, update: ClientUpdate) -> None:
        absences = "round = ? AND client_id = ? AND outcome != 'ok'"
        with self._writing():  # it was given another job in this round, which it returned
            self._db.execute(
                f"DELETE FROM participations WHERE {absences}", (round, update.client.id)
            )
        self._insert("participations", participation_row(round, update))
        for phase, time in update.phases.items():
            self._phase(round, update.client.id, phase, time)

    def _phase(self, round: int, client_id: str | None, phase: str, time: Phase) -> None:
        row = {"round": round, "client_id": client_id, "phase": phase}
        self._insert("phases", row | {"wall_s": time.wall_s, "cpu_s": time.cpu_s})

    def _read(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        with self._reading():
            return self._db.execute(statement, values).fetchall()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreError(f"{self.folder / DATABASE} cannot be read: {error}") from error

    def _insert(self, table: str, row: Mapping[str, object], how: str = "") -> None:
        """See tables.insert. Raises StoreError."""
        with self._writing():
            insert(self._db, table, row, how)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self.rollback()
            raise StoreError(f"{self.folder / DATABASE}: {error}; {self.way_on()}") from error


def _per_exit(values: Mapping[str, float], prefix: str) -> list[float]:
    """Values named prefix1, prefix2, ... in order."""
    found: list[float] = []
    while (name := f"{prefix}{len(found) + 1}") in values:
        found.append(values[name])
    return found


def _utc() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
