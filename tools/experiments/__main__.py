"""Compare methods over a grid of `edge-coordinator emulate` runs; tables, figures and probes.

    python -m tools.experiments run --grid digits --out build/digits --jobs 2
    python -m tools.experiments run --grid main --data fashion=DIR --out build/main --only default
    python -m tools.experiments rows --out build/digits --csv build/digits/rows.csv
    python -m tools.experiments table --out build/digits --markdown
    python -m tools.experiments plot --out build/digits --figures build/digits/figures
    python -m tools.experiments probe cka --data DIR --out build/probes
    python -m tools.experiments probe weights --run-dir RUN --out build/probes

A cell is one row of the grid in one setting with one seed: NAME.json, beside it NAME.record.json
with the flags, the commit and the machine that made it, and NAME.log while it runs or if it failed.
A cell that is there already is not repeated, so an interrupted grid goes on where it stopped; one
that other flags made is refused. All rows of a seed come before the next seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from edge_sdk.cli.flags import whole_flag
from edge_sdk.errors import ConfigError, EdgeError
from tools.experiments import (
    adapters,
    compare,
    corpus,
    curves,
    figures,
    grids,
    peaks,
    probes,
    tables,
    zoo,
)
from tools.experiments.grids import Grid, Setting
from tools.tables import git, machine

ROOT = Path(__file__).resolve().parents[2]
GRIDS = grids.GRIDS | adapters.GRIDS
KNOWN_SOURCES = {"digits": "digits"}  # data that needs no --data
GRACE_S = 20.0  # for a stopped run to end its round and delete its scratch folder
POLL_S = 0.2


@dataclass(frozen=True)
class Cell:
    """One run. flags: all of them but --out."""

    grid: str
    label: str
    setting: Setting
    seed: int
    flags: tuple[str, ...]

    @property
    def name(self) -> str:
        at = self.setting
        return f"{at.data}-{at.regime}-{at.alpha}-{self.label}-s{self.seed}"

    def record(self) -> dict[str, object]:
        where = {key: value for key, value in asdict(self.setting).items() if key != "flags"}
        cell = {"grid": self.grid, "label": self.label, **where, "seed": self.seed}
        return {"cell": cell, "command": shlex.join(self.flags), **origin()}


@dataclass(frozen=True)
class Job:
    cell: Cell
    process: subprocess.Popen[bytes]
    log: Path
    result: Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="run what is missing of a grid")
    add = run.add_argument
    add("--grid", required=True, choices=GRIDS, help=grids_in_words())
    add("--data", action="append", default=[], metavar="NAME=SOURCE")
    add("--out", type=Path, required=True, help="folder of results")
    add("--jobs", type=int, default=1, help="runs at the same time")
    add("--only", type=names, help="labels of rows, with commas")
    add("--regimes", type=names, help="e.g. even; default all of the grid")
    add("--alphas", type=names, help="e.g. 0.5,iid; default all of the grid")
    add("--seeds", type=names, default=["0"], help="e.g. 0,1,2; default 0")
    add("--rounds", type=whole_flag(1, 10**6), help="instead of the grid's")
    add("--extra", default="", help="more flags for every run, as one string")
    add("--quick", action="store_true", help="a small setting of the grid instead, in minutes")
    add("--dry-run", action="store_true", help="print the commands that are missing")
    run.set_defaults(run=run_grid)
    tables.add_commands(commands)
    figures.add_command(commands)
    zoo.add_command(commands)
    curves.add_command(commands)
    probes.add_command(commands)
    corpus.add_commands(commands)
    peaks.add_command(commands)
    compare.add_command(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except EdgeError as error:
        print(f"experiments: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        say(f"{error.filename}: {error.strerror}; give a file or folder that can be used")
        return 1
    except KeyboardInterrupt:
        return 130


def grids_in_words() -> str:
    return "; ".join(f"{name}: {grid.about}" for name, grid in GRIDS.items())


def names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


def run_grid(args: argparse.Namespace) -> int:
    """Run every missing cell; 1 if any was refused or failed."""
    cells = list(grid_cells(args.grid, GRIDS[args.grid], args))
    missing, refused = [], 0
    for cell in cells:
        state = state_of(cell, args.out)
        missing += [cell] if state == "missing" else []
        if state == "other flags":
            refused += 1
            say(f"{args.out / cell.name}.json was made by other flags; use another --out")
    there = len(cells) - len(missing) - refused
    if args.dry_run:
        for cell in missing:
            print(shlex.join(["edge-coordinator", "emulate", *cell.flags]))
        return 0
    failed = run_cells(missing, args.jobs, args.out)
    say(
        f"{len(missing) - failed} run, {there} there already, {refused} refused, {failed} failed, "
        f"in {args.out}"
    )
    return int(bool(refused or failed))


def grid_cells(name: str, grid: Grid, args: argparse.Namespace) -> Iterator[Cell]:
    """In the order to run: all rows and settings of a seed before the next seed, all rows of a
    setting before the next setting. Raises ConfigError for what the grid does not have."""
    sources = KNOWN_SOURCES | dict(source_of(item) for item in args.data)
    labels = picked(args.only, grid.rows, "row", name)
    # dictionaries keep the grid's order in the error message
    every = grid.quick if args.quick else grid.settings
    if not every:
        quick = [key for key, held in GRIDS.items() if held.quick]
        raise ConfigError(f"grid {name} has no --quick setting; {', '.join(quick)} has")
    regimes = picked(args.regimes, dict.fromkeys(s.regime for s in every), "regime", name)
    alphas = picked(args.alphas, dict.fromkeys(s.alpha for s in every), "alpha", name)
    data = {setting.data for setting in every}
    if lacking := sorted(data - set(sources)):
        hint = " ".join(f"--data {key}=SOURCE" for key in lacking)
        if len(lacking) == len(data):
            raise ConfigError(f"grid {name} needs data: {hint}")
        say(f"grid {name} runs without {', '.join(lacking)}; for it give {hint}")
    found = [
        setting
        for setting in every
        if setting.data in sources and setting.regime in regimes and setting.alpha in alphas
    ]
    for seed, setting, label in itertools.product(args.seeds, found, labels):
        flags = [
            *in_place(f"{grid.rows[label]} {setting.flags} {grid.instead.get(label, '')}", sources),
            *["--data", sources[setting.data], "--seed", seed],
            *(["--rounds", str(args.rounds)] if args.rounds else []),
            *shlex.split(args.extra),
        ]
        yield Cell(name, label, setting, whole(seed), tuple(flags))


def source_of(item: str) -> tuple[str, str]:
    """Name and source; runs have another current folder, so a path from here is made absolute."""
    name, equals, source = item.partition("=")
    if not (name and equals and source):
        raise ConfigError(f"--data {item!r} is not NAME=SOURCE, e.g. fashion=data/fashion-mnist")
    return name, str(Path(source).absolute()) if Path(source).exists() else source


def in_place(flags: str, sources: Mapping[str, str]) -> Iterator[str]:
    """The words of `flags`, of which @NAME/REST is REST in what --data gives for NAME."""
    for word in flags.split():
        name, slash, rest = word[1:].partition("/")
        if not word.startswith("@"):
            yield word
        elif name in sources:
            yield sources[name] + slash + rest
        else:
            raise ConfigError(f"a row has {word}; give --data {name}=FOLDER")


def picked(wanted: list[str] | None, known: Collection[str], what: str, grid: str) -> list[str]:
    """The wanted ones, or all. Raises ConfigError listing the known ones."""
    if unknown := sorted(set(wanted or ()) - set(known)):
        raise ConfigError(
            f"grid {grid} has no {what} {', '.join(unknown)}; known: {', '.join(known)}"
        )
    return list(wanted or known)


def whole(seed: str) -> int:
    if not seed.isdecimal():
        raise ConfigError(f"--seeds has {seed!r}, expected whole numbers with commas, e.g. 0,1,2")
    return int(seed)


def state_of(cell: Cell, folder: Path) -> str:
    """ "missing", "there", or "other flags". A run writes its result as a whole and last, after the
    record of its flags: a record alone is a run that was interrupted."""
    if not (folder / f"{cell.name}.json").exists():
        return "missing"
    record = tables.read_json(folder / f"{cell.name}.record.json") or {}
    return "there" if record.get("command") == shlex.join(cell.flags) else "other flags"


def run_cells(cells: Sequence[Cell], num_jobs: int, folder: Path) -> int:
    """Run them, `num_jobs` at a time; returns how many failed. However it ends, none runs on."""
    if num_jobs < 1:
        raise ConfigError(f"--jobs is {num_jobs}, expected at least 1")
    folder.mkdir(parents=True, exist_ok=True)
    waiting, running, outcomes = deque(cells), list[Job](), Counter[bool]()
    stopping: list[int] = []  # a signal that raised could fall between a start and its note here
    ends = (signal.SIGTERM, signal.SIGINT)
    before = {end: signal.signal(end, lambda number, _: stopping.append(number)) for end in ends}
    try:
        while (waiting or running) and not stopping:
            while waiting and len(running) < num_jobs:
                running.append(start(waiting.popleft(), folder))
            time.sleep(POLL_S)
            for job in [job for job in running if job.process.poll() is not None]:
                running.remove(job)
                outcomes[finish(job)] += 1
                say(f"{outcomes.total()} of {len(cells)} done")
    finally:
        for end, handler in before.items():
            signal.signal(end, handler)
        stop(running)
    if stopping:
        raise KeyboardInterrupt
    return outcomes[False]


def start(cell: Cell, folder: Path) -> Job:
    """Begin one run in a process group of its own, so that Ctrl-C reaches this process only."""
    result, log = folder / f"{cell.name}.json", folder / f"{cell.name}.log"
    record = folder / f"{cell.name}.record.json"
    record.write_text(json.dumps(cell.record(), indent=1) + "\n")
    command = [sys.executable, "-m", "coordinator.cli", "emulate", *cell.flags]
    say(f"run {cell.name}")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--out", str(result.resolve())],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Job(cell, process, log, result)


def finish(job: Job) -> bool:
    """Whether an ended run left its result; the log stays where it did not."""
    if job.process.returncode == 0 and job.result.exists():
        job.log.unlink(missing_ok=True)
        return True
    lines = job.log.read_text(errors="replace").strip().splitlines() or ["(nothing was printed)"]
    ended = f"exit code {job.process.returncode}"  # 0 without a result: it was told to stop
    say(f"{job.cell.name} failed, {ended}: {lines[-1]}; see {job.log}")
    return False


def stop(running: Sequence[Job]) -> None:
    """End runs: a signal first, so that each deletes its scratch folder, then the whole group."""
    for job in running:
        job.process.terminate()
    if running:
        say(f"stopping {len(running)} runs, at most {GRACE_S:.0f} s")
    end = time.monotonic() + GRACE_S
    try:
        for job in running:
            job.process.wait(max(0.0, end - time.monotonic()))
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        pass
    finally:
        for job in running:
            if job.process.poll() is None:
                os.killpg(job.process.pid, signal.SIGKILL)
                job.process.wait()
            job.log.unlink(missing_ok=True)


def origin() -> dict[str, object]:
    """Commit, whether tracked files differ from it, and machine. Asked anew for every cell: a grid
    takes hours, and each run starts from the files as they are then."""
    commit = git("rev-parse", "HEAD", folder=ROOT)
    is_dirty = bool(git("status", "--porcelain", "--untracked-files=no", folder=ROOT))
    return {"commit": commit, "is_dirty": is_dirty, "machine": machine()}


def say(text: str) -> None:
    print(f"experiments: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
