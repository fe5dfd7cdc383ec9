"""`edge-sdk infer`: run an exported model, which stops early."""

from __future__ import annotations

import argparse
import csv
import io
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from edge_sdk.cli.flags import (
    MAX_THREADS,
    MOST,
    add_command,
    path_flag,
    print_json,
    share_flag,
    whole_flag,
)
from edge_sdk.helpers.files import check_output, write_file
from edge_sdk.helpers.interrupts import ends_by_interrupt
from edge_sdk.protocol.fields import Measure

if TYPE_CHECKING:  # numpy, which the agent does without
    import numpy.typing as npt

    from edge_sdk.infer.early_exit import EarlyExit, Prediction


def add_infer_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "infer",
        "run an exported model, stopping early",
        "edge-sdk infer model --data my-data.npz",
    )
    add_model_arguments(parser)
    parser.add_argument("--threshold", type=share_flag, help="for all exits, default as calibrated")
    parser.add_argument("--measure", choices=get_args(Measure), help="default as calibrated")
    parser.add_argument(
        "--out", type=path_flag, metavar="FILE.csv", help="index, label, exit, confidence each"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run_infer)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=path_flag, help="folder of an exported model")
    add("--data", required=True, help="as for run; its test part, or all; or inputs FILE.npy")
    add("--limit", type=whole_flag(1, MOST), metavar="N", help="at most N examples")
    add("--skip", type=whole_flag(0, MOST), default=0, metavar="N", help="leave out the first N")
    add("--threads", type=whole_flag(1, MAX_THREADS), default=1, help="of onnxruntime")


def import_runtime() -> None:
    """Import onnxruntime before all else, as it takes long. Raises ConfigError."""
    with ends_by_interrupt():
        from edge_sdk.infer.early_exit import onnx_runtime

        onnx_runtime()


def run_infer(args: argparse.Namespace) -> int:
    """One example at a time, as a device meets them, so the latencies are real ones."""
    import_runtime()
    from edge_sdk.infer.early_exit import EarlyExit
    from edge_sdk.infer.inputs import read_inputs
    from edge_sdk.infer.thresholds import checked_labels

    if args.out:
        check_output(args.out, "--out")
    x, y = read_inputs(args.model, args.data, args.skip, args.limit)
    engine = EarlyExit.load(
        args.model, threads=args.threads, threshold=args.threshold, measure=args.measure
    )
    if y is not None:
        y = checked_labels(x, y, engine.model)
    found, times_s = predict_each(engine, x)
    names = engine.model.class_names
    if args.out:
        write_predictions(rows_of(found, args.skip, names), args.out)
    result = summary(engine, found, times_s, y)
    if args.json:
        print_json(result | {"predictions": list(rows_of(found, args.skip, names))})
    else:
        print(describe(engine, result))
    return 0


def predict_each(engine: EarlyExit, x: npt.NDArray[Any]) -> tuple[Prediction, list[float]]:
    """Predictions at batch 1 and the seconds that each took; the first one runs before, untimed."""
    import numpy as np

    from edge_sdk.infer.early_exit import Prediction

    engine.predict(x[:1])
    found, times_s = [], []
    for number in range(len(x)):
        start = time.perf_counter()
        found.append(engine.predict(x[number : number + 1]))
        times_s.append(time.perf_counter() - start)
    joined = (
        np.concatenate([getattr(one, name) for one in found])
        for name in ("label", "exit", "confidence")
    )
    return Prediction(*joined), times_s


def summary(
    engine: EarlyExit, found: Prediction, times_s: list[float], y: npt.NDArray[Any] | None
) -> dict[str, Any]:
    """What --json prints beside the predictions. latency: of one example, batch 1."""
    num_exits = engine.model.spec.exit
    return {
        "examples": len(found.label),
        "measure": engine.measure,
        "thresholds": list(engine.thresholds),
        engine.model.metric.key: None if y is None else metric_of(engine, found, y),
        "exit_shares": [float((found.exit == e).mean()) for e in range(1, num_exits + 1)],
        "latency_mean_s": statistics.mean(times_s),
        "latency_median_s": statistics.median(times_s),
        "latency_max_s": max(times_s),
    }


def metric_of(engine: EarlyExit, found: Prediction, y: npt.NDArray[Any]) -> float:
    """Of the answers, by the model's task."""
    from edge_sdk.tasks.table import task_of

    task = task_of(engine.model.spec.task)
    return task.figure(task.counts(found.label, y).sum(0))


def describe(engine: EarlyExit, result: dict[str, Any]) -> str:
    """The summary in lines for a person."""
    from edge_sdk.infer.early_exit import NEVER

    spec, metric = engine.model.spec, engine.model.metric
    thresholds = ", ".join(f"{value:g}" for value in engine.thresholds)
    when = f"where {engine.measure} is at least {thresholds}"
    if min(engine.thresholds, default=NEVER) >= NEVER:
        when = "at the last exit only; edge-sdk calibrate, or give --threshold"
    shares = ", ".join(
        f"exit {number} {100 * share:.1f} %"
        for number, share in enumerate(result["exit_shares"], 1)
    )
    lines = [
        f"model    {spec.family}, {spec.num_classes} {metric.outputs}, {spec.exit} exits",
        f"stops    {when}",
        f"examples {result['examples']}: {shares}",
        f"latency  mean {1e3 * result['latency_mean_s']:.3f} ms, median "
        f"{1e3 * result['latency_median_s']:.3f}, max {1e3 * result['latency_max_s']:.3f}; batch 1",
    ]
    if (value := result[metric.key]) is not None:
        lines.append(f"{metric.name:8} {metric.said(value, 2)}")
    return "\n".join(lines)


def rows_of(found: Prediction, skip: int, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One row an example; index: its place in the data. label: the answer, a list where the task
    has several. name: of the class, where it is known."""
    answers = zip(found.label.tolist(), found.exit, found.confidence, strict=True)
    for index, (label, exit, confidence) in enumerate(answers, skip):
        row: dict[str, Any] = {"index": index, "label": label, "exit": int(exit)}
        row["confidence"] = round(float(confidence), 6)
        yield row | ({"name": names[label]} if names and isinstance(label, int) else {})


def write_predictions(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """As CSV, the columns in the order of the rows' keys."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for number, row in enumerate(rows):
        if not number:
            writer.writerow(row)
        cells = (" ".join(map(str, v)) if isinstance(v, list) else v for v in row.values())
        writer.writerow(cells)
    write_file(path, text.getvalue().encode())
