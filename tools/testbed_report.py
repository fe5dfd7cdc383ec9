"""Sum up a run from what its database recorded: time by platform and phase, bytes, faults, accuracy.

    python tools/testbed_report.py RUN_DIR [--json] [--csv FILE]

Only measured data is read, read-only, so a run in progress can be looked at; rounds not yet
finished are left out. A phase that was never measured says so and is never shown as 0.

Emulated boards run on this machine. Their seconds are what it measured, converted by the board's
profile: CPU seconds x cpu_scale for load and train, bytes x 8 / (link_mbit_s x 1e6) for download
and upload, wall clock for wait. Wall clock of this machine stands beside them. Real and emulated
boards of one platform are never mixed.

The database lists the exits with results, not the segments: a participant's stages 1, 2, ... up to
its own exit are its prefix, any other was trained alone. That is exact for devices, which refuse
a longer prefix; in one process a method of WHOLE_MODEL gives it to everybody.
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
from typing import NamedTuple

import msgspec

from coordinator.config import read_config
from coordinator.store import DATABASE, VERSION
from edge_sdk.errors import EdgeError, StoreError

DEVICE_PHASES = ("wait", "download", "load", "train", "upload")
SERVER_PHASES = ("fit", "generate", "aggregate", "evaluate", "checkpoint")
WALL, CPU, LINK = "wall clock", "CPU x scale", "bytes / link"
EMULATED = {"load": CPU, "train": CPU, "download": LINK, "upload": LINK}  # others: wall clock
WHOLE_MODEL = ("fedavg-l",)
SERVED, LAST = "accuracy_served_exit_", "accuracy_exit_"
MISSING = "not measured"
COLUMNS = 100


class Participation(NamedTuple):
    """One participant in one round and its client, in the order of PARTICIPATIONS."""

    round: int
    client_id: str
    exit: int
    segments: str
    outcome: str
    code: str
    bytes_down: int
    bytes_up: int
    peak_memory_bytes: int
    retries: int
    platform: str
    is_emulated: int
    cpu_scale: float | None
    link_mbit_s: float | None


PARTICIPATIONS = """
SELECT p.round, client_id, p.exit, segments, outcome, code, bytes_down, bytes_up,
    peak_memory_bytes, retries, COALESCE(platform, 'unknown'), COALESCE(is_emulated, 0),
    cpu_scale, link_mbit_s
FROM participations AS p LEFT JOIN clients USING (client_id) ORDER BY p.round, client_id"""


@dataclass(frozen=True)
class Summary:
    """Nearest-rank percentiles of measurements; None where there are none."""

    count: int
    p50_s: float | None = None
    p95_s: float | None = None
    max_s: float | None = None


@dataclass(frozen=True)
class PhaseTime:
    """board: the board's seconds, by `source`; wall: clock of the machine that did the work."""

    phase: str
    source: str
    board: Summary
    wall: Summary


@dataclass(frozen=True)
class Tally:
    """Counts over all finished rounds; bytes are tensor payload, absent participants' too.

    each: mean over participations; a_round: mean over finished rounds."""

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
    """How many clients returned this exit's prefix (or this stage alone), in how many updates."""

    number: int
    clients: int
    updates: int


@dataclass(frozen=True)
class Platform:
    """All clients of one platform, real or emulated."""

    platform: str
    is_emulated: bool
    clients: int
    phases: list[PhaseTime]
    tally: Tally
    exits: list[Trained]
    stages: list[Trained]

    @property
    def label(self) -> str:
        return self.platform + " (emulated)" * self.is_emulated


@dataclass(frozen=True)
class Accuracy:
    """One exit's accuracy (0..1) in the first and the last evaluated round."""

    exit: int
    first_round: int
    first: float
    last_round: int
    last: float
    served_last: float | None


@dataclass(frozen=True)
class Report:
    """A run's finished rounds. figures: the method's own, of the last round."""

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
            db.execute("BEGIN")  # one snapshot: a round that ends meanwhile is not half in it
            return _read(db, folder)
    except (sqlite3.Error, TypeError, ValueError) as error:
        raise StoreError(f"{path} cannot be read as a run's database: {error}") from error


def _read(db: sqlite3.Connection, folder: Path) -> Report:
    (version,) = db.execute("SELECT version FROM runs").fetchone() or ("unknown",)
    if version != VERSION:
        raise StoreError(
            f"{folder} was written by run format {version}, this is format {VERSION}; "
            "use the version that made it"
        )
    run, created_utc, text, kind = db.execute(
        "SELECT run, created_utc, config, kind FROM runs"
    ).fetchone()
    config = read_config(text, str(folder / DATABASE))
    rounds, last_round = db.execute("SELECT COUNT(*), MAX(round) FROM rounds").fetchone()
    if not rounds:
        raise StoreError(f"run {run} in {folder} has no finished round yet; nothing to sum up")
    seats = [Participation._make(row) for row in db.execute(PARTICIPATIONS)]
    phases = db.execute("SELECT round, client_id, phase, wall_s, cpu_s FROM phases").fetchall()
    metrics = db.execute("SELECT round, name, value FROM metrics ORDER BY round, name").fetchall()
    groups: dict[tuple[str, int], list[Participation]] = {}
    for seat in seats:
        groups.setdefault((seat.platform, seat.is_emulated), []).append(seat)
    server_times = [(name, wall, wall) for _, client, name, wall, _ in phases if client is None]
    return Report(
        run=run,
        created_utc=created_utc,
        kind=kind,
        method=config.method,
        rounds=rounds,
        rounds_planned=config.rounds,
        platforms=[
            _platform(groups[key], phases, rounds, config.method in WHOLE_MODEL)
            for key in sorted(groups)
        ],
        server=_phase_times(SERVER_PHASES, server_times, {}),
        tally=_tally(seats, rounds),
        accuracy=_accuracies(metrics),
        figures={
            name: value  # None: SQLite has no NaN
            for round, name, value in metrics
            if round == last_round and not name.startswith((LAST, SERVED))
        },
    )


def _platform(
    seats: list[Participation], phases: list[tuple], rounds: int, is_whole: bool
) -> Platform:
    """is_whole: the method trains every stage as one prefix, whatever the client's exit."""
    by_key = {(seat.round, seat.client_id): seat for seat in seats}
    times = [
        (phase, board_seconds(by_key[round, client], phase, wall_s, cpu_s), wall_s)
        for round, client, phase, wall_s, cpu_s in phases
        if (round, client) in by_key
    ]
    prefixes: list[tuple[int, str]] = []
    alone: list[tuple[int, str]] = []
    for seat in seats:
        stages = [int(stage) for stage in seat.segments.split(",") if stage]
        prefix, rest = split_stages(stages, len(stages) if is_whole else seat.exit)
        prefixes += [(prefix, seat.client_id)] if prefix else []
        alone += [(stage, seat.client_id) for stage in rest]
    first = seats[0]
    return Platform(
        platform=first.platform,
        is_emulated=bool(first.is_emulated),
        clients=len({seat.client_id for seat in seats}),
        phases=_phase_times(DEVICE_PHASES, times, EMULATED if first.is_emulated else {}),
        tally=_tally(seats, rounds),
        exits=_trained(prefixes),
        stages=_trained(alone),
    )


def board_seconds(
    seat: Participation, phase: str, wall_s: float, cpu_s: float | None
) -> float | None:
    """Seconds of a phase on the board; None where its profile or the run lacks what it takes."""
    source = EMULATED.get(phase, WALL) if seat.is_emulated else WALL
    if source == CPU:
        return cpu_s * seat.cpu_scale if cpu_s is not None and seat.cpu_scale else None
    if source == LINK:
        size = seat.bytes_down if phase == "download" else seat.bytes_up
        return size * 8 / (seat.link_mbit_s * 1e6) if seat.link_mbit_s else None
    return wall_s


def split_stages(stages: Sequence[int], exit: int) -> tuple[int, list[int]]:
    """The prefix's exit (0: none) and the stages trained alone, of a client of this exit."""
    prefix = 0
    while prefix < exit and prefix + 1 in stages:
        prefix += 1
    return prefix, [stage for stage in stages if stage > prefix]


def nearest_rank(values: Iterable[float], percent: int) -> float:
    """The smallest value that at least `percent` % of the values do not exceed: of n sorted
    values number ceil(percent x n / 100), from 1. Always a measured value, never between two."""
    ordered = sorted(values)
    return ordered[max(1, -(-percent * len(ordered) // 100)) - 1]


def summarise(values: Sequence[float]) -> Summary:
    if not values:
        return Summary(0)
    p50_s, p95_s = (nearest_rank(values, percent) for percent in (50, 95))
    return Summary(len(values), p50_s, p95_s, max(values))


def _phase_times(
    known: tuple[str, ...],
    times: list[tuple[str, float | None, float]],
    sources: dict[str, str],
) -> list[PhaseTime]:
    """One per known phase, measured or not, then phases of other names. times: phase, board
    seconds, wall seconds."""
    others = sorted({phase for phase, _, _ in times} - set(known))
    found = []
    for phase in (*known, *others):
        board = [board_s for name, board_s, _ in times if name == phase and board_s is not None]
        wall = [wall_s for name, _, wall_s in times if name == phase]
        source = sources.get(phase, WALL)
        found.append(PhaseTime(phase, source, summarise(board), summarise(wall)))
    return found


def _tally(seats: Sequence[Participation], rounds: int) -> Tally:
    down, up = sum(seat.bytes_down for seat in seats), sum(seat.bytes_up for seat in seats)
    outcomes = Counter(seat.outcome for seat in seats)
    failures = Counter(seat.code for seat in seats if seat.outcome == "failed")
    return Tally(
        participations=len(seats),
        returned=outcomes["ok"],
        stragglers=outcomes["straggler"],
        failures=dict(sorted(failures.items())),
        retries=sum(seat.retries for seat in seats),
        bytes_down_each=down / max(1, len(seats)),
        bytes_up_each=up / max(1, len(seats)),
        bytes_down_a_round=down / rounds,
        bytes_up_a_round=up / rounds,
        peak_memory_bytes=max((seat.peak_memory_bytes for seat in seats), default=0) or None,
    )


def _trained(pairs: list[tuple[int, str]]) -> list[Trained]:
    """pairs: exit or stage and client, one per update."""
    return [
        Trained(
            number, len({c for n, c in pairs if n == number}), sum(n == number for n, _ in pairs)
        )
        for number in sorted({n for n, _ in pairs})
    ]


def _accuracies(metrics: list[tuple[int, str, float | None]]) -> list[Accuracy]:
    """metrics: round, name, value in order of rounds. Exits never evaluated are left out."""
    series: dict[str, list[tuple[int, float]]] = {}
    for round, name, value in metrics:
        if value is not None:
            series.setdefault(name, []).append((round, value))
    exits = [int(name[len(LAST) :]) for name in series if name.startswith(LAST)]
    found = []
    for exit in sorted(exits):
        rows, served = series[f"{LAST}{exit}"], series.get(f"{SERVED}{exit}")
        found.append(Accuracy(exit, *rows[0], *rows[-1], served[-1][1] if served else None))
    return found


def write_csv(report: Report, path: Path) -> None:
    """One row per platform (the coordinator is "server") and phase."""
    head = "platform is_emulated phase source count p50_s p95_s max_s"
    wall = "wall_count wall_p50_s wall_p95_s wall_max_s"
    rows = [(p.platform, int(p.is_emulated), time) for p in report.platforms for time in p.phases]
    rows += [("server", 0, time) for time in report.server]
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(f"{head} {wall}".split())
        for platform, is_emulated, time in rows:
            cells = (*astuple(time.board), *astuple(time.wall))
            cells = tuple(MISSING if cell is None else cell for cell in cells)
            writer.writerow((platform, is_emulated, time.phase, time.source, *cells))


def print_report(report: Report) -> None:
    """Plain text for people; columns are as wide as their cells, nothing is cut."""
    clients = sum(p.clients for p in report.platforms)
    print(f"Run {report.run} ({report.kind}, {report.method}), begun {report.created_utc}:")
    print(f"{report.rounds} of {report.rounds_planned} rounds finished, {clients} clients.")
    for line in notes(report.platforms):
        print(textwrap.fill(line, COLUMNS))

    has_wall = any(p.is_emulated for p in report.platforms)
    head = ["seconds", "count", "p50", "p95", "max"]
    head += ["wall p50", "wall p95", "wall max"] * has_wall + ["from"]
    rows: list[list[str]] = []
    for p in report.platforms:
        rows.append([f"{p.label}, {p.clients} client{'s' * (p.clients != 1)}"])
        rows += [_phase_row(time, has_wall, p.is_emulated) for time in p.phases]
    rows.append(["server"])
    rows += [_phase_row(time, has_wall, False) for time in report.server]
    print_table(head, rows)

    tallies = [(p.label, p.tally) for p in report.platforms] + [("all", report.tally)]
    head = ["bytes of tensors, memory", "down each", "up each", "down a round", "up a round"]
    rows = [
        [label, _size(t.bytes_down_each), _size(t.bytes_up_each), _size(t.bytes_down_a_round),
         _size(t.bytes_up_a_round), _size(t.peak_memory_bytes)]
        for label, t in tallies
    ]  # fmt: skip
    print_table([*head, "peak memory"], rows)
    rows = [
        [label, *map(str, (t.participations, t.returned, t.stragglers, t.retries)), _faults(t)]
        for label, t in tallies
    ]
    print_table(["participants", "chosen", "returned", "stragglers", "retries", "failed"], rows)

    rows = []
    for p in report.platforms:
        rows += [[p.label, str(t.clients), str(t.updates), f"exit {t.number}"] for t in p.exits]
        for t in p.stages:
            rows.append([p.label, str(t.clients), str(t.updates), f"stage {t.number} alone"])
    print_table(["trained up to", "clients", "updates", "depth"], rows or [["nothing returned"]])

    rows = [
        [f"exit {a.exit}", _percent(a.first), str(a.first_round), _percent(a.last),
         _percent(a.served_last), str(a.last_round)]
        for a in report.accuracy
    ]  # fmt: skip
    head = ["accuracy in %", "first", "in round", "last", "served last", "in round"]
    print_table(head, rows or [[MISSING]])
    if report.figures:
        figures = [
            f"{name} = {'not a number' if value is None else f'{value:.4g}'}"
            for name, value in report.figures.items()
        ]
        text = f"Figures of the method in its last round: {'; '.join(figures)}"
        print("\n" + textwrap.fill(text, COLUMNS, break_long_words=False))


def notes(platforms: Sequence[Platform]) -> list[str]:
    """What is emulated and what is measured."""
    found = []
    if any(p.is_emulated for p in platforms):
        found.append(
            "EMULATED boards ran on this machine. Their seconds: load and train are CPU seconds x "
            "cpu_scale, download and upload bytes x 8 / link_mbit_s, wait is wall clock. Measured: "
            "the wall columns, bytes, memory, counts, accuracy and all of other platforms."
        )
    else:
        found.append("No board is emulated: all seconds are wall clock where the work was done.")
    if any(p.platform == "in-process" for p in platforms):
        found.append(
            "In-process clients train by turns inside the coordinator: nothing is sent (bytes are "
            "what would be) and peak memory is the whole process's."
        )
    return found


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """First column to the left, the others to the right; a row of one cell is a heading."""
    lines = [head, *([_printable(cell) for cell in row] for row in rows)]
    full = [line for line in lines if len(line) == len(head)]
    widths = [max(len(line[i]) for line in full) for i in range(len(head))]
    print()
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=False)]
        print("  ".join(cells).rstrip())


def _phase_row(time: PhaseTime, has_wall: bool, is_emulated: bool) -> list[str]:
    walls = [*_seconds(time.wall)] if is_emulated else ["", "", ""]
    board = [str(time.board.count), *_seconds(time.board)]
    if not time.board.count:
        board, walls = ["", MISSING, "", ""], walls if time.wall.count else ["", "", ""]
    return ["  " + time.phase, *board, *walls * has_wall, time.source]


def _seconds(summary: Summary) -> list[str]:
    values = (summary.p50_s, summary.p95_s, summary.max_s)
    return [MISSING if v is None else "<0.001" if 0 < v < 0.0005 else f"{v:.3f}" for v in values]


def _size(num_bytes: float | None) -> str:
    if num_bytes is None:
        return MISSING
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def _percent(share: float | None) -> str:
    return MISSING if share is None else f"{100 * share:.1f}"


def _faults(tally: Tally) -> str:
    codes = ", ".join(f"{code} {count}" for code, count in tally.failures.items())
    return f"{sum(tally.failures.values())}" + f" ({codes})" * bool(codes)


def _printable(text: str) -> str:
    """Names come from devices: control characters must not reach the terminal."""
    return "".join(char if char.isprintable() else "?" for char in text)


if __name__ == "__main__":
    sys.exit(main())
