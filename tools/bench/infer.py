"""What stopping early saves: accuracy and time of a prediction at several thresholds.

    edge-coordinator emulate --method fedavg-l --serve last --data DATA --run-dir RUN ...
    python -m tools.bench.infer --weights RUN/model.safetensors --data DATA [--csv FILE]

Several models: --weights and --data again, in the same order. The model is exported, and calibrated
on one half of the data's test part to lose at most 1 % against the last exit; the other half is
predicted one by one by edge_sdk.infer in every way: up to each exit, at each threshold, as
calibrated, and all exits in one graph. All ways take turns on every example, in random order, so
that what else the machine does falls on all alike. cpu_ms is the thread's own CPU time, the median
of the repeats of each prediction; wall_ms the clock's, the fastest of them, as the slower ones
waited for other work; both are then averaged over all predictions. of_last compares cpu_ms with
going to the last exit stage by stage.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.data.examples import Examples
from edge_sdk.data.loading import load_test
from edge_sdk.errors import EdgeError
from edge_sdk.infer.early_exit import NEVER, EarlyExit, open_session
from edge_sdk.infer.export import export, read_weights
from edge_sdk.infer.model_folder import read_file, read_model
from edge_sdk.infer.thresholds import choose_thresholds
from tools.tables import made_by, print_table, write_csv

LOSS = 0.01
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
LAST = "up to the last exit"
Predict = Callable[[npt.NDArray[Any]], tuple[int, int]]  # of one example: label, exit


@dataclass(frozen=True)
class Way:
    """One way to predict. threshold: None where there is none."""

    name: str
    threshold: float | None
    predict: Predict


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--weights", action="append", required=True, type=Path, help="model.safetensors of a run")
    add("--data", action="append", required=True, help="a data source with a test part")
    add("--limit", type=int, help="at most so many predictions, and as many to calibrate")
    add("--repeats", type=int, default=3, help="of every prediction")
    add("--csv", type=Path)
    args = parser.parse_args(argv)
    if len(args.weights) != len(args.data):
        parser.error(f"{len(args.weights)} --weights for {len(args.data)} --data; give one each")
    rows, about = [], []
    try:
        for weights, data in zip(args.weights, args.data, strict=True):
            with tempfile.TemporaryDirectory() as name:
                found, made = measured(weights, data, Path(name) / "model", args)
            rows += found
            about.append(made)
    except EdgeError as error:
        print(f"bench.infer: {error}", file=sys.stderr)
        return 1
    print(*about, sep="\n")
    columns = [*max(rows, key=len)]  # of the model with the most exits
    print_table(rows, columns)
    if args.csv:
        flags = f"--repeats {args.repeats}" + (f" --limit {args.limit}" if args.limit else "")
        about = ["shared with other work", "1 thread", "batch 1", *about]
        note = made_by(f"python -m tools.bench.infer {flags}", *about)
        write_csv(args.csv, rows, note, columns)
    return 0


def measured(
    weights: Path, source: str, folder: Path, args: argparse.Namespace
) -> tuple[list[dict[str, object]], str]:
    """The rows of one model, and what it is. Raises EdgeError."""
    spec, tensors = read_weights(weights)
    test = load_test(source)
    order = np.random.default_rng(0).permutation(len(test))
    held, tried = (test.take(half[: args.limit]) for half in np.array_split(order, 2))
    export(spec, tensors, folder, examples=held)
    done = choose_thresholds(folder, held.x, held.y, metric_loss=LOSS)
    ways = ways_of(folder, done.thresholds)
    labels, exits, cpu_s, wall_s = timed(ways, tried, args.repeats)
    name = Path(source).name
    last = next(number for number, way in enumerate(ways) if way.name == LAST)
    rows: list[dict[str, object]] = [
        {
            "model": spec.family,
            "data": name,
            "way": way.name,
            "threshold": "" if way.threshold is None else f"{way.threshold:g}",
            "accuracy": f"{(labels[number] == tried.y).mean():.4f}",
            "cpu_ms": f"{1e3 * cpu_s[number]:.4f}",
            "wall_ms": f"{1e3 * wall_s[number]:.4f}",
            "of_last": f"{cpu_s[number] / cpu_s[last]:.3f}",
            **{
                f"share_exit_{exit}": f"{(exits[number] == exit).mean():.3f}"
                for exit in range(1, spec.exit + 1)
            },
        }
        for number, way in enumerate(ways)
    ]
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return rows, (
        f"{spec.family} on {name}: {parameters} parameters, {len(held)} examples to calibrate, "
        f"{len(tried)} predictions"
    )


def ways_of(folder: Path, calibrated: Sequence[float]) -> list[Way]:
    engine = EarlyExit.load(folder, threshold=NEVER)
    number = len(engine.sessions)
    ways = [
        stopping(
            engine, f"up to exit {exit}", (*[NEVER] * (exit - 1), *[0.0] * (number - exit)), None
        )
        for exit in range(1, number)
    ]
    ways += [stopping(engine, LAST, engine.thresholds, None), whole(folder)]
    ways += [stopping(engine, "early exit", (t,) * (number - 1), t) for t in THRESHOLDS]
    shown = min(calibrated, default=NEVER)
    return [*ways, stopping(engine, "early exit, as calibrated", calibrated, shown)]


def stopping(engine: EarlyExit, name: str, thresholds: Sequence[float], shown: float | None) -> Way:
    """With one threshold per exit but the last; `shown` stands in the table."""
    chosen = replace(engine, thresholds=tuple(thresholds))

    def predict(x: npt.NDArray[Any]) -> tuple[int, int]:
        found = chosen.predict(x)
        return int(found.label[0]), int(found.exit[0])

    return Way(name, shown, predict)


def whole(folder: Path) -> Way:
    """All exits at once, the last one's answer, nothing checked: onnxruntime's own speed."""
    model = read_model(folder)
    session = open_session(read_file(folder, model.whole), model.whole.name)
    names = [f"exit_{model.spec.exit}"]

    def predict(x: npt.NDArray[Any]) -> tuple[int, int]:
        (logits,) = session.run(names, {"input": x})
        return int(logits[0].argmax()), model.spec.exit

    return Way("one graph, last exit", None, predict)


def timed(
    ways: Sequence[Way], examples: Examples, repeats: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
    """Labels and exits, (ways, n) each; mean CPU and wall seconds of a prediction, (ways,) each."""
    n = len(examples)
    labels, exits = (np.zeros((len(ways), n), np.int64) for _ in range(2))
    seconds = np.zeros((2, repeats, len(ways), n))  # CPU, wall
    turns = np.random.default_rng(1)  # a way's predecessor decides what it finds in the caches
    for way in ways:
        way.predict(examples.x[:1])
    for repeat in range(repeats):
        for i in range(n):
            x = examples.x[i : i + 1]
            for number in turns.permutation(len(ways)):
                wall, cpu = time.perf_counter(), time.thread_time()
                answer = ways[number].predict(x)
                seconds[0, repeat, number, i] = time.thread_time() - cpu
                seconds[1, repeat, number, i] = time.perf_counter() - wall
                labels[number, i], exits[number, i] = answer
    cpu_s, wall_s = np.median(seconds[0], axis=0), seconds[1].min(axis=0)  # each (ways, n)
    return labels, exits, cpu_s.mean(axis=1), wall_s.mean(axis=1)


if __name__ == "__main__":
    sys.exit(main())
