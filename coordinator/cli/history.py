"""`edge-coordinator history`: all rounds of a run, as a table, as CSV or as a picture.

Of the table: loss and `trained` are those of the participants on what they trained on, the metric
of the run's task, e.g. accuracy, is of the model, and of the one that is served, on the test set;
exit 1 first. Where clients set examples aside: hold-out, of the models that participants received;
own, of each client's own.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from coordinator.cli.status import headed, per_exit, shown, table, with_holdouts
from coordinator.store.database import DATABASE
from coordinator.store.reader import (
    ALONE,
    BY_EXIT,
    ClientRow,
    RoundRow,
    client_rows,
    last_rounds,
    run_row,
)
from edge_sdk.cli.flags import add_command, path_flag
from edge_sdk.errors import ConfigError, StoreError, UsageError
from edge_sdk.helpers.files import is_there, write_file
from edge_sdk.helpers.imports import install
from edge_sdk.helpers.text import csv_cell
from edge_sdk.tasks.metrics import METRICS, Metric

ALL_ROUNDS = 2**31
ROUNDS = "round,returned,stale,late,failed,seconds,loss,trained{unit},{head},served{unit}"
CLIENTS = "round,client,outcome,code,examples,training s,loss,trained{unit},detail"
PLOTS = {".png", ".svg", ".pdf"}


def add_history_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "history",
        "all rounds of a run: accuracy, or another metric, and loss by exit, times, bytes",
        "edge-coordinator history runs/first",
        "edge-coordinator history runs/first --csv --clients",
        "edge-coordinator history runs/first --plot accuracy.svg",
    )
    add = parser.add_argument
    add("folder", type=path_flag, metavar="RUN", help="the --run-dir of the run")
    add("--clients", action="store_true", help="a line for each participant of each round")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--csv", action="store_true", help="comma-separated, every column")
    said = "metric and loss by round as a picture there: .svg, .png or .pdf"
    form.add_argument("--plot", type=path_flag, metavar="FILE", help=said)
    parser.set_defaults(run=run_history)


def run_history(args: argparse.Namespace) -> int:
    if args.plot and args.clients:
        raise UsageError("--plot shows rounds, not clients; leave --clients out")
    if args.plot and args.plot.suffix not in PLOTS:
        raise UsageError(f"--plot {args.plot}, expected a name that ends in .svg, .png or .pdf")
    if not is_there(args.folder / DATABASE):
        raise StoreError(f"{args.folder} holds no run; give the --run-dir of a run")
    metric = METRICS[run_row(args.folder).task]
    clients = client_rows(args.folder) if args.clients else []
    rounds = [] if args.clients else last_rounds(args.folder, ALL_ROUNDS)
    if not (clients or rounds):
        raise StoreError(f"{args.folder} has no finished round yet; ask again later")
    if args.plot:
        plot(rounds, args.plot, str(args.folder), metric)
        print(f"wrote {args.plot}")
    elif args.csv:
        key = metric.key
        cells = [_client_cells(row, key) for row in clients]
        write_csv([*cells, *(_round_cells(row, key) for row in rounds)])
    elif clients:
        print("\n".join(table(headed(CLIENTS, metric), [_shown(c, metric) for c in clients])))
    else:
        print("\n".join(with_holdouts(headed(ROUNDS, metric), rounds, _shown_round)))
    return 0


def _round_cells(row: RoundRow, key: str) -> dict[str, Any]:
    """key: the metric's, in the names of its columns."""
    cells: dict[str, Any] = msgspec.structs.asdict(row)
    del cells["task"]
    for field, prefix in BY_EXIT.items():
        values = enumerate(cells.pop(field), 1)
        cells |= {f"{prefix.format(key=key)}{exit}": value for exit, value in values}
    return cells | {name.format(key=key): cells.pop(field) for field, name in ALONE.items()}


def _client_cells(row: ClientRow, key: str) -> dict[str, Any]:
    cells: dict[str, Any] = msgspec.structs.asdict(row)
    if held := cells.pop("holdout"):
        told = {"num_examples": held.num_examples, "loss": held.loss, key: held.metric}
        cells |= {f"holdout_{name}": value for name, value in told.items()}
    for result in cells.pop("exits"):
        cells[f"loss_exit_{result.exit}"] = result.loss
        cells[f"train_{key}_exit_{result.exit}"] = result.metric
    return cells


def columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """In order of appearance, what has a number of an exit behind it by that."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    whole = [name for name in names if "_exit_" not in name]
    by_exit = [name for name in names if "_exit_" in name]
    kinds = list(dict.fromkeys(name.rpartition("_")[0] for name in by_exit))
    return whole + sorted(
        by_exit, key=lambda name: (kinds.index(name.rpartition("_")[0]), int(name.split("_")[-1]))
    )


def write_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """On stdout."""
    writer = csv.DictWriter(sys.stdout, columns_of(rows), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)


def _shown_round(row: RoundRow) -> list[str]:
    shown = METRICS[row.task].shown
    return [
        str(row.round),
        f"{row.returned} of {row.chosen}",
        *map(str, (row.stale, row.stragglers, row.failures)),
        f"{row.wall_s:.1f}",
        per_exit(row.loss),
        per_exit(row.train_metric, shown),
        per_exit(row.metric, shown),
        per_exit(row.metric_served, shown),
    ]


def _shown(row: ClientRow, metric: Metric) -> list[str]:
    return [
        str(row.round),
        row.client_id,
        row.outcome,
        row.code or "-",
        str(row.num_examples or "-"),
        "-" if row.train_s is None else f"{row.train_s:.1f}",
        per_exit(result.loss for result in row.exits),
        per_exit((result.metric for result in row.exits), metric.shown),
        shown(row.detail),
    ]


def plot(rounds: Sequence[RoundRow], path: Path, title: str, metric: Metric) -> None:
    """The metric on the test set and training loss by round, a line for each exit. Raises
    ConfigError without matplotlib, StoreError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(f"--plot needs {error.name}; {install('plot')}") from error
    import io

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (field, label) in zip(
        panels,
        (("metric", f"{metric.name} on the test set"), ("loss", "training loss")),
        strict=True,
    ):
        count = max((len(getattr(row, field)) for row in rounds), default=0)
        for exit in range(count):
            points = [
                (row.round, values[exit])
                for row in rounds
                if len(values := getattr(row, field)) > exit and values[exit] is not None
            ]
            name, color = f"exit {exit + 1}", f"C{exit % 10}"
            axes.plot(*zip(*points, strict=True), marker=".", label=name, color=color)
        if count:
            axes.legend()
        else:
            axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
        axes.set(xlabel="round", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:])
    write_file(path, content.getvalue())
