"""Tables as CSV, whose first line says which command, commit and machine made them."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path

from edge_sdk.helpers.text import csv_cell

ROOT = Path(__file__).resolve().parents[1]


def git(*arguments: str, folder: Path = ROOT) -> str:
    """What git prints in the folder, "" where there is no git or no repository."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


def commit() -> str:
    return git("rev-parse", "--short=10", "HEAD") or "unknown"


@cache
def machine() -> str:
    """Architecture, processor and cores, e.g. "x86_64, AMD EPYC 7B13, 2 cores"."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ", ".join([platform.machine(), *model[:1], f"{os.cpu_count()} cores"])


def kernel() -> str:
    """E.g. "Linux 6.1.0"."""
    return f"{platform.system()} {platform.release().partition('-')[0]}"


def made_by(command: str, *about: str) -> str:
    """The first line of a table. about: what else decides about its figures."""
    return f"{command}; commit {commit()}; {', '.join((machine(), *about))}"


def write_csv(
    path: Path, rows: Sequence[Mapping[str, object]], note: str = "", columns: Iterable[str] = ()
) -> None:
    """note: the first line, see made_by. columns: their order; default that of their appearance.
    What a row lacks, and None, is an empty cell."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        if note:
            file.write(f"# {note}\n")
        names = list(columns) or columns_of(rows)
        writer = csv.DictWriter(file, names, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_cell(cell) for name, cell in row.items()} for row in rows)


def columns_of(rows: Iterable[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows without the first line that says who made them. Raises OSError."""
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def print_table(rows: Sequence[Mapping[str, object]], columns: Sequence[str] = ()) -> None:
    """For the terminal, each value to the right of its column."""
    names = columns or columns_of(rows)
    lines = [names, *([str(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def print_row(row: Mapping[str, object], *, is_first: bool) -> None:
    """One row as it comes, the heads above the first."""
    if is_first:
        print("  ".join(f"{name:>8}" for name in row))
    print("  ".join(f"{value!s:>{max(8, len(name))}}" for name, value in row.items()), flush=True)
