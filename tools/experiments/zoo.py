"""`python -m tools.experiments zoo`: all methods beside one another, from results of `--grid zoo`.

    python -m tools.experiments run --grid zoo --quick --out build/quick
    python -m tools.experiments run --grid zoo --data fashion=DIR --data cifar=DIR \\
        --data unimib=FILE --seeds 0,1,2 --out build/zoo
    python -m tools.experiments zoo --out build/zoo --figures build/zoo/figures

Every client of a group has one memory: that of training the prefix to the group's exit. Accuracies
are means over the evaluated rounds among the last ones, in %, then over seeds, with the half width
of their 95 % interval. served, last: of the deepest exit of the served model and of the last
global; mean of exits: of the served exits' mean logits; personal: of each client's own model or
part on what it set aside, pooled; tuned: the same after fine-tuning. At equal bytes and seconds: of
the last round at which a method had moved no more bytes, or taken no more emulated seconds, than
BASELINE with the same seed in all its rounds. clients, memory, variants: of the groups, shallow
first: how many took part (0: the method has no model for their memory), their predicted peak, and
the place of what they trained among the method's models.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeAlias

from tools.experiments.figures import Axes, Point, draw, panels_of, point, served_final
from tools.experiments.grids import BASELINE
from tools.experiments.tables import (
    SETTING,
    TAIL_ROUNDS,
    Row,
    Run,
    aligned,
    alpha_in_words,
    column,
    decimals,
    interval,
    mean,
    mean_of,
    number,
    origins_of,
    paired,
    read_runs,
    scaled,
    signed,
    total,
    values_of,
    write_table,
)

Round: TypeAlias = Mapping[str, Any]
Amount: TypeAlias = Callable[[Round], float]  # of one round
ACCURACIES = ("served", "last", "mean_of_exits", "personal", "tuned", "at_bytes", "at_seconds")
COSTS = ("gop", "mb_down", "mb_up", "emulated_s", "server_s", "state_mb")
BY_GROUP = ("clients", "memory_mb", "variants")
HEADS = {
    "memory_mb": "memory MB",
    "mean_of_exits": "mean of exits",
    "at_bytes": "equal bytes",
    "at_seconds": "equal seconds",
    "gop": "Gop a round",
    "mb_down": "MB down",
    "mb_up": "MB up",
    "emulated_s": "s a round",
    "server_s": "server s",
    "state_mb": "server MB",
}


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "zoo", help="all methods: table, and accuracy by bytes and seconds"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--to", type=Path, help="folder for zoo.csv and zoo.md, default --out")
    parser.add_argument("--figures", type=Path, help="folder for figures")
    parser.set_defaults(run=run_zoo)


def run_zoo(args: argparse.Namespace) -> int:
    runs = read_runs(args.out)
    lines = table_lines(runs)
    note = f"python -m tools.experiments zoo; {origins_of(runs)}"
    write_table(args.to or args.out, "zoo", lines, in_words(lines), note)
    if args.figures:
        args.figures.mkdir(parents=True, exist_ok=True)
        draw_all(runs, args.figures)
    return 0


def moved(round: Round) -> float:
    """Bytes, both ways."""
    return (number(round, "bytes_down") or 0.0) + (number(round, "bytes_up") or 0.0)


def taken_s(round: Round) -> float:
    """Emulated seconds."""
    return number(round, "emulated_s") or 0.0


def progress(run: Run, amount: Amount) -> list[tuple[float, float]]:
    """Per evaluated round: how much of `amount` it took until then, and the served accuracy."""
    sums = accumulate(map(amount, run.rounds))
    found = zip(sums, map(served_final, run.rounds), strict=True)
    return [(x, accuracy) for x, accuracy in found if accuracy is not None]


def within(run: Run, amount: Amount, budget: float) -> float | None:
    """The accuracy of its last evaluated round that `budget` pays for; None: of none."""
    paid = [accuracy for x, accuracy in progress(run, amount) if x <= budget]
    return paid[-1] if paid else None


def row_of(run: Run, base: Run | None) -> Row:
    """A run's figures. base: BASELINE's run of the same seed."""
    tail = run.rounds[-TAIL_ROUNDS:]
    groups = run.groups.values()
    budgets = {
        name: sum(map(amount, base.rounds)) if base else None
        for name, amount in (("at_bytes", moved), ("at_seconds", taken_s))
    }
    server = [mean_of(run.rounds, phase) for phase in ("fit", "generate", "aggregate")]
    return {
        "served": mean(filter(None, map(served_final, tail))),
        "last": _percent([r["accuracy"][-1] for r in tail if r.get("accuracy")]),
        "mean_of_exits": _percent(values_of(tail, "accuracy_served_mean_of_exits")),
        "personal": _percent(values_of(tail, "personal_accuracy")),
        "tuned": _percent([run.tuned] if run.tuned is not None else []),
        "at_bytes": _within(run, moved, budgets["at_bytes"]),
        "at_seconds": _within(run, taken_s, budgets["at_seconds"]),
        "clients": "/".join(str(group["clients"]) for group in groups),
        "memory_mb": "/".join(decimals(scaled(g["peak_memory_bytes"]), 2) or "-" for g in groups),
        "variants": "/".join(str(group["variant"] or "-") for group in groups),
        "gop": _scaled(mean_of(run.rounds, "operations"), 1e9),
        "mb_down": scaled(mean_of(run.rounds, "bytes_down")),
        "mb_up": scaled(mean_of(run.rounds, "bytes_up")),
        "emulated_s": mean_of(run.rounds, "emulated_s"),
        "server_s": total(server),
        "state_mb": scaled(mean_of(run.rounds[-1:], "state_bytes")),
    }


def _percent(shares: Sequence[float]) -> float | None:
    return 100 * statistics.mean(shares) if shares else None


def _scaled(value: float | None, unit: float) -> float | None:
    return None if value is None else value / unit


def _within(run: Run, amount: Amount, budget: float | None) -> float | None:
    return None if budget is None else within(run, amount, budget)


def by_setting(runs: Iterable[Run]) -> dict[tuple[str, ...], dict[str, dict[str, Run]]]:
    """By setting, label and seed."""
    found: dict[tuple[str, ...], dict[str, dict[str, Run]]] = {}
    for run in runs:
        setting = tuple(str(run.cell[key]) for key in SETTING)
        found.setdefault(setting, {}).setdefault(run.cell["label"], {})[str(run.cell["seed"])] = run
    return found


def table_lines(runs: Iterable[Run]) -> list[Row]:
    """Per setting and method over seeds, best first; what has no model for all comes last, by its
    personal accuracy."""
    lines: list[Row] = []
    for setting, labels in sorted(by_setting(runs).items()):
        base = labels.get(BASELINE, {})
        rows = {
            label: {seed: row_of(run, base.get(seed)) for seed, run in held.items()}
            for label, held in labels.items()
        }
        here = [line_of(label, rows[label], rows.get(BASELINE, {})) for label in rows]
        here.sort(key=lambda line: (-(line["served"] or 0.0), -(line["personal"] or 0.0)))
        lines += [dict(zip(SETTING, setting, strict=True)) | line for line in here]
    return lines


def line_of(label: str, rows: Mapping[str, Row], base: Mapping[str, Row]) -> Row:
    """Means over seeds; NAME_95: half of the interval; minus_BASELINE: paired by seed."""
    line: Row = {"label": label, "seeds": len(rows)}
    for name in ACCURACIES:
        middle, low, _, _ = interval(list(column(rows, name).values()))
        line[name] = middle
        line[f"{name}_95"] = None if middle is None or low is None else middle - low
    difference = paired(column(rows, "served"), column(base, "served"))
    middle, low, high, pairs = interval(difference if label != BASELINE else [])
    line |= {f"minus_{BASELINE}": middle, "low_95": low, "high_95": high, "pairs": pairs}
    first = next(iter(rows.values()))
    line |= {name: first[name] for name in BY_GROUP}
    return line | {name: mean(column(rows, name).values()) for name in COSTS}


def in_words(lines: Sequence[Row]) -> str:
    """Two Markdown tables for each setting: what methods reach, and what they cost."""
    parts = []
    for setting in dict.fromkeys(tuple(line[key] for key in SETTING) for line in lines):
        here = [line for line in lines if tuple(line[key] for key in SETTING) == setting]
        data, regime, alpha = setting
        parts.append(f"### {data}, {regime} groups, {alpha_in_words(alpha)}\n")
        parts += [_table(reached(line) for line in here), _table(costs(line) for line in here)]
    return "\n".join(parts)


def _table(rows: Iterable[Mapping[str, str]]) -> str:
    held = list(rows)
    return aligned([list(held[0]), *(list(row.values()) for row in held)], True) + "\n"


def reached(line: Row) -> dict[str, str]:
    spread = "" if line["low_95"] is None else f" [{line['low_95']:+.1f}, {line['high_95']:+.1f}]"
    cells = {"method": line["label"], "seeds": str(line["seeds"])}
    for name in ACCURACIES:
        half = line[f"{name}_95"]
        around = "" if half is None else f" ±{half:.1f}"
        cells[HEADS.get(name, name)] = decimals(line[name], 1) + around
    return cells | {f"minus {BASELINE}": signed(line[f"minus_{BASELINE}"]) + spread}


def costs(line: Row) -> dict[str, str]:
    cells = {"method": line["label"]} | {HEADS.get(name, name): line[name] for name in BY_GROUP}
    return cells | {HEADS[name]: decimals(line[name], 2) for name in COSTS}


def draw_all(runs: Sequence[Run], folder: Path) -> None:
    """Served accuracy against the megabytes and the emulated seconds that it took, by setting."""
    kinds: tuple[tuple[str, str, Amount], ...] = (
        ("bytes", "MB moved by all clients", lambda r: moved(r) / 1e6),
        ("seconds", "emulated seconds", taken_s),
    )
    for setting, labels in by_setting(runs).items():
        data, regime, alpha = setting
        title = f"{data}, {regime} groups, {alpha_in_words(alpha)}"
        for kind, x, amount in kinds:
            curves = [(label, curve(held.values(), amount)) for label, held in labels.items()]
            curves = sorted((c for c in curves if len(c[1]) > 1), key=lambda c: -c[1][-1].mean)
            axes = Axes(x, "accuracy of the served model's\ndeepest exit (%)")
            draw(folder / f"zoo-{kind}-{'-'.join(setting)}.png", panels_of(curves, title), axes)


def curve(runs: Iterable[Run], amount: Amount) -> list[Point]:
    """The n-th evaluated round of each seed as one point: the mean amount, the mean accuracy."""
    progressed = [progress(run, amount) for run in runs]
    points = []
    for held in zip(*progressed, strict=False):
        x = statistics.mean(pair[0] for pair in held)
        points.append(point(x, [pair[1] for pair in held]))
    return points
