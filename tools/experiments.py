"""Compare methods: one `edge-coordinator emulate` run per (data, method, server, seed).

    python tools/experiments.py run --data digits=digits --data fashion=DIR --out build/methods
    python tools/experiments.py table --out build/methods --csv tools/results/methods.csv

A run whose result is there already is not repeated, so an interrupted grid goes on where it
stopped. The table takes, per run, the final exit: the mean of the last five rounds of the global
model (last) and of the served average (served).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("hypemefed", "owners-mean", "stage-rotation", "fedavg-s", "fedavg-l")
SERVERS = {
    "mean": [],
    "momentum": ["--server-momentum", "0.5", "--server-lr", "0.75"],
}
# local training, by data set: enough steps a round for BatchNorm's statistics to follow
TRAINING = {
    "digits": ["--epochs", "5", "--batch-size", "8", "--lr", "0.002"],
    "default": [
        "--epochs", "2", "--batch-size", "32", "--lr", "0.001",
        "--examples", "12000", "--test-examples", "3000",
    ],
}  # fmt: skip
LAST_ROUNDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is missing of the grid")
    run.add_argument("--data", action="append", required=True, metavar="NAME=SOURCE")
    run.add_argument("--methods", default=",".join(METHODS))
    run.add_argument("--servers", default=",".join(SERVERS))
    run.add_argument("--seeds", default="0,1,2")
    run.add_argument("--rounds", default="40")
    run.add_argument("--groups", default="17,17,16")
    run.add_argument("--extra", default="", help="more flags for every run, as one string")
    table = commands.add_parser("table", help="one row per (data, method, server)")
    table.add_argument("--csv", type=Path, help="write the table here too")
    for command in (run, table):
        command.add_argument("--out", type=Path, required=True, help="folder of results")
    args = parser.parse_args(argv)
    return run_grid(args) if args.command == "run" else print_table(args.out, args.csv)


def run_grid(args: argparse.Namespace) -> int:
    """Run every missing cell, one after another; returns the number that failed."""
    failed = 0
    sources = dict(item.split("=", 1) for item in args.data)
    grid = itertools.product(
        args.seeds.split(","), sources, args.methods.split(","), args.servers.split(",")
    )
    for seed, name, method, server in grid:
        out = args.out / f"{name}-{method}-{server}-{seed}.json"
        command = [
            sys.executable, "-m", "coordinator.cli", "emulate", "--method", method,
            "--data", sources[name], "--clients", "50", "--groups", args.groups,
            "--participants", "10", "--rounds", args.rounds, "--alpha", "0.5", "--seed", seed,
            "--out", str(out), *TRAINING.get(name, TRAINING["default"]), *SERVERS[server],
            *args.extra.split(),
        ]  # fmt: skip
        note = " ".join(command[3:])
        record = out.with_suffix(".command")
        if out.exists():
            if record.exists() and record.read_text() != note:
                print(f"experiments: {out} was made by other flags; use another --out", flush=True)
                failed += 1
            continue
        print("run", out.stem, flush=True)
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
        failed += done.returncode != 0
        if done.returncode == 0:
            record.write_text(note)
    return failed


def print_table(folder: Path, target: Path | None) -> int:
    """Rows sorted by data and served accuracy; every figure is read from a run's JSON."""
    cells: dict[tuple[str, str, str], list[dict[str, float]]] = {}
    for path in sorted(folder.glob("*.json")):
        rest, server, _ = path.stem.rsplit("-", 2)
        method = next(m for m in METHODS if rest.endswith(f"-{m}"))
        name = rest.removesuffix(f"-{method}")
        cells.setdefault((name, method, server), []).append(final_figures(path))
    rows = [summary(key, runs) for key, runs in cells.items()]
    rows.sort(key=lambda row: (row["data"], -float(row["served"])))
    if not rows:
        print(f"experiments: no results in {folder}", file=sys.stderr)
        return 1
    lines = [list(rows[0])] + [list(map(str, row.values())) for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))
    if target:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("w", newline="") as file:
            file.write(f"# {machine()}\n")
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return 0


def final_figures(path: Path) -> dict[str, float]:
    """Final exit's accuracy (%) and cost of one run."""
    rounds = json.loads(path.read_text())["rounds"]
    tail = rounds[-LAST_ROUNDS:]
    return {
        "last": 100 * statistics.mean(r["accuracy"][-1] for r in tail),
        "served": 100 * statistics.mean(r["accuracy_served"][-1] for r in tail),
        "exit_1_served": 100 * statistics.mean(r["accuracy_served"][0] for r in tail),
        "mb_up": statistics.mean(r["bytes_up"] for r in rounds) / 1e6,
        "server_s": statistics.mean(
            sum(r["seconds"].get(p, 0) for p in ("fit", "generate", "aggregate")) for r in rounds
        ),
    }


def summary(key: tuple[str, str, str], runs: list[dict[str, float]]) -> dict[str, str]:
    """Mean and spread over seeds of one cell."""

    def mean(name: str) -> float:
        return statistics.mean(run[name] for run in runs)

    def spread(name: str) -> float:
        return statistics.stdev(run[name] for run in runs) if len(runs) > 1 else 0.0

    return {
        "data": key[0],
        "method": key[1],
        "server": key[2],
        "seeds": str(len(runs)),
        "last": f"{mean('last'):.1f}",
        "last_sd": f"{spread('last'):.1f}",
        "served": f"{mean('served'):.1f}",
        "served_sd": f"{spread('served'):.1f}",
        "exit_1_served": f"{mean('exit_1_served'):.1f}",
        "mb_up_per_round": f"{mean('mb_up'):.2f}",
        "server_s_per_round": f"{mean('server_s'):.3f}",
    }


def machine() -> str:
    """Command, commit and machine, for the head of a committed table."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return f"python tools/experiments.py table; commit {commit}; {platform.machine()}, CPU"


if __name__ == "__main__":
    sys.exit(main())
