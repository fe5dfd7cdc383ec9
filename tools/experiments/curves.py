"""`python -m tools.experiments curves`: how fast and how steadily rows of a grid learn.

    python -m tools.experiments run --grid label-skew --data fashion=DIR --out build/skew
    python -m tools.experiments curves --out build/skew --to docs/results

Accuracies of the deepest exit in %, means over seeds with the half width of their 95 % interval.
served at N: of the served model at the last evaluated round up to N; end: mean over the evaluated
rounds among the last ones; area: mean over all evaluated rounds, which is the area under the curve
by the number of rounds; last: of the global model itself at the end. minus BOUND: area and end,
paired by seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tools.experiments.figures import served_final
from tools.experiments.grids import BOUND
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
    origins_of,
    paired,
    read_runs,
    signed,
    write_table,
)
from tools.experiments.zoo import by_setting

ROUNDS = (10, 20, 30, 50)
FIGURES = (*(f"at_{round}" for round in ROUNDS), "end", "area", "last")


def add_command(commands: Any) -> None:
    parser = commands.add_parser("curves", help="accuracy after some rounds, and area under it")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--to", type=Path, help="folder for NAME.csv and NAME.md, default --out")
    parser.add_argument("--name", default="curves", help="of the files, default curves")
    parser.add_argument("--bound", default=BOUND, help="label of the row to compare with")
    parser.set_defaults(run=run_curves)


def run_curves(args: argparse.Namespace) -> int:
    runs = read_runs(args.out)
    lines = table_lines(runs, args.bound)
    note = f"python -m tools.experiments curves --bound {args.bound}; {origins_of(runs)}"
    write_table(args.to or args.out, args.name, lines, in_words(lines, args.bound), note)
    return 0


def row_of(run: Run) -> Row:
    """A run's figures; None at rounds that it did not reach."""
    found = [(int(r["round"]), served_final(r)) for r in run.rounds]
    served = [(round, accuracy) for round, accuracy in found if accuracy is not None]
    last = [100 * r["accuracy"][-1] for r in run.rounds[-TAIL_ROUNDS:] if r.get("accuracy")]
    end = [accuracy for round, accuracy in served if round > len(run.rounds) - TAIL_ROUNDS]
    row: Row = {"end": mean(end), "area": mean(a for _, a in served), "last": mean(last)}
    for most in ROUNDS:
        before = [accuracy for round, accuracy in served if round <= most]
        row[f"at_{most}"] = before[-1] if before and len(run.rounds) >= most else None
    return row


def table_lines(runs: Iterable[Run], bound: str) -> list[Row]:
    """Per setting and row of the grid over seeds, the largest area first; without differences where
    the setting lacks the bound."""
    lines: list[Row] = []
    for setting, labels in sorted(by_setting(runs).items()):
        rows = {
            label: {seed: row_of(run) for seed, run in held.items()}
            for label, held in labels.items()
        }
        here = [line_of(label, rows[label], rows.get(bound, {}), bound) for label in rows]
        here.sort(key=lambda line: -(line["area"] or 0.0))
        lines += [dict(zip(SETTING, setting, strict=True)) | line for line in here]
    return lines


def line_of(label: str, rows: Mapping[str, Row], base: Mapping[str, Row], bound: str) -> Row:
    line: Row = {"label": label, "seeds": len(rows)}
    for name in FIGURES:
        middle, low, _, _ = interval(list(column(rows, name).values()))
        line |= {name: middle, f"{name}_95": None if low is None else middle - low}  # type: ignore[operator]
    for name in ("end", "area"):
        apart = paired(column(rows, name), column(base, name)) if label != bound else []
        middle, low, _, _ = interval(apart)
        line |= {f"{name}_minus_bound": middle}
        line |= {f"{name}_minus_bound_95": None if low is None else middle - low}  # type: ignore[operator]
    return line


def in_words(lines: Iterable[Row], bound: str) -> str:
    """A Markdown table for each setting."""
    parts, held = [], list(lines)
    for setting in dict.fromkeys(tuple(line[key] for key in SETTING) for line in held):
        here = [line for line in held if tuple(line[key] for key in SETTING) == setting]
        data, regime, alpha = setting
        parts.append(f"### {data}, {regime} groups, {alpha_in_words(alpha)}\n")
        shown = [printed(line, bound) for line in here]
        parts.append(aligned([list(shown[0]), *(list(row.values()) for row in shown)], True) + "\n")
    return "\n".join(parts)


def printed(line: Row, bound: str) -> dict[str, str]:
    def around(name: str, text: str) -> str:
        half = line[f"{name}_95"]
        return text if half is None else f"{text} ±{half:.1f}"

    cells = {"row": str(line["label"]), "seeds": str(line["seeds"])}
    for name in FIGURES:
        head = name.replace("at_", "served at ")
        cells[head] = around(name, decimals(line[name], 1))
    for name in ("end", "area"):
        cells[f"{name} minus {bound}"] = around(
            f"{name}_minus_bound", signed(line[f"{name}_minus_bound"])
        )
    return cells
