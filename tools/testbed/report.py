"""Print a run's report: seconds by platform and phase, bytes, faults, saved memory, metric.

    python -m tools.testbed.report RUN_DIR [--json] [--csv FILE]

What the figures are: run_report.py.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import msgspec

from coordinator.cli.status import shown, size
from edge_sdk.errors import EdgeError
from edge_sdk.helpers.text import csv_cell
from tools.testbed.run_report import PhaseTime, Report, read_run

MISSING = "not measured"
EMULATED_NOTE = """EMULATED boards ran on this machine; their seconds are CPU seconds x cpu_scale
(load, train), bytes x 8 / link_mbit_s (download, upload), wall clock (wait). Measured: all else."""
REAL_NOTE = "No board is emulated: all seconds are wall clock, measured where the work was done."
IN_PROCESS_NOTE = """In-process clients train by turns inside the coordinator: bytes are what would
be sent, peak memory is the whole process's."""


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
    try:
        if args.json:
            print(msgspec.json.format(msgspec.json.encode(report)).decode())
        else:
            print_report(report)
        sys.stdout.flush()
    except BrokenPipeError:  # as by `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


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
            row = (platform, is_emulated, time.phase, time.source, *figures)
            writer.writerow(map(csv_cell, row))


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

    all_totals = [
        *zip(names, (p.totals for p in report.platforms), strict=True),
        ("all", report.totals),
    ]
    rows = []
    for name, t in all_totals:
        sizes = (t.bytes_down_each, t.bytes_up_each, t.bytes_down_a_round, t.bytes_up_a_round)
        rows.append([name, *map(_size, (*sizes, t.peak_memory_bytes))])
    print_table("bytes,down/client,up/client,down/round,up/round,peak memory", rows)
    rows = []
    for name, t in all_totals:
        codes = ", ".join(f"{code} {count}" for code, count in t.failures.items())
        failed = str(sum(t.failures.values())) + f" ({codes})" * bool(codes)
        counts = (t.participations, t.returned, t.stragglers, t.retries)
        rows.append([name, *map(str, counts), failed])
    print_table("participants,chosen,returned,stragglers,retries,failed", rows)

    rows = []
    for name, p in zip(names, report.platforms, strict=True):
        for done in p.trained:
            depth = f"stage {done.stage} alone" if done.is_alone else f"up to exit {done.stage}"
            depth += f", variant {done.variant}" * bool(done.variant)
            rows.append([name, depth, str(done.clients), str(done.updates)])
    print_table("trained,depth,clients,updates", rows or [["nothing returned"]])

    rows = []
    for name, p in zip(names, report.platforms, strict=True):
        for used in p.levers:
            if used.in_parts or used.recomputed:
                smallest = used.smallest_part or "-"
                levers = (used.updates, used.in_parts, smallest, used.recomputed)
                rows.append([f"{used.client_id}, {name}", *map(str, levers)])
    head = "memory saved,updates,in parts,smallest part,stages run again"
    print_table(head, rows or [["by no device: whole batches, all activations kept"]])

    rows, metric = [], report.metric
    for t in report.tested:
        values = [
            MISSING if v is None else metric.shown(v) for v in (t.first, t.last, t.served_last)
        ]
        rows.append([t.of, str(t.first_round), values[0], str(t.last_round), *values[1:]])
    unit = " in %" if metric.is_share else ""
    print_table(f"{metric.name}{unit},round,first,round,last,served last", rows or [[MISSING]])
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
    lines += [list(map(shown, row)) for row in rows]
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
    return MISSING if num_bytes is None else size(num_bytes)


if __name__ == "__main__":
    sys.exit(main())
