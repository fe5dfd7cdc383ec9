"""What the generators cost and how well they predict, at the sizes of HypeMeFed's networks.

    python -m tools.bench.generators [--models svhn,...] [--generators svd-mlp,...] [--csv FILE]

One row per (model, generator), each in a process of its own: parameters; peak memory over the
process before the generator was made; seconds to observe, fit and generate in the last of
`--rounds` rounds of ten participants (3, 4 and 3 on exits 1, 2 and 3); and the error on owners that
the generator never saw. In truth every participant trains the whole network, a few steps of Adam on
data with classes to learn, two of them at each client; the generator is shown its prefix only.
`error` is that of the tensors that stand for the lacking clients (gate included) against the mean
of what these trained, relative to its norm; `moved` the same relative to how far it moved from the
global that was sent: 1 is as good as the stale global. `mean_moved`: the owners' mean in its place.

Seconds are the process's CPU time on one thread (wall clock on CUDA). The naive network is run
where it needs less than `--memory-gb`; elsewhere its memory is computed (its parameters, gradients
and Adam's two moments of the largest group, and a temporary of the largest tensor: 14 % less than
was measured at the smallest VGG) and its seconds are those of the largest network that ran, per
parameter.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch

from coordinator.config import GeneratorOptions
from coordinator.generators.factors import MIN_SIDE, factorise
from coordinator.generators.pairwise import PairGenerator
from coordinator.generators.registry import make_generator
from edge_sdk.hardware import process_memory
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors
from tools.bench.generator_updates import (
    EXITS,
    MODELS,
    Case,
    Round,
    as_update,
    load_round,
    make_updates,
    prefix,
    shown,
)
from tools.tables import made_by, write_csv

ROOT = Path(__file__).resolve().parents[2]
GENERATORS = {
    "naive-mlp": GeneratorOptions(name="naive-mlp"),
    "svd-mlp": GeneratorOptions(name="svd-mlp"),
    "svd-mlp-residual": GeneratorOptions(name="svd-mlp-residual"),
    "update-regression": GeneratorOptions(name="update-regression", rank=12),
}
FIELDS = (
    *("model", "generator", "how", "rounds", "parameters", "peak_MB", "generator_MB"),
    *("observe_s", "fit_s", "generate_s", "round_s", "memory_saved_%", "times_faster"),
    *("error_2", "error_3", "moved_2", "moved_3", "mean_moved_2", "mean_moved_3"),
)
Row = dict[str, object]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default=",".join(name for name in MODELS if name != "tiny"))
    parser.add_argument("--generators", default=",".join(GENERATORS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-gb", type=float, default=10.0)
    parser.add_argument("--limit-s", type=float, default=1500.0, help="for one row")
    said = "folder to keep updates and rows in; what is there is not made again"
    parser.add_argument("--updates", type=Path, help=said)
    parser.add_argument("--csv", type=Path, help="write the table here too")
    parser.add_argument("--row", nargs=2, metavar=("MODEL", "GENERATOR"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.row:
        print(json.dumps(measure(*args.row, args.updates, args.rounds, args.device)))
        return 0
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in args.models.split(","):
            folder = (args.updates or Path(scratch)) / model
            make_updates(MODELS[model], folder, args.rounds)
            for generator in args.generators.split(","):
                rows.append(run_row(model, generator, folder, args))
                print(rows[-1], file=sys.stderr, flush=True)
    compare_with_naive(rows)
    print_markdown(rows)
    if args.csv:
        gpu = [torch.cuda.get_device_name()] if args.device != "cpu" else ["one thread, shared"]
        command = f"python -m tools.bench.generators --rounds {args.rounds}"
        write_csv(args.csv, rows, made_by(command, *gpu), FIELDS)
    return 0


def run_row(model: str, generator: str, folder: Path, args: argparse.Namespace) -> Row:
    """In a fresh process; computed where the generator is too large or too slow."""
    sizes = size_of(MODELS[model], GENERATORS[generator])
    row: Row = {"model": model, "generator": generator, "how": "computed, not run"} | sizes
    kept = folder / f"row-{generator}.json"
    if kept.exists():
        return row | json.loads(kept.read_text())
    if float(str(sizes["peak_MB"])) > 1e3 * args.memory_gb:
        return row
    command = [sys.executable, "-m", "tools.bench.generators", "--row", model, generator]
    command += ["--updates", str(folder.resolve())]
    command += ["--rounds", str(args.rounds), "--device", args.device]
    try:
        ran = subprocess.run(
            command, capture_output=True, text=True, timeout=args.limit_s, cwd=ROOT, check=False
        )
    except subprocess.TimeoutExpired:
        return row | {"how": f"computed, not run (over {args.limit_s:.0f} s)"}
    if ran.returncode:
        return row | {"how": f"failed: {(ran.stderr.strip() or 'killed').splitlines()[-1]}"}
    found = {"how": "run", "rounds": args.rounds} | json.loads(ran.stdout)
    kept.write_text(json.dumps(found))
    return row | found


def size_of(case: Case, options: GeneratorOptions) -> Row:
    """Parameters and computed peak, from the networks' shapes alone."""
    if options.name == "update-regression":
        return {"parameters": 0, "peak_MB": 0.0}
    with torch.device("meta"):
        made = make_generator(case.spec(), options, 0, "meta")
    assert isinstance(made, PairGenerator)
    groups = [[p.nbytes for p in network.parameters()] for network in made.networks]
    peak = sum(map(sum, groups)) + 3 * max(map(sum, groups)) + max(map(max, groups))
    count = sum(p.numel() for p in made.networks.parameters())
    return {"parameters": count, "peak_MB": round(peak / 1e6, 1)}


def measure(model: str, generator: str, folder: str, rounds: int, device: str) -> Row:
    """The row's measured figures; in a process that did nothing before."""
    warm_up(GENERATORS[generator], device)
    round_ = load_round(Path(folder), 1)
    example = shown(Path(folder), 1, 0, 3)
    meter = Meter(device)
    with meter.measure("make"):
        made = make_generator(MODELS[model].spec(), GENERATORS[generator], 0, device)
    assert made is not None
    row: Row = {}
    for number in range(1, rounds + 1):
        if number > 1:
            round_ = load_round(Path(folder), number)
        meter.seconds.clear()
        for client, exit in enumerate(EXITS):
            del example
            example = shown(Path(folder), number, client, exit)
            with meter.measure("observe_s"):
                made.observe(example, round_.sent, 1.0)
        with meter.measure("fit_s"):
            figures = made.fit(round_.sent, number)
        errors = Errors()
        generated = iter(made.generate(round_.sent, round_.mean))
        while True:
            with meter.measure("generate_s"):
                found = next(generated, None)
            if found is None:
                break
            errors.add_(round_, *found)
            del found
        row = {**meter.seconds, "round_s": sum(meter.seconds.values())}
        row |= {"generator_MB": figures["generator_bytes"] / 1e6} | errors.row(round_)
    row["peak_MB"] = meter.peak_bytes / 1e6
    return {name: float(f"{value:.4g}") for name, value in row.items()}


class Errors:
    """Squared errors by stage of what stands for the lacking clients. A tensor of which nothing was
    generated counts with the owners' mean."""

    def __init__(self) -> None:
        self._change: dict[int, float] = {}

    def add_(self, round_: Round, weight: float, tensors: Tensors) -> None:
        """(owners mean + weight G) / (owners + weight) is what the server's mean becomes; solved
        for the tensors E that all the lacking would have to have sent."""
        for name, generated in tensors.items():
            if name not in main_weights(round_):
                continue
            stage = stage_of(name)[1]
            owners = sum(exit >= stage for exit in EXITS)
            lacking = len(EXITS) - owners
            total = (owners * round_.mean[name] + weight * generated) / (owners + weight)
            stands = (total * len(EXITS) - owners * round_.mean[name]) / lacking
            true = round_.lacking[name]
            change = (stands - true).square().sum() - (round_.mean[name] - true).square().sum()
            self._change[stage] = self._change.get(stage, 0.0) + float(change)

    def row(self, round_: Round, stages: Sequence[int] = (2, 3)) -> Row:
        found: Row = {}
        for stage in stages:
            names = [name for name in main_weights(round_) if stage_of(name)[1] == stage]

            def squared(a: Tensors, b: Tensors | None = None, names: list[str] = names) -> float:
                return sum(float((a[n] - (b[n] if b else 0)).square().sum()) for n in names)

            plain = squared(round_.mean, round_.lacking)
            moved = squared(round_.lacking, round_.sent)
            error = max(0.0, plain + self._change.get(stage, 0.0))
            found[f"error_{stage}"] = (error / squared(round_.lacking)) ** 0.5
            found[f"moved_{stage}"] = (error / moved) ** 0.5
            found[f"mean_moved_{stage}"] = (plain / moved) ** 0.5
        return found


def main_weights(round_: Round) -> list[str]:
    """Convolutions of the stages that may lack: what every generator generates."""
    return [n for n, t in round_.sent.items() if t.ndim > 2 and stage_of(n) > ("stages", 1)]


def warm_up(options: GeneratorOptions, device: str) -> None:
    """Two rounds on a tiny model, so that libraries are loaded before memory is looked at."""
    factorise(torch.randn(MIN_SIDE, MIN_SIDE), 1)
    spec = MODELS["tiny"].spec()
    sent = initial_tensors(spec, 0)
    made = make_generator(spec, options, 0, device)
    assert made is not None
    for number in (1, 2):
        for client, exit in enumerate(EXITS):
            moved = {n: t + (0.01 * torch.randn(t.shape)).to(t.dtype) for n, t in sent.items()}
            made.observe(as_update(f"{client}", exit, prefix(moved, exit)), sent, 1.0)
        made.fit(sent, number)
        list(made.generate(sent, sent))


class Meter:
    """Seconds by name, and the peak of memory inside what is measured over what was held when the
    meter was made."""

    def __init__(self, device: str) -> None:
        self.seconds: dict[str, float] = {}
        self.peak_bytes = 0.0
        self._device = device
        self._before = self._held()

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        self._held()
        if self._device == "cpu":
            process_memory.reset_peak()
        else:
            torch.cuda.reset_peak_memory_stats()
        start = self._clock()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + self._clock() - start
        on_cpu = self._device == "cpu"
        peak = process_memory.peak_bytes() if on_cpu else torch.cuda.max_memory_allocated()
        self.peak_bytes = max(self.peak_bytes, peak - self._before)

    def _clock(self) -> float:
        if self._device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def _held(self) -> float:
        if self._device != "cpu":
            return float(torch.cuda.memory_allocated())
        with contextlib.suppress(OSError, AttributeError):  # what is free but was not given back
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        return float(psutil.Process().memory_info().rss)


def compare_with_naive(rows: list[Row]) -> None:
    """Fill in the naive network's seconds where it did not run, and the ratios to it."""
    naive = {row["model"]: row for row in rows if row["generator"] == "naive-mlp"}
    ran = [row for row in naive.values() if row["how"] == "run"]
    if ran:
        largest = max(ran, key=lambda row: int(str(row["parameters"])))
        pace = float(str(largest["round_s"])) / int(str(largest["parameters"]))
        for row in naive.values():
            row.setdefault("round_s", float(f"{pace * int(str(row['parameters'])):.3g}"))
    for row in rows:
        base = naive.get(row["model"])
        if base is None or base is row or row["how"] != "run":
            continue
        saved = 100 * (1 - float(str(row["peak_MB"])) / float(str(base["peak_MB"])))
        row["memory_saved_%"] = round(saved, 2)
        if "round_s" in base:
            faster = float(str(base["round_s"])) / float(str(row["round_s"]))
            row["times_faster"] = float(f"{faster:.3g}")


def print_markdown(rows: list[Row]) -> None:
    print("| " + " | ".join(FIELDS) + " |")
    print("| " + " | ".join("---" for _ in FIELDS) + " |")
    for row in rows:
        print("| " + " | ".join(str(row.get(name, "-")) for name in FIELDS) + " |")


if __name__ == "__main__":
    sys.exit(main())
