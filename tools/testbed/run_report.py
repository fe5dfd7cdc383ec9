"""What a run's database says of its finished rounds, summed up for tools/testbed/report.py.

Only what the run recorded is read, read-only, so one in progress can be looked at; a phase never
measured says so and is never 0. Emulated boards: see board_seconds. Real and emulated boards of
one platform are kept apart. Bytes are tensor payload, that of absent participants too.
"""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from coordinator.config import read_config
from coordinator.store.database import DATABASE, connect_to_read
from coordinator.store.tables import VERSION
from edge_sdk.errors import StoreError
from edge_sdk.tasks.metrics import METRICS, Metric

DEVICE_PHASES = ("wait", "download", "load", "train", "upload")
SERVER_PHASES = ("fit", "generate", "aggregate", "evaluate", "checkpoint")
WALL, CPU, LINK = "wall clock", "CPU x scale", "bytes / link"
EMULATED = {"load": CPU, "train": CPU, "download": LINK, "upload": LINK}  # others: wall clock
HOLDOUTS = {"holdout": "hold-outs, as received", "personal": "hold-outs, own"}
PARTICIPATIONS = """SELECT p.*, COALESCE(platform, 'unknown') AS platform, cpu_scale, link_mbit_s,
    COALESCE(is_emulated, 0) AS is_emulated
    FROM participations AS p LEFT JOIN clients USING (client_id) ORDER BY p.round, client_id"""


@dataclass(frozen=True)
class Summary:
    """Nearest-rank percentiles of `count` measurements; None where there are none."""

    count: int
    p50_s: float | None = None
    p95_s: float | None = None
    max_s: float | None = None


@dataclass(frozen=True)
class PhaseTime:
    """board: the board's seconds, got by `source`; wall: clock of the machine that did the work."""

    phase: str
    source: str
    board: Summary
    wall: Summary


@dataclass(frozen=True)
class Totals:
    """Over all finished rounds. each: mean over participations; a_round: mean over rounds."""

    participations: int
    returned: int
    stragglers: int
    failures: dict[str, int]  # by code
    retries: int
    bytes_down_each: float
    bytes_up_each: float
    bytes_down_a_round: float
    bytes_up_a_round: float
    peak_memory_bytes: int | None  # None: not measured


@dataclass(frozen=True)
class Trained:
    """Clients and updates that trained all stages up to this one, or this one alone; of one of the
    method's variants, if it offers any."""

    stage: int
    is_alone: bool
    clients: int
    updates: int
    variant: int = 0


@dataclass(frozen=True)
class Levers:
    """How often one device saved memory at the price of time, as its returned updates say.

    An update does not tell whether features of a frozen prefix were kept, hence nor does this."""

    client_id: str
    updates: int
    in_parts: int  # of these: batches went through in parts
    smallest_part: int | None  # examples at once, None: never in parts
    recomputed: int  # stages ran a second time instead of keeping what they computed


@dataclass(frozen=True)
class Platform:
    """All clients of one platform, either real or emulated."""

    platform: str
    is_emulated: bool
    clients: int
    phases: list[PhaseTime]
    totals: Totals
    trained: list[Trained]
    levers: list[Levers]  # of every device that returned an update


@dataclass(frozen=True)
class Figure:
    """The task's metric in the first and the last round that has it. of: "exit 1", ... on the test
    set, of several models "small, exit 1", ..., or what clients set aside."""

    of: str
    first_round: int
    first: float
    last_round: int
    last: float
    served_last: float | None


@dataclass(frozen=True)
class Report:
    """A run's finished rounds. figures: the method's own, of the last round; None: NaN."""

    run: str
    created_utc: str
    kind: str
    method: str
    rounds: int
    rounds_planned: int
    platforms: list[Platform]
    server: list[PhaseTime]
    totals: Totals
    metric: Metric
    tested: list[Figure]
    figures: dict[str, float | None]


def read_run(folder: Path) -> Report:
    """Sum up the finished rounds of the run in `folder`.

    Raises StoreError: no folder, no database, not a run's, another version, no finished round."""
    path = folder / DATABASE
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder; give the --run-dir of a run")
    if not path.exists():
        raise StoreError(f"{folder} holds no {DATABASE}; give the --run-dir of a run")
    try:
        with closing(connect_to_read(folder)) as db:
            db.row_factory = sqlite3.Row
            db.execute("BEGIN")  # one snapshot: a round that ends meanwhile is not half in it
            return _read(db, folder)
    except (sqlite3.Error, LookupError, TypeError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as a run's database: {error}") from error


def _read(db: sqlite3.Connection, folder: Path) -> Report:
    (version,) = db.execute("SELECT version FROM runs").fetchone() or ("unknown",)
    if version != VERSION:
        raise StoreError(
            f"{folder} was written by run format {version}, this is format {VERSION}; "
            "use the version that made it"
        )
    run = db.execute("SELECT * FROM runs").fetchone()
    rounds, last_round = db.execute("SELECT COUNT(*), MAX(round) FROM rounds").fetchone()
    if not rounds:
        raise StoreError(f"run {run['run']} in {folder} has no finished round yet; nothing to show")
    config = read_config(run["config"], str(folder / DATABASE))
    metric = METRICS[config.model.task]
    phases = db.execute("SELECT round, client_id, phase, wall_s, cpu_s FROM phases").fetchall()
    metrics = db.execute("SELECT round, name, value FROM metrics ORDER BY round, name").fetchall()
    rows = db.execute(PARTICIPATIONS).fetchall()
    groups: dict[tuple[str, int], list[sqlite3.Row]] = {}
    for row in rows:
        groups.setdefault((row["platform"], row["is_emulated"]), []).append(row)
    server = [(name, wall_s, wall_s) for _, client, name, wall_s, _ in phases if client is None]
    return Report(
        run=run["run"],
        created_utc=run["created_utc"],
        kind=run["kind"],
        method=config.method,
        rounds=rounds,
        rounds_planned=config.rounds,
        platforms=[_platform(groups[key], phases, rounds) for key in sorted(groups)],
        server=_phase_times(SERVER_PHASES, server, {}),
        totals=_totals(rows, rounds),
        metric=metric,
        tested=_tested(metric, metrics),
        figures={
            name: value
            for round, name, value in metrics
            if round == last_round and "_exit_" not in name
        },
    )


def _platform(rows: list[sqlite3.Row], phases: list[sqlite3.Row], rounds: int) -> Platform:
    by_key = {(row["round"], row["client_id"]): row for row in rows}
    times = [
        (phase, board_seconds(by_key[round, client], phase, wall_s, cpu_s), wall_s)
        for round, client, phase, wall_s, cpu_s in phases
        if (round, client) in by_key
    ]
    users: dict[tuple[bool, int, int], list[str]] = {}
    for row in rows:
        if row["outcome"] != "ok":
            continue
        prefix, alone = split_segments(row["segments"])
        trained = [(False, prefix)] * (prefix > 0) + [(True, stage) for stage in alone]
        for key in trained:
            users.setdefault((*key, row["variant"]), []).append(row["client_id"])
    is_emulated = bool(rows[0]["is_emulated"])
    return Platform(
        platform=rows[0]["platform"],
        is_emulated=is_emulated,
        clients=len({row["client_id"] for row in rows}),
        phases=_phase_times(DEVICE_PHASES, times, EMULATED if is_emulated else {}),
        totals=_totals(rows, rounds),
        trained=[
            Trained(stage, is_alone, len(set(names)), len(names), variant)
            for (is_alone, stage, variant), names in sorted(users.items())
        ],
        levers=_levers(rows),
    )


def _levers(rows: Sequence[sqlite3.Row]) -> list[Levers]:
    returned: dict[str, list[sqlite3.Row]] = {}
    for row in rows:
        if row["outcome"] == "ok":
            returned.setdefault(row["client_id"], []).append(row)
    found = []
    for client_id, updates in sorted(returned.items()):
        parts = [update["micro_batch"] for update in updates if update["micro_batch"]]
        again = sum(update["recompute"] for update in updates)
        found.append(Levers(client_id, len(updates), len(parts), min(parts, default=None), again))
    return found


def board_seconds(row: sqlite3.Row, phase: str, wall_s: float, cpu_s: float | None) -> float | None:
    """Seconds of a phase on the board: wall clock of a real one, and of every `wait`.

    Emulated: load and train are CPU seconds here x cpu_scale, transfers are the participation's
    bytes x 8 / (link_mbit_s x 1e6). None where profile or run lack what that takes."""
    source = EMULATED.get(phase, WALL) if row["is_emulated"] else WALL
    if source == CPU:
        return cpu_s * row["cpu_scale"] if cpu_s is not None and row["cpu_scale"] else None
    if source == LINK:
        num_bits = 8 * row["bytes_down" if phase == "download" else "bytes_up"]
        return num_bits / (row["link_mbit_s"] * 1e6) if row["link_mbit_s"] else None
    return wall_s


def split_segments(text: str) -> tuple[int, list[int]]:
    """The prefix (0: none) and the deeper stages of "1-2,3-3": (2, [3])."""
    prefix, deeper = 0, list[int]()
    for segment in filter(None, text.split(",")):
        first, last = map(int, segment.split("-"))
        if first == 1:
            prefix = last
        else:
            deeper += range(first, last + 1)
    return prefix, deeper


def nearest_rank(values: Iterable[float], percent: int) -> float:
    """The smallest value that at least `percent` % of the values do not exceed: of n sorted
    values, number ceil(percent x n / 100), from 1. Always a measured value, never between two."""
    ordered = sorted(values)
    return ordered[max(1, -(-percent * len(ordered) // 100)) - 1]


def summarise(values: Sequence[float]) -> Summary:
    if not values:
        return Summary(0)
    return Summary(len(values), nearest_rank(values, 50), nearest_rank(values, 95), max(values))


def _phase_times(
    known: tuple[str, ...], times: list[tuple[str, float | None, float]], sources: dict[str, str]
) -> list[PhaseTime]:
    """Every known phase, measured or not, then others. times: phase, board's and wall seconds."""
    found = []
    for phase in (*known, *sorted({name for name, _, _ in times} - set(known))):
        board = [board_s for name, board_s, _ in times if name == phase and board_s is not None]
        wall = [wall_s for name, _, wall_s in times if name == phase]
        source = sources.get(phase, WALL)
        found.append(PhaseTime(phase, source, summarise(board), summarise(wall)))
    return found


def _totals(rows: Sequence[sqlite3.Row], rounds: int) -> Totals:
    down, up = (sum(row[name] for row in rows) for name in ("bytes_down", "bytes_up"))
    outcomes = Counter(row["outcome"] for row in rows)
    failures = Counter(row["code"] for row in rows if row["outcome"] == "failed")
    return Totals(
        participations=len(rows),
        returned=outcomes["ok"],
        stragglers=outcomes["straggler"],
        failures=dict(sorted(failures.items())),
        retries=sum(row["retries"] for row in rows),
        bytes_down_each=down / max(1, len(rows)),
        bytes_up_each=up / max(1, len(rows)),
        bytes_down_a_round=down / rounds,
        bytes_up_a_round=up / rounds,
        peak_memory_bytes=max((row["peak_memory_bytes"] for row in rows), default=0) or None,
    )


def _tested(metric: Metric, metrics: Iterable[tuple[int, str, float | None]]) -> list[Figure]:
    """metrics: round, name, value in order of rounds."""
    series: dict[str, list[tuple[int, float]]] = {}
    for round, name, value in metrics:
        if value is not None:
            series.setdefault(name, []).append((round, value))
    found, last = [], f"{metric.key}_exit_"
    families = {name.partition(last)[0] for name in series if f".{last}" in f".{name}"}
    for family in sorted(families):  # "small.", or "" of a run of one model
        begin = f"{family}{last}"
        for exit in sorted(int(name[len(begin) :]) for name in series if name.startswith(begin)):
            values = series[f"{begin}{exit}"]
            served = series.get(f"{family}{metric.key}_served_exit_{exit}")
            of = f"{family.replace('.', ', ')}exit {exit}"
            found.append(Figure(of, *values[0], *values[-1], served and served[-1][1]))
    for name, of in HOLDOUTS.items():
        if values := series.get(f"{name}_{metric.key}", []):
            found.append(Figure(of, *values[0], *values[-1], None))
    return found
