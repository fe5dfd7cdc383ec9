"""Rows and tables of tools/experiments: one row per run, one line per rule and setting.

A run's accuracy is the mean over its evaluated rounds among the last TAIL_ROUNDS, in %. "final" is
the deepest exit that a run trains, exit 1 for fedavg-s. A figure that a run lacks is an empty cell.
Differences are paired: the mean over the seeds that both rules have of their difference, with a
95 % interval of Student's t, which one seed does not give.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from scipy import stats

from edge_sdk.errors import ConfigError, DataError
from tools import tables
from tools.experiments.grids import BASELINE, BOUND

TAIL_ROUNDS = 5
Row: TypeAlias = dict[str, Any]  # texts, and numbers or None
SETTING = ("data", "regime", "alpha")
COSTS = {  # column of the table: column of the rows
    "example_stages": "example_stages_per_round",
    "peak_MB": "peak_memory_mb",
    "MB_up": "mb_up_per_round",
    "MB_down": "mb_down_per_round",
    "server_s": "server_s_per_round",
}


@dataclass(frozen=True)
class Run:
    """One result. cell: label, data, regime, alpha, seed; rounds: as Store.history gives them;
    groups: costs of clients by their exit; tuned: accuracy after fine-tuning at every client."""

    cell: Mapping[str, Any]
    record: Mapping[str, Any]
    rounds: Sequence[Mapping[str, Any]]
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tuned: float | None = None


def add_commands(commands: Any) -> None:
    rows = commands.add_parser("rows", help="one CSV row per run")
    rows.add_argument("--csv", type=Path, required=True, help="where to write them")
    rows.add_argument("--out", type=Path, required=True, help="folder of results")
    rows.add_argument(
        "--add", action="store_true", help="keep rows of the file that the folder lacks"
    )
    rows.set_defaults(run=run_rows)
    table = commands.add_parser("table", help="one line per rule and setting")
    source = table.add_mutually_exclusive_group(required=True)
    source.add_argument("--out", type=Path, help="folder of results")
    source.add_argument("--csv", type=Path, help="rows, as `rows` wrote them")
    table.add_argument("--markdown", action="store_true", help="print Markdown, not plain text")
    table.add_argument("--to", type=Path, help="folder for table.csv and table.md")
    table.set_defaults(run=run_table)


def run_rows(args: argparse.Namespace) -> int:
    rows = all_rows(args.out)
    if args.add and args.csv.exists():
        rows = added(read_rows(args.csv), rows)
    write_csv(args.csv, rows)
    print(f"{len(rows)} rows in {args.csv}")
    return 0


def run_table(args: argparse.Namespace) -> int:
    rows = read_rows(args.csv) if args.csv else all_rows(args.out)
    lines = table_lines(rows)
    origins = sorted({f"commit {row['commit']}, {row['machine']}" for row in rows})
    note = f"python -m tools.experiments table; {'; '.join(origins)}"
    folder = args.to or args.out or args.csv.parent
    for made in (folder / "table.csv", folder / "table.md"):
        if args.csv and made.exists() and made.samefile(args.csv):
            raise ConfigError(f"--csv {args.csv} would be overwritten; give another folder as --to")
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "table.csv", lines, note)
    markdown = in_words(lines, is_markdown=True)
    (folder / "table.md").write_text(f"{markdown}\n<!-- {note} -->\n")
    print(markdown if args.markdown else in_words(lines, is_markdown=False))
    return 0


def read_json(path: Path) -> Any:
    """A file's content; None, with a line on stderr, if it cannot be read."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        print(f"experiments: {path} is left out: {error}", file=sys.stderr)
        return None


def read_runs(folder: Path) -> list[Run]:
    """Every finished run in the folder, by name. Raises DataError if there is none."""
    runs = []
    for path in sorted(folder.glob("*.record.json")):
        result = path.with_name(path.name.replace(".record.json", ".json"))
        if not result.exists():
            continue  # interrupted
        record, content = read_json(path), read_json(result)
        if record and content and content.get("rounds"):
            tuned = content.get("personalised", {}).get("groups", {}).get("all", {}).get("after")
            groups = content.get("groups", {})
            runs.append(Run(record["cell"], record, content["rounds"], groups, tuned))
    if not runs:
        raise DataError(
            f"{folder} holds no results; make some with `python -m tools.experiments run --out`"
        )
    return runs


def all_rows(folder: Path) -> list[Row]:
    return in_order([row_of(run) for run in read_runs(folder)])


def added(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """One row per cell of a grid, the new one where both have it."""
    return in_order({cell_of(row): row for row in [*old, *new]}.values())


def cell_of(row: Row) -> tuple[str, ...]:
    return *(str(row[key]) for key in (*SETTING, "label")), f"{int(row['seed']):04}"


def in_order(rows: Iterable[Row]) -> list[Row]:
    """Sorted by cell, all with the same columns: fedavg-s has fewer exits than others."""
    rows = sorted(rows, key=cell_of)
    fullest = max(rows, key=len)
    return [dict.fromkeys(fullest) | row for row in rows]


def row_of(run: Run) -> Row:
    """A run's figures. Bytes, memory and examples: MB of 10^6 bytes; the cost of clients is the
    sum over a round's participants of examples x stages trained."""
    tail = tail_of(run.rounds)
    served, last = exits(tail, "accuracy_served"), exits(tail, "accuracy")
    final = [values[-1] for values in series(tail, "accuracy")]
    server = [mean_of(run.rounds, phase) for phase in ("fit", "generate", "aggregate")]
    command = shlex.split(run.record.get("command", ""))
    return {
        **{key: run.cell.get(key) for key in SETTING},
        "label": run.cell.get("label"),
        "seed": run.cell.get("seed"),
        "rounds": run.rounds[-1]["round"],
        "served_final": served[-1] if served else None,
        "last_final": last[-1] if last else None,
        "swing": statistics.stdev(final) if len(final) > 1 else None,
        **{f"served_exit_{exit}": value for exit, value in enumerate(served, 1)},
        **{f"last_exit_{exit}": value for exit, value in enumerate(last, 1)},
        "example_stages_per_round": mean_of(run.rounds, "stages_trained"),
        "peak_memory_mb": scaled(largest(run.rounds, "peak_memory_bytes")),
        "mb_up_per_round": scaled(mean_of(run.rounds, "bytes_up")),
        "mb_down_per_round": scaled(mean_of(run.rounds, "bytes_down")),
        "fit_s_per_round": server[0],
        "generate_s_per_round": server[1],
        "aggregate_s_per_round": server[2],
        "server_s_per_round": total(server),
        "generator_mb": scaled(largest(run.rounds, "generator_bytes")),
        "rank": flag_value(command, "--rank"),
        "commit": f"{run.record.get('commit', '')[:10]}{'+' * bool(run.record.get('is_dirty'))}",
        "machine": run.record.get("machine", ""),
    }


def tail_of(rounds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of the last TAIL_ROUNDS rounds, those that were evaluated."""
    return [r for r in rounds[-TAIL_ROUNDS:] if r.get("accuracy")]


def series(rounds: Iterable[Mapping[str, Any]], name: str) -> list[list[float]]:
    """Per evaluated round the accuracy of every exit in %."""
    return [[100 * value for value in r[name]] for r in rounds if r.get(name)]


def exits(rounds: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    """Mean accuracy of every exit over the rounds, in %."""
    return [statistics.mean(values) for values in zip(*series(rounds, name), strict=True)]


def number(round: Mapping[str, Any], name: str) -> float | None:
    """A round's number by name, wherever the history has it: beside the round's number, among the
    method's figures or as the seconds of a phase. None if it has none."""
    for place in (round, round.get("figures") or {}, round.get("seconds") or {}):
        value = place.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    return None


def values_of(rounds: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [value for r in rounds if (value := number(r, name)) is not None]


def mean_of(rounds: Iterable[Mapping[str, Any]], name: str) -> float | None:
    values = values_of(rounds, name)
    return statistics.mean(values) if values else None


def largest(rounds: Iterable[Mapping[str, Any]], name: str) -> float | None:
    return max(values_of(rounds, name), default=None)


def scaled(value: float | None) -> float | None:
    return None if value is None else value / 1e6


def total(values: Iterable[float | None]) -> float | None:
    held = [value for value in values if value is not None]
    return sum(held) if held else None


def flag_value(command: Sequence[str], flag: str) -> float | None:
    """The number after the last `flag` of a command; None without one."""
    places = [i for i, word in enumerate(command[:-1]) if word == flag]
    return float(command[places[-1] + 1]) if places else None


def table_lines(rows: Sequence[Row]) -> list[Row]:
    """Per setting and label over seeds, settings in order, best served first."""
    cells: dict[tuple[str, ...], dict[str, dict[str, Row]]] = {}
    for row in rows:
        setting = tuple(str(row[key]) for key in SETTING)
        cells.setdefault(setting, {}).setdefault(row["label"], {})[str(row["seed"])] = row
    lines = []
    for setting, by_label in sorted(cells.items()):
        found = [line_of(label, by_label) for label in by_label]
        found.sort(key=lambda line: (line["served"] is None, -(line["served"] or 0.0)))
        lines += [dict(zip(SETTING, setting, strict=True)) | line for line in found]
    return lines


def line_of(label: str, by_label: Mapping[str, Mapping[str, Row]]) -> Row:
    runs = by_label[label]
    served, last = column(runs, "served_final"), column(runs, "last_final")
    base = by_label.get(BASELINE, {}) if label != BASELINE else {}
    bound = by_label.get(BOUND, {}) if label != BOUND else {}
    difference, low, high, pairs = interval(paired(served, column(base, "served_final")))
    return {
        "label": label,
        "seeds": len(runs),
        "served": mean(served.values()),
        "served_sd": deviation(served.values()),
        "last": mean(last.values()),
        "last_sd": deviation(last.values()),
        "exit_1_served": mean(column(runs, "served_exit_1").values()),
        f"minus_{BASELINE}": difference,
        "low_95": low,
        "high_95": high,
        "pairs": pairs,
        f"minus_{BOUND}": mean(paired(served, column(bound, "served_final"))),
        "swing": mean(column(runs, "swing").values()),
        **{name: mean(column(runs, source).values()) for name, source in COSTS.items()},
    }


def column(runs: Mapping[str, Row], name: str) -> dict[str, float]:
    """The runs' numbers of that name by seed, without those that have none."""
    return {seed: float(row[name]) for seed, row in runs.items() if row.get(name) is not None}


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> list[float]:
    """Differences over the seeds that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def interval(differences: Sequence[float]) -> tuple[float | None, float | None, float | None, int]:
    """Mean, the two ends of its 95 % interval, and how many differences there are."""
    count = len(differences)
    if count == 0:
        return None, None, None, 0
    middle = statistics.mean(differences)
    if count == 1:
        return middle, None, None, 1
    t = float(stats.t.ppf(0.975, count - 1))
    half = t * statistics.stdev(differences) / count**0.5
    return middle, middle - half, middle + half, count


def mean(values: Iterable[float]) -> float | None:
    held = list(values)
    return statistics.mean(held) if held else None


def deviation(values: Iterable[float]) -> float | None:
    """Standard deviation of the sample; None of one value."""
    held = list(values)
    return statistics.stdev(held) if len(held) > 1 else None


def in_words(lines: Sequence[Row], is_markdown: bool) -> str:
    """The table for people, one part per setting."""
    parts = []
    for setting in dict.fromkeys(tuple(line[key] for key in SETTING) for line in lines):
        data, regime, alpha = setting
        chosen = [line for line in lines if tuple(line[key] for key in SETTING) == setting]
        cells = [list(printed(chosen[0])), *(list(printed(line).values()) for line in chosen)]
        title = f"{data}, {regime} groups, {alpha_in_words(alpha)}"
        heading = f"### {title}\n" if is_markdown else f"{title}"
        parts.append(f"{heading}\n{aligned(cells, is_markdown)}\n")
    return "\n".join(parts)


def alpha_in_words(alpha: str) -> str:
    words = {"iid": "IID", "subject": "by subject"}
    return words.get(alpha, f"Dirichlet {alpha}")


def printed(line: Row) -> dict[str, str]:
    """A line's cells as texts: accuracies and differences in %, one decimal."""
    low, high = line["low_95"], line["high_95"]
    spread = "" if low is None else f" [{low:+.1f}, {high:+.1f}]"
    costs = {"example_stages": 0, "peak_MB": 0, "MB_up": 2, "MB_down": 2, "server_s": 3}
    return {
        "rule": line["label"],
        "seeds": str(line["seeds"]),
        "served": decimals(line["served"], 1) + in_brackets(line["served_sd"]),
        "last": decimals(line["last"], 1) + in_brackets(line["last_sd"]),
        "exit 1": decimals(line["exit_1_served"], 1),
        f"minus {BASELINE}": signed(line[f"minus_{BASELINE}"]) + spread,
        f"minus {BOUND}": signed(line[f"minus_{BOUND}"]),
        "swing": decimals(line["swing"], 1),
        **{name.replace("_", " "): decimals(line[name], n) for name, n in costs.items()},
    }


def decimals(value: float | None, count: int) -> str:
    return "" if value is None else f"{value:.{count}f}"


def in_brackets(value: float | None) -> str:
    return "" if value is None else f" ({value:.1f})"


def signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def aligned(lines: Sequence[Sequence[str]], is_markdown: bool) -> str:
    """Columns under one another; the first line is the head."""
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines]
    if not is_markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def write_table(folder: Path, name: str, lines: Sequence[Row], text: str, note: str) -> None:
    """NAME.csv with the lines and NAME.md with their text, each with the note; text is printed."""
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / f"{name}.csv", lines, note)
    (folder / f"{name}.md").write_text(f"{text}\n<!-- {note} -->\n")
    print(text)


def origins_of(runs: Iterable[Run]) -> str:
    """Commits and machines that made the runs."""
    made = {f"commit {run.record['commit'][:10]}, {run.record['machine']}" for run in runs}
    return "; ".join(sorted(made))


def write_csv(path: Path, rows: Sequence[Row], note: str = "") -> None:
    tables.write_csv(path, [{k: rounded(v) for k, v in row.items()} for row in rows], note)


def rounded(value: object) -> object:
    """Six significant digits: more than any figure here carries."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def read_rows(path: Path) -> list[Row]:
    """Rows that `rows` wrote: numbers as numbers, empty cells None. Raises ConfigError."""
    try:
        read = tables.read_csv(path)
    except OSError as error:
        raise ConfigError(f"--csv {path} cannot be read: {error}") from error
    needed = {*SETTING, "label", "seed", "served_final", "last_final", "commit", "machine"}
    if not read or (lacking := needed - set(read[0])):
        got = f"lacks {', '.join(sorted(lacking))}" if read else "has no rows"
        raise ConfigError(f"--csv {path} {got}; write it with `python -m tools.experiments rows`")
    texts = {*SETTING, "label", "seed", "commit", "machine"}
    return [
        {k: v if k in texts else float(v) if v else None for k, v in row.items()} for row in read
    ]
