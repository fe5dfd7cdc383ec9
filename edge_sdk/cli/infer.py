"""`edge-sdk export`, `infer`, `calibrate` and `infer-report`: use what was trained."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from edge_sdk.cli.flags import add_command
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.helpers.files import write_file
from edge_sdk.helpers.imports import import_module, require_torch
from edge_sdk.helpers.interrupts import ends_by_interrupt
from edge_sdk.infer.model_folder import Measure, described, read_model

if TYPE_CHECKING:  # numpy, which the agent does without
    import numpy.typing as npt

    from edge_sdk.infer.early_exit import EarlyExit, Prediction


def add_export_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        "a trained model, or its first exits, as ONNX",
        "edge-sdk export runs/first/model.safetensors --out model --exit 2",
    )
    add = parser.add_argument
    add(
        "source", type=Path, help="model.safetensors of a run folder, or an exported model's folder"
    )
    add("--out", type=Path, required=True, help="folder to write")
    add("--exit", type=int, help="deepest exit to keep, default all")
    add("--data", help="real examples to check it on, default random inputs; not for a folder")
    add("--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="Python module that registers your model families")  # fmt: skip
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    require_torch("edge-sdk export")
    for module in args.imports:
        import_module(module)
    from edge_sdk.infer.export import cut, export, prefix, read_weights

    if os.path.isdir(args.source):  # Path.is_dir raises on what cannot be looked at
        if args.exit is None:
            raise ConfigError(f"{args.source} is exported already; give --exit to cut it")
        model = cut(args.source, args.exit, args.out)
    else:
        from edge_sdk.data.loading import load_test

        examples = load_test(args.data) if args.data else None
        spec, tensors = prefix(*read_weights(args.source), args.exit)
        model = export(spec, tensors, args.out, examples=examples)
    print(described(model, args.out))
    return 0


def add_infer_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "infer",
        "run an exported model, stopping early",
        "edge-sdk infer model --data my-data.npz",
    )
    add_model_arguments(parser)
    add_threshold_arguments(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.csv", help="label, exit, confidence each")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run_infer)


def add_calibrate_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "calibrate",
        "choose an exported model's thresholds on held-out data",
        "edge-sdk calibrate model --data my-data.npz --accuracy-loss 0.01",
    )
    add_model_arguments(parser)
    wish = parser.add_mutually_exclusive_group(required=True)
    wish.add_argument("--accuracy", type=float, metavar="SHARE", help="at least, e.g. 0.85")
    wish.add_argument("--accuracy-loss", type=float, metavar="SHARE",
                      help="at most so much below the deepest exit, e.g. 0.01")  # fmt: skip
    wish.add_argument("--latency-ms", type=float, metavar="MS", help="mean of an example, at most")
    parser.add_argument("--measure", choices=get_args(Measure), default="softmax",
                        help="of an exit's confidence")  # fmt: skip
    parser.set_defaults(run=run_calibrate)


def add_infer_report_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "infer-report",
        "accuracy against latency per threshold, as table and plot",
        "edge-sdk infer-report model --data my-data.npz --out report",
    )
    add_model_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of curve.csv, .md, .png")
    parser.set_defaults(run=run_infer_report)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", type=Path, help="folder of an exported model")
    add("--data", required=True, help="as for run; its test part, or all; or inputs FILE.npy")
    add("--limit", type=int, metavar="N", help="at most N examples")
    add("--skip", type=int, default=0, metavar="N", help="leave out the first N")
    add("--threads", type=int, default=1, help="of onnxruntime")


def add_threshold_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threshold", type=float, help="for all exits, default as calibrated")
    parser.add_argument("--measure", choices=get_args(Measure), help="default as calibrated")


def import_runtime() -> None:
    """Before all else, as it is what takes long. Raises ConfigError."""
    with ends_by_interrupt():
        from edge_sdk.infer.early_exit import onnx_runtime

        onnx_runtime()


def run_infer(args: argparse.Namespace) -> int:
    """One example at a time, as a device meets them, so the latencies are real ones."""
    import_runtime()
    from edge_sdk.infer.early_exit import EarlyExit
    from edge_sdk.infer.thresholds import checked_labels

    x, y = read_inputs(args)
    engine = EarlyExit.load(
        args.model, threads=args.threads, threshold=args.threshold, measure=args.measure
    )
    if y is not None:
        y = checked_labels(x, y, engine.model)
    found, times_s = predict_each(engine, x)
    if args.out:
        write_predictions(found, args.out)
    result = summary(engine, found, times_s, y)
    if args.json:
        print(json.dumps(result, indent=2))
        return 0
    print(told(engine, result))
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
    """For --json. latency: of one example, batch 1."""
    num_exits = engine.model.spec.exit
    return {
        "examples": len(found.label),
        "measure": engine.measure,
        "thresholds": list(engine.thresholds),
        "accuracy": None if y is None else float((found.label == y).mean()),
        "exit_shares": [float((found.exit == e).mean()) for e in range(1, num_exits + 1)],
        "latency_mean_s": statistics.mean(times_s),
        "latency_median_s": statistics.median(times_s),
        "latency_max_s": max(times_s),
    }


def told(engine: EarlyExit, result: dict[str, Any]) -> str:
    """The same for people."""
    from edge_sdk.infer.early_exit import NEVER

    spec = engine.model.spec
    thresholds = ", ".join(f"{value:g}" for value in engine.thresholds)
    when = f"where {engine.measure} is at least {thresholds}"
    if min(engine.thresholds, default=NEVER) >= NEVER:
        when = "at the last exit only; edge-sdk calibrate, or give --threshold"
    shares = ", ".join(
        f"exit {number} {100 * share:.1f} %"
        for number, share in enumerate(result["exit_shares"], 1)
    )
    lines = [
        f"model    {spec.family}, {spec.num_classes} classes, {spec.exit} exits",
        f"stops    {when}",
        f"examples {result['examples']}: {shares}",
        f"latency  mean {1e3 * result['latency_mean_s']:.3f} ms, median "
        f"{1e3 * result['latency_median_s']:.3f}, max {1e3 * result['latency_max_s']:.3f}; batch 1",
    ]
    if result["accuracy"] is not None:
        lines.append(f"accuracy {100 * result['accuracy']:.2f} %")
    return "\n".join(lines)


def write_predictions(found: Prediction, path: Path) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["label", "exit", "confidence"])
    for label, exit, confidence in zip(found.label, found.exit, found.confidence, strict=True):
        writer.writerow([label, exit, f"{confidence:.6f}"])
    write_file(path, text.getvalue().encode())


def run_calibrate(args: argparse.Namespace) -> int:
    import_runtime()
    from edge_sdk.infer.thresholds import choose_thresholds

    x, y = read_labelled(args)
    found = choose_thresholds(
        args.model, x, y,
        accuracy=args.accuracy,
        accuracy_loss=args.accuracy_loss,
        latency_s=None if args.latency_ms is None else args.latency_ms / 1e3,
        measure=args.measure,
        threads=args.threads,
    )  # fmt: skip
    shares = ", ".join(f"{100 * share:.1f}" for share in found.exit_shares)
    thresholds = ", ".join(f"{value:g}" for value in found.thresholds) or "anything"
    print(
        f"{found.wanted}: stop where {found.measure} is at least {thresholds}; on "
        f"{found.num_examples} held-out examples accuracy {100 * found.accuracy:.2f} % (deepest "
        f"exit {100 * found.deepest_accuracy:.2f} %), latency {1e3 * found.latency_s:.3f} ms, "
        f"per exit {shares} %"
    )
    return 0


def run_infer_report(args: argparse.Namespace) -> int:
    import_runtime()
    from edge_sdk.infer.early_exit import NEVER, EarlyExit
    from edge_sdk.infer.report import write_report

    x, y = read_labelled(args)
    engine = EarlyExit.load(args.model, threads=args.threads, threshold=NEVER)
    about = f"{len(x)} examples of {args.data}"
    for path in write_report(engine, x, y, args.out, about):
        print(path)
    return 0


def read_labelled(args: argparse.Namespace) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    x, y = read_inputs(args)
    if y is None:
        raise DataError(f"{args.data} has no labels, which this needs; give an .npz with x and y")
    return x, y


def read_inputs(args: argparse.Namespace) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Inputs (n, *input_shape), n at least 1, and labels (n,), None for an .npy file."""
    if args.skip < 0 or (args.limit is not None and args.limit < 1):
        raise ConfigError(f"--skip {args.skip} --limit {args.limit}, expected at least 0 and 1")
    part = slice(args.skip, None if args.limit is None else args.skip + args.limit)
    y: npt.NDArray[Any] | None = None
    if str(args.data).endswith(".npy"):
        x = read_npy(Path(args.data))[part]
    else:
        from edge_sdk.data.loading import load_test

        examples, own = load_test(args.data), read_model(args.model).scaling
        if examples.scaling and own and examples.scaling != own:
            raise DataError(
                f"{args.data} becomes x / {examples.scaling[0]:g} - {examples.scaling[1]:g}, the "
                f"model was trained on x / {own[0]:g} - {own[1]:g}; give it as .npy"
            )
        x, y = examples.x[part], examples.y[part]
    if not len(x):
        raise DataError(f"{args.data}: no examples are left after --skip {args.skip}")
    return x, y


def read_npy(path: Path) -> npt.NDArray[Any]:
    """An array of numbers; nothing is ever unpickled. Raises DataError."""
    import numpy as np

    from edge_sdk.data.examples import bad, mapped
    from edge_sdk.data.readers.arrays import NPY, check_begin

    expected = "an .npy file with inputs (n, *input_shape)"
    with mapped(path, expected), path.open("rb") as file:
        check_begin(path, file, NPY, expected)
        x: npt.NDArray[Any] = np.load(file, allow_pickle=False)
        if not x.ndim:
            raise bad(path, "no array", expected)
    return x
