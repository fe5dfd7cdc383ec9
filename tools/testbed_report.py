"""Sum up a run from its database: seconds by platform and phase, bytes, faults, accuracy.

    python tools/testbed_report.py RUN_DIR [--json] [--csv FILE]

Only what the run recorded is read, read-only, so one in progress can be looked at; a phase never
measured says so and is never 0. Emulated boards: see board_seconds. Real and emulated boards of
one platform are kept apart. Bytes are tensor payload, that of absent participants too.
"""

from __future__ import annotations

import argparse
import csv
import sqlite3
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

import msgspec

from coordinator.config import read_config
from coordinator.store import DATABASE, VERSION
from edge_sdk.errors import EdgeError, StoreError

DEVICE_PHASES = ("wait", "download", "load", "train", "upload")
SERVER_PHASES = ("fit", "generate", "aggregate", "evaluate", "checkpoint")
WALL, CPU, LINK = "wall clock", "CPU x scale", "bytes / link"
EMULATED = {"load": CPU, "train": CPU, "download": LINK, "upload": LINK}  # others: wall clock
LAST, SERVED = "accuracy_exit_", "accuracy_served_exit_"
MISSING = "not measured"
SEATS = """SELECT p.*, COALESCE(platform, 'unknown') AS platform, cpu_scale, link_mbit_s,
    COALESCE(is_emulated, 0) AS is_emulated
    FROM participations AS p LEFT JOIN clients USING (client_id) ORDER BY p.round, client_id"""
EMULATED_NOTE = """EMULATED boards ran on this machine; their seconds are CPU seconds x cpu_scale
(load, train), bytes x 8 / link_mbit_s (download, upload), wall clock (wait). Measured: all else."""
REAL_NOTE = "No board is emulated: all seconds are wall clock, measured where the work was done."
IN_PROCESS_NOTE = """In-process clients train by turns inside the coordinator: bytes are what would
be sent, peak memory is the whole process's."""


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
class Tally:
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
    """Clients and updates that trained all stages up to this one, or this one alone."""

    stage: int
    is_alone: bool
    clients: int
    updates: int


@dataclass(frozen=True)
class Platform:
    """All clients of one platform, either real or emulated."""

    platform: str
    is_emulated: bool
    clients: int
    phases: list[PhaseTime]
    tally: Tally
    trained: list[Trained]


@dataclass(frozen=True)
class Accuracy:
    """One exit's accuracy (0..1) in the first and the last round that was evaluated."""

    exit: int
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
    tally: Tally
    accuracy: list[Accuracy]
    figures: dict[str, float | None]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder of a run (--run-dir)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, not tables")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="a row per platform and phase")
    args = parser.parse_args(argv)
    try:
        report = read_run(args.run_dir)
        if args.csv:
            write_csv(report, args.csv)
    except (EdgeError, OSError) as error:
        print(f"testbed_report: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print_report(report)
    return 0


def read_run(folder: Path) -> Report:
    """Sum up the finished rounds of the run in `folder`.

    Raises StoreError: no folder, no database, not a run's, another version, no finished round."""
    path = folder / DATABASE
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder; give the --run-dir of a run")
    if not path.exists():
        raise StoreError(f"{folder} holds no {DATABASE}; give the --run-dir of a run")
    try:
        uri = f"{path.resolve().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as db:
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
    phases = db.execute("SELECT round, client_id, phase, wall_s, cpu_s FROM phases").fetchall()
    metrics = db.execute("SELECT round, name, value FROM metrics ORDER BY round, name").fetchall()
    seats = db.execute(SEATS).fetchall()
    groups: dict[tuple[str, int], list[sqlite3.Row]] = {}
    for seat in seats:
        groups.setdefault((seat["platform"], seat["is_emulated"]), []).append(seat)
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
        tally=_tally(seats, rounds),
        accuracy=_accuracies(metrics),
        figures={
            name: value
            for round, name, value in metrics
            if round == last_round and not name.startswith((LAST, SERVED))
        },
    )


def _platform(seats: list[sqlite3.Row], phases: list[sqlite3.Row], rounds: int) -> Platform:
    by_key = {(seat["round"], seat["client_id"]): seat for seat in seats}
    times = [
        (phase, board_seconds(by_key[round, client], phase, wall_s, cpu_s), wall_s)
        for round, client, phase, wall_s, cpu_s in phases
        if (round, client) in by_key
    ]
    users: dict[tuple[bool, int], list[str]] = {}
    for seat in seats:
        if seat["outcome"] != "ok":
            continue
        prefix, alone = split_segments(seat["segments"])
        for key in [(False, prefix)] * (prefix > 0) + [(True, stage) for stage in alone]:
            users.setdefault(key, []).append(seat["client_id"])
    is_emulated = bool(seats[0]["is_emulated"])
    return Platform(
        platform=seats[0]["platform"],
        is_emulated=is_emulated,
        clients=len({seat["client_id"] for seat in seats}),
        phases=_phase_times(DEVICE_PHASES, times, EMULATED if is_emulated else {}),
        tally=_tally(seats, rounds),
        trained=[
            Trained(stage, is_alone, len(set(names)), len(names))
            for (is_alone, stage), names in sorted(users.items())
        ],
    )


def board_seconds(
    seat: sqlite3.Row, phase: str, wall_s: float, cpu_s: float | None
) -> float | None:
    """Seconds of a phase on the board: wall clock of a real one, and of every `wait`.

    Emulated: load and train are CPU seconds here x cpu_scale, transfers are the participation's
    bytes x 8 / (link_mbit_s x 1e6). None where profile or run lack what that takes."""
    source = EMULATED.get(phase, WALL) if seat["is_emulated"] else WALL
    if source == CPU:
        return cpu_s * seat["cpu_scale"] if cpu_s is not None and seat["cpu_scale"] else None
    if source == LINK:
        num_bits = 8 * seat["bytes_down" if phase == "download" else "bytes_up"]
        return num_bits / (seat["link_mbit_s"] * 1e6) if seat["link_mbit_s"] else None
    return wall_s


def split_segments(text: str) -> tuple[int, list[int]]:
    """The prefix (0: none) and the deeper stages of "1-2,3-3": (2, [3])."""
    prefix, deeper = 0, []
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


def _tally(seats: Sequence[sqlite3.Row], rounds: int) -> Tally:
    down, up = (sum(seat[name] for seat in seats) for name in ("bytes_down", "bytes_up"))
    outcomes = Counter(seat["outcome"] for seat in seats)
    failures = Counter(seat["code"] for seat in seats if seat["outcome"] == "failed")
    return Tally(
        participations=len(seats),
        returned=outcomes["ok"],
        stragglers=outcomes["straggler"],
        failures=dict(sorted(failures.items())),
        retries=sum(seat["retries"] for seat in seats),
        bytes_down_each=down / max(1, len(seats)),
        bytes_up_each=up / max(1, len(seats)),
        bytes_down_a_round=down / rounds,
        bytes_up_a_round=up / rounds,
        peak_memory_bytes=max((seat["peak_memory_bytes"] for seat in seats), default=0) or None,
    )


def _accuracies(metrics: Iterable[tuple[int, str, float | None]]) -> list[Accuracy]:
    """metrics: round, name, value in order of rounds."""
    series: dict[str, list[tuple[int, float]]] = {}
    for round, name, value in metrics:
        if value is not None:
            series.setdefault(name, []).append((round, value))
    found = []
    for exit in sorted(int(name[len(LAST) :]) for name in series if name.startswith(LAST)):
        values, served = series[f"{LAST}{exit}"], series.get(f"{SERVED}{exit}")
        found.append(Accuracy(exit, *values[0], *values[-1], served[-1][1] if served else None))
    return found


def write_csv(report: Report, path: Path) -> None:
    """One row per platform (the coordinator's is "server") and phase."""
    rows = [(p.platform, int(p.is_emulated), time) for p in report.platforms for time in p.phases]
    rows += [("server", 0, time) for time in report.server]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        head = "platform is_emulated phase source count p50_s p95_s max_s"
        writer.writerow(f"{head} wall_count wall_p50_s wall_p95_s wall_max_s".split())
        for platform, is_emulated, time in rows:
            cells = (*astuple(time.board), *astuple(time.wall))
            figures = (MISSING if cell is None else cell for cell in cells)
            writer.writerow((platform, is_emulated, time.phase, time.source, *figures))


def print_report(report: Report) -> None:
    """Plain text for people; columns are as wide as their cells, nothing is cut."""
    clients = sum(p.clients for p in report.platforms)
    print(f"Run {report.run} ({report.kind}, {report.method}), begun {report.created_utc}:")
    print(f"{report.rounds} of {report.rounds_planned} rounds finished, {clients} clients.")
    print(EMULATED_NOTE if any(p.is_emulated for p in report.platforms) else REAL_NOTE)
    if any(p.platform == "in-process" for p in report.platforms):
        print(IN_PROCESS_NOTE)

    names = [p.platform + " (emulated)" * p.is_emulated for p in report.platforms]
    rows = []
    for name, p in zip(names, report.platforms, strict=True):
        rows.append([f"{name}, {p.clients} client{'s' * (p.clients != 1)}"])
        rows += [_phase_row(time, p.is_emulated) for time in p.phases]
    rows += [["server"], *(_phase_row(time, False) for time in report.server)]
    head = "seconds,count,p50,p95,max,wall p50,wall p95,wall max,from"
    print_table(head, rows)

    tallies = [*zip(names, (p.tally for p in report.platforms), strict=True), ("all", report.tally)]
    rows = []
    for name, t in tallies:
        sizes = (t.bytes_down_each, t.bytes_up_each, t.bytes_down_a_round, t.bytes_up_a_round)
        rows.append([name, *map(_size, (*sizes, t.peak_memory_bytes))])
    print_table("bytes,down/client,up/client,down/round,up/round,peak memory", rows)
    rows = []
    for name, t in tallies:
        codes = ", ".join(f"{code} {count}" for code, count in t.failures.items())
        failed = str(sum(t.failures.values())) + f" ({codes})" * bool(codes)
        counts = (t.participations, t.returned, t.stragglers, t.retries)
        rows.append([name, *map(str, counts), failed])
    print_table("participants,chosen,returned,stragglers,retries,failed", rows)

    rows = []
    for name, p in zip(names, report.platforms, strict=True):
        for done in p.trained:
            depth = f"stage {done.stage} alone" if done.is_alone else f"up to exit {done.stage}"
            rows.append([name, depth, str(done.clients), str(done.updates)])
    print_table("trained,depth,clients,updates", rows or [["nothing returned"]])

    rows = []
    for a in report.accuracy:
        shares = [_figure(s and 100 * s, ".1f") for s in (a.first, a.last, a.served_last)]
        rows.append(
            [f"exit {a.exit}", str(a.first_round), shares[0], str(a.last_round), *shares[1:]]
        )
    print_table("accuracy in %,round,first,round,last,served last", rows or [[MISSING]])
    figures = [
        f"{name} = {'not a number' if value is None else f'{value:.4g}'}"
        for name, value in report.figures.items()
    ]
    text = f"Figures of the method in its last round: {'; '.join(figures) or 'none'}"
    print("\n" + textwrap.fill(text, 100, break_long_words=False))


def print_table(head: str, rows: list[list[str]]) -> None:
    """First column to the left, the others to the right; a row of one cell is a heading.

    Names come from devices: what would control the terminal is shown as "?"."""
    lines = [head.split(",")]
    lines += [
        ["".join(c if c.isprintable() else "?" for c in cell) for cell in row] for row in rows
    ]
    columns = zip(*(line for line in lines if len(line) > 1), strict=True)
    widths = [max(map(len, column)) for column in columns]
    print()
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=False)]
        print("  ".join([line[0].ljust(widths[0]), *cells]).rstrip())


def _phase_row(time: PhaseTime, is_emulated: bool) -> list[str]:
    """Wall clock stands beside an emulated board's seconds only: elsewhere it is the same."""
    board = [str(time.board.count), *map(_seconds, astuple(time.board)[1:])]
    wall = [*map(_seconds, astuple(time.wall)[1:])]
    return [
        f"  {time.phase}",
        *(board if time.board.count else ["", MISSING, "", ""]),
        *(wall if is_emulated and time.wall.count else ["", "", ""]),
        time.source,
    ]


def _seconds(seconds: float | None) -> str:
    return "<0.001" if seconds and seconds < 0.0005 else _figure(seconds, ".3f")


def _figure(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)


def _size(num_bytes: float | None) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes and num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return _figure(num_bytes, ".0f") + " B" * (num_bytes is not None)


if __name__ == "__main__":
    sys.exit(main())
