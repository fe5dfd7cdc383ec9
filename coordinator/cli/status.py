"""`edge-coordinator status`: what a run does now, for people and with --json for programs.

Status 0: it runs or has finished. 3: its process is gone and it has not finished. 4: that cannot be
told, as it ran on another machine or says nothing of itself. 1: there is no run, or it cannot be
read.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from coordinator.store.database import DATABASE
from coordinator.store.failures import Failures
from coordinator.store.lock import RunLock
from coordinator.store.reader import COLUMNS, RoundRow, RunRow, last_failures, last_rounds, run_row
from coordinator.store.status import (
    ClientState,
    Health,
    Snapshot,
    UnfitDevice,
    age_s,
    health,
    read_status,
    seconds_since,
)
from edge_sdk.cli.flags import add_command, path_flag, whole_flag
from edge_sdk.errors import StoreError
from edge_sdk.tasks.metrics import METRICS, Metric

STATUS: dict[Health, int] = {"running": 0, "finished": 0, "dead": 3, "unknown": 4}
ROUNDS = 5
FAILURES = 20  # clients
SHORTEST_S, LONGEST_S = 0.1, 86_400.0
CLEAR = "\x1b[H\x1b[2J\x1b[3J"


class View(msgspec.Struct, frozen=True, kw_only=True):
    """All that --json prints. status: None where the run has told nothing of itself; age_s: of it.
    problem: why there are no rounds. run: of the database, which alone tells of an emulated run.
    failures: why clients returned nothing, the newest of each."""

    health: Health
    age_s: float | None
    status: Snapshot | None
    rounds: list[RoundRow]
    failures: list[Failures]
    problem: str = ""
    run: RunRow | None = None


def add_status_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "status",
        "what a run does now: clients, bytes, faults",
        "edge-coordinator status --run-dir runs/first --watch 2",
    )
    add = parser.add_argument
    add("--run-dir", type=path_flag, required=True, metavar="DIR", help="folder of the run")
    add("--json", action="store_true", help="one JSON object on one line")
    add("--watch", type=seconds_flag, metavar="SECONDS", help="again and again until the run ends")
    said = "last rounds to show, default 5"
    add("--rounds", type=whole_flag(0, 10**6), default=ROUNDS, metavar="N", help=said)
    parser.set_defaults(run=run_status)


def seconds_flag(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not SHORTEST_S <= seconds <= LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected seconds from {SHORTEST_S:g} to {LONGEST_S:g}"
        )
    return seconds


def run_status(args: argparse.Namespace, wait: Callable[[float], object] = time.sleep) -> int:
    while True:
        view = look(args.run_dir, args.rounds)
        if args.json:
            print(msgspec.json.encode(view).decode(), flush=True)
        else:
            clear = CLEAR if args.watch and sys.stdout.isatty() else ""
            print(clear + "\n".join(described(view, args.run_dir)), flush=True)
        if args.watch is None or view.health != "running":
            is_damaged = view.problem and (args.run_dir / DATABASE).exists()
            return STATUS[view.health] or int(bool(is_damaged))
        wait(args.watch)


def look(folder: Path, num_rounds: int = ROUNDS) -> View:
    """Raises StoreError if there is no run, or its state cannot be read."""
    status = read_status(folder)
    try:
        has_database = (folder / DATABASE).exists()
    except OSError as error:
        raise StoreError(f"{folder} cannot be read: {error}") from error
    if status is None and not has_database:
        raise StoreError(f"{folder} holds no run; give the --run-dir of `edge-coordinator serve`")
    rounds, failures, problem, run = [], [], "", None
    try:
        run = run_row(folder)
        rounds, failures = last_rounds(folder, num_rounds), last_failures(folder, FAILURES)
    except StoreError as error:
        problem = str(error)
    return View(
        health=health(status) if status else _untold(run, folder),
        age_s=age_s(status) if status else None,
        status=status,
        rounds=rounds,
        failures=failures,
        problem=problem,
        run=run,
    )


def _untold(run: RunRow | None, folder: Path) -> Health:
    """Of a run that tells nothing of itself, as an emulated one."""
    if run is None or run.kind != "emulate":
        return "unknown"
    if run.finished >= run.rounds:
        return "finished"
    return "dead" if RunLock.holder(folder) is None else "running"


def described(view: View, folder: Path) -> list[str]:
    """Lines for people. What a peer or a file said cannot control the terminal."""
    lines = []
    if view.run and view.status is None and view.health != "unknown":
        lives = {"running": f"process {RunLock.holder(folder)} runs", "finished": "finished"}
        said = lives.get(view.health, "its process is gone; go on with --resume")
        done = f"{view.run.finished} of {view.run.rounds} rounds"
        lines.append(f"emulated run {view.run.run} in {folder}: {done}; {said}")
    elif view.status is None:
        lines.append(f"{folder} has no status.json: what its coordinator does is not known")
    else:
        lines += _run_lines(view.status, view, folder)
        task = view.run.task if view.run else view.status.task
        lines += _client_lines(view.status.cohort.clients, view.age_s or 0.0, METRICS[task])
        lines += _unfit_lines(view.status.cohort.unfit, view.age_s or 0.0)
    if view.rounds:
        head = "round,returned,late,failed,down,up,seconds,training loss,{name} per exit{in_unit}"
        metric = METRICS[view.rounds[0].task]
        lines += ["", *with_holdouts(headed(head, metric), view.rounds, _round_cells)]
    lines += _failure_lines(view)
    if view.problem:
        lines += ["", view.problem]
    return [shown(line) for line in lines]


def _failure_lines(view: View) -> list[str]:
    """The last failure of each client: of the rounds that are saved, or told since."""
    found = {
        f.client_id: f"round {f.round}, {f.client_id}: {f.why}" for f in reversed(view.failures)
    }
    clients = view.status.cohort.clients if view.status else ()
    found |= {client.name: client.failure for client in clients if client.failure}
    shown = list(found.values())[-FAILURES:]
    return ["", "last failure of each client:", *shown] if shown else []


def _run_lines(status: Snapshot, view: View, folder: Path) -> list[str]:
    cohort, since = status.cohort, lasting(seconds_since(status.phase_utc))
    lives = {
        "running": f"process {status.pid} runs",
        "finished": f"process {status.pid} on {status.host}",
        "dead": f"process {status.pid} is gone; go on with --resume",
        "unknown": f"process {status.pid} on {status.host}, which cannot be looked at from here",
    }[view.health]
    lines = [
        f"run {status.run} in {folder}: {status.phase}, round {status.round} of {status.rounds}, "
        f"since {since}",
        f"{lives}; told {lasting(view.age_s or 0.0)} ago",
    ]
    if status.reason:
        lines.append(status.reason)
    if cohort.chosen:
        lines.append(
            f"this round: {cohort.returned} of {cohort.chosen} returned, {cohort.needed} needed; "
            f"{size(cohort.bytes_in_flight)} in flight of at most {size(cohort.budget_bytes)}, "
            f"{size(cohort.spool_bytes)} spooled"
        )
    lines.append(
        f"since {status.started_utc:%Y-%m-%d %H:%M:%S} UTC: {cohort.updates_accepted} updates "
        f"accepted, {cohort.updates_late} late ({cohort.updates_stale} counted afterwards), "
        f"{cohort.updates_failed} failed; "
        f"{size(cohort.bytes_down)} sent, {size(cohort.bytes_up)} received; "
        f"strangers refused {cohort.strangers}"
    )
    lines.append(f"faults: {_counted(cohort.faults) or 'none'}")
    links = cohort.links
    if any(msgspec.structs.astuple(links)):
        lines.append(
            f"not heard: {links.frames_refused} frames that break the protocol, "
            f"{links.messages_dropped} messages too many; disconnected: {links.peers_ended} peers "
            f"that said too much, {links.connections_ended} connections"
        )
    return lines


def _client_lines(clients: Sequence[ClientState], age_s: float, metric: Metric) -> list[str]:
    """age_s: of the snapshot, which is added to how long ago each was seen."""
    if not clients:
        return ["", "no clients yet"]
    phases = Counter(client.phase for client in clients)
    head = "client,phase,exit,round,down,up,updates,loss,{head},seen,platform,address,faults"
    rows = [
        [
            client.name,
            client.phase,
            str(client.exit or "-") + f" v{client.variant}" * bool(client.variant),
            str(client.round or "-"),
            size(client.bytes_down),
            size(client.bytes_up),
            str(client.updates),
            per_exit(result.loss for result in client.exits),
            per_exit((result.metric for result in client.exits), metric.shown),
            lasting(client.last_seen_s + age_s),
            client.platform or "-",
            client.address or "-",
            _counted(client.faults) + f" duplicates {client.duplicates}" * bool(client.duplicates),
        ]
        for client in clients
    ]
    return ["", f"{len(clients)} clients: {_counted(phases)}", *table(headed(head, metric), rows)]


def _unfit_lines(unfit: Sequence[UnfitDevice], age_s: float) -> list[str]:
    """The reasons stand last, as they are long."""
    told = [
        f"{device.name}, {device.code}, {device.count} times, last {lasting(device.age_s + age_s)} "
        f"ago: {device.reason}"
        for device in unfit
    ]
    return ["", f"{len(unfit)} devices cannot take part:", *told] if told else []


def _round_cells(row: RoundRow) -> list[str]:
    return [
        str(row.round),
        f"{row.returned} of {row.chosen}",
        str(row.stragglers),
        str(row.failures),
        size(row.bytes_down),
        size(row.bytes_up),
        f"{row.wall_s:.1f}",
        per_exit(row.loss),
        per_exit(row.metric, METRICS[row.task].shown),
    ]


def per_exit(values: Iterable[float | None], form: Callable[[float], str] = "{:.3g}".format) -> str:
    """As "1.2 / 0.8 / -", exit 1 first; "-" where nothing is known."""
    return " / ".join("-" if value is None else form(value) for value in values) or "-"


def headed(head: str, metric: Metric) -> str:
    """The heads of a table, with the metric's name and unit in their places."""
    unit = " %" * metric.is_share
    in_unit = " in %" * metric.is_share
    return head.format(head=metric.head, name=metric.name, unit=unit, in_unit=in_unit)


def table(head: str, rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns as wide as their cells, nothing is cut; the first to the left."""
    lines = [head.split(","), *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        ).rstrip()
        for line in lines
    ]


def with_holdouts(
    head: str, rounds: Sequence[RoundRow], cells: Callable[[RoundRow], list[str]]
) -> list[str]:
    """A table of rounds, with a column for each figure of hold-outs that some round has, for the
    perplexity of the served model, and for each of several models."""
    metric = METRICS[rounds[0].task]
    names = [n for n in COLUMNS if any(getattr(r, n) is not None for r in rounds)]
    heads = [COLUMNS[name] + " %" * metric.is_share for name in names]
    has_perplexity = any(row.perplexity for row in rounds)
    families = list(dict.fromkeys(name for row in rounds for name in row.families))

    def more(row: RoundRow) -> list[str]:
        found = [per_exit([getattr(row, name)], metric.shown) for name in names]
        found += [per_exit(row.perplexity, "{:.4g}".format)] * has_perplexity
        return found + [per_exit(row.families.get(name, ()), metric.shown) for name in families]

    rows = [cells(row) + more(row) for row in rounds]
    heads += ["served perplexity"] * has_perplexity
    heads += [f"{name} {metric.head}" for name in families]
    return table(",".join([head, *heads]), rows)


def _counted(counts: dict[str, int] | Counter[Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))


def size(num_bytes: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes:.0f} B"


def lasting(seconds: float) -> str:
    """In the largest unit that leaves two digits or more: 90 s, 15 min, 30 h."""
    for unit, factor in (("h", 3600), ("min", 60)):
        if seconds >= 10 * factor:
            return f"{seconds / factor:.0f} {unit}"
    return f"{seconds:.0f} s"


def shown(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
