"""`python -m tools.experiments compare`: rows of a grid against one of them, seed by seed.

    python -m tools.experiments compare --out build/adapt-texts --base lora --to docs/results \\
        --name adapt-texts

Means over seeds with the half width of their 95 % interval, and the paired differences to the base
row with theirs. Of each model of a run (the whole one, or one of each backbone): the metric in % of
its deepest exit on the test set after each evaluated round, or only the last perplexity where the
task tells that. own: the metric on what the clients set aside, or after training alone where a row
does that. up, down: MB of 10^6 bytes that a participant moves in the last round, in which only one
that was not drawn before gets frozen tensors; s: CPU seconds of training a round, of all clients.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.experiments.figures import served_final
from tools.experiments.tables import (
    Row,
    Run,
    aligned,
    alpha_in_words,
    column,
    decimals,
    interval,
    mean,
    number,
    origins_of,
    paired,
    read_runs,
    write_table,
)
from tools.experiments.zoo import by_setting

COSTS = {"MB up": 3, "MB down": 3, "s": 1}  # decimals
PERPLEXITY = re.compile(r"(?:(.+)\.)?perplexity")  # of a backbone by its name


def add_command(commands: Any) -> None:
    parser = commands.add_parser("compare", help="rows of a grid against one of them")
    parser.add_argument("--out", type=Path, required=True, help="folder of results")
    parser.add_argument("--base", required=True, help="label of the row to compare with")
    parser.add_argument("--to", type=Path, help="folder for NAME.csv and NAME.md, default --out")
    parser.add_argument("--name", default="compare", help="of the files, default compare")
    parser.set_defaults(run=run_compare)


def run_compare(args: argparse.Namespace) -> int:
    runs = read_runs(args.out)
    lines, texts = [], []
    for setting, labels in sorted(by_setting(runs).items()):
        rows = {
            label: {seed: row_of(run) for seed, run in held.items()}
            for label, held in labels.items()
        }
        here = [line_of(label, rows, args.base) for label in rows]
        data, regime, alpha = setting
        lines += [{"data": data, "regime": regime, "alpha": alpha} | line for line in here]
        texts.append(f"### {data}, {regime} groups, {alpha_in_words(alpha)}\n\n{in_words(here)}")
    note = f"python -m tools.experiments compare --base {args.base}; {origins_of(runs)}"
    write_table(args.to or args.out, args.name, lines, "\n".join(texts), note)
    return 0


def row_of(run: Run) -> Row:
    """A run's figures by name, and its costs."""
    last = run.rounds[-1]
    found = perplexities(last)
    if not found:
        tested = ((r["round"], served_final(r)) for r in run.rounds)
        found = {f"round {round}": value for round, value in tested if value is not None}
    own = run.tuned if run.tuned is not None else number(last, "personal_accuracy")
    each = 1e6 * max(1, int(last["returned"]))
    return {
        **found,
        **({} if own is None else {"own": 100 * own}),
        "MB up": last["bytes_up"] / each,
        "MB down": last["bytes_down"] / each,
        "s": mean(filter(None, (number(r, "train") for r in run.rounds))),
    }


def perplexities(last: Mapping[str, Any]) -> Row:
    """By model: of the deepest exit of the one that is served, or of each backbone by its name."""
    names = {name: PERPLEXITY.fullmatch(name) for name in last.get("figures") or {}}
    by_name = {f"{m[1]} ppl": last["figures"][name] for name, m in names.items() if m and m[1]}
    if by_name or not last.get("perplexity"):
        return by_name
    return {"ppl": last["perplexity"][-1]}


def line_of(label: str, rows: Mapping[str, Mapping[str, Row]], base: str) -> Row:
    """Means over the row's seeds; NAME_95: half of the interval; NAME_minus_base: paired."""
    held, line = rows[label], Row(label=label, seeds=len(rows[label]))
    names = dict.fromkeys(name for row in held.values() for name in row if name not in COSTS)
    for name in names:
        middle, low, _, _ = interval(list(column(held, name).values()))
        line |= {name: middle, f"{name}_95": half(middle, low)}
        if label != base:
            apart = paired(column(held, name), column(rows.get(base, {}), name))
            middle, low, _, _ = interval(apart)
            line |= {f"{name}_minus_base": middle, f"{name}_minus_base_95": half(middle, low)}
    return line | {name: mean(column(held, name).values()) for name in COSTS}


def half(middle: float | None, low: float | None) -> float | None:
    return None if middle is None or low is None else middle - low


def in_words(lines: Sequence[Row]) -> str:
    names = dict.fromkeys(
        name for line in lines for name in line if name not in COSTS and "_" not in name
    )
    shown = [printed(line, [n for n in names if n not in ("label", "seeds")]) for line in lines]
    return aligned([list(shown[0]), *(list(row.values()) for row in shown)], True) + "\n"


def printed(line: Row, names: Sequence[str]) -> dict[str, str]:
    cells = {"row": str(line["label"]), "seeds": str(line["seeds"])}
    for name in names:
        cells[name] = around(line, name, f"{line.get(name) or 0:.2f}")
        if name == names[-1] or name.endswith("ppl"):
            difference = line.get(f"{name}_minus_base")
            cells[f"{name} minus base"] = around(
                line, f"{name}_minus_base", "" if difference is None else f"{difference:+.2f}"
            )
    return cells | {name: decimals(line[name], count) for name, count in COSTS.items()}


def around(line: Row, name: str, text: str) -> str:
    spread = line.get(f"{name}_95")
    if line.get(name) is None:
        return ""
    return text if spread is None else f"{text} ±{spread:.2f}"
