"""Fuzz what comes from the network, guided by coverage: `python -m tools.fuzz decode|handler`.

decode: one control frame through codec.decode and link.parse_frames. handler: sequences of
frame lists through the real Router, ZmqCohort and all behind them, in the middle of a round; see
world.py for what must hold after each.

Needs atheris (libFuzzer for Python), which gets its own environment under build/; everything else
comes from the environment that this is run with. A failing input lies in build/fuzz/TARGET/ with
its trace; the run goes on. Afterwards the inputs that were kept are given to one process again and
again, 110,000 of them, to see whether memory grows. Exits with 1 when anything failed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

from tools.tables import commit, machine

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build"
ATHERIS = "atheris==3.0.0"
CSV = ROOT / "docs" / "results" / "fuzz.csv"
REGRESSIONS = ROOT / "tests" / "fuzz" / "regressions"
PROGRESS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")
GROWTH_MB, GROWTH_OBJECTS = 4.0, 200  # more after 100,000 inputs than this counts as growth


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz", description=__doc__)
    parser.add_argument("target", choices=("decode", "handler"))
    parser.add_argument("--inputs", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--minutes", type=float, default=24 * 60, help="end after so long, however many inputs"
    )
    parser.add_argument("--csv", type=Path, default=CSV, help="a row is appended; '' for none")
    args = parser.parse_args(argv)
    folder = BUILD / "fuzz" / args.target
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    log = folder / "log"
    with log.open("w") as errors:
        ended = subprocess.run(
            [python(), "-m", "tools.fuzz.child", args.target]
            + [str(value) for value in (args.inputs, args.seed, args.minutes)],
            cwd=ROOT,
            stderr=errors,
            env=environment(),
        )
    found = PROGRESS.findall(log.read_text(errors="replace"))
    result = folder / "result.json"
    if not result.exists():
        print(f"the fuzzer ended with {ended.returncode} before its time, see {log}")
        return 1
    told = json.loads(result.read_text())
    covered = zip(
        ("counters", "features", "corpus"), found[-1] if found else (0, 0, 0), strict=True
    )
    row = {"target": args.target, "seed": args.seed, **told, **dict(covered)}
    wall_s = round(time.monotonic() - started)
    row |= {"wall_s": wall_s, "commit": commit(), "machine": machine()}
    for name, value in row.items():
        print(f"{name:>16}  {value}")
    if str(args.csv) not in ("", "."):
        append(args.csv, row)
    grew = growth(told)
    for line in [*grew, *(f"failed: {path}" for path in sorted(folder.glob("failed-*.txt")))]:
        print(line)
    return 1 if grew or told["failures"] else 0


def growth(told: dict[str, float]) -> list[str]:
    """What grew between 10,000 inputs and 110,000."""
    found = []
    for name, most in (("rss_mb", GROWTH_MB), ("objects", GROWTH_OBJECTS)):
        before, after = told[f"{name}_10k"], told[f"{name}_110k"]
        if after - before > most:
            found.append(f"grew: {name} from {before} to {after}, at most {most} more is noise")
    return found


def python() -> str:
    """Of the environment that has atheris; makes it first where it is missing."""
    venv = BUILD / "fuzz-venv"
    path = venv / "bin" / "python"
    if not (venv / ".installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", venv], check=True)
        subprocess.run([path, "-m", "pip", "install", "--quiet", ATHERIS], check=True)
        (venv / ".installed").touch()
    return str(path)


def environment() -> dict[str, str]:
    """The packages of this interpreter, behind the fuzzer's own."""
    packages = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *packages])}


def append(path: Path, row: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        if is_new:
            file.write(
                "# python -m tools.fuzz TARGET --inputs N --seed S; see docs/results/fuzz.md\n"
            )
        writer = csv.DictWriter(file, fieldnames=list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    sys.exit(main())
