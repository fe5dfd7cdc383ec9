"""What an inference process takes with onnxruntime and with torch: memory, start-up, latency.

    python -m tools.bench_infer --data path/to/fashion-mnist [--model vgg] [--csv FILE]

A model is trained here for a few epochs, exported, and calibrated on one half of the test part to
lose at most 1 % against the deepest exit. The other half is then predicted one by one by fresh
processes, in turn, each with the same inputs, thresholds and number of threads; a figure is the
median of the runs. Seconds count from just before the process is started to its first prediction;
memory is the process's own peak (VmHWM) at its end. The process `numpy only` reads the inputs and
stops: what Python itself takes.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

LOSS = 0.01
WEIGHTS, MODEL, INPUTS = "model.safetensors", "model", "x.npy"
Answer = tuple[int, int]  # label, exit
Predict = Callable[[Any], Answer]  # of x (1, *input_shape)


# -- in the measured process: imports nothing that its kind does not need ----------------------


def onnx_early(folder: Path, threads: int, threshold: float | None = None) -> Predict:
    from edge_sdk.infer import EarlyExit

    engine = EarlyExit.load(folder / MODEL, threads=threads, threshold=threshold)

    def predict(x: Any) -> Answer:
        found = engine.predict(x)
        return int(found.label[0]), int(found.exit[0])

    return predict


def onnx_deepest(folder: Path, threads: int) -> Predict:
    return onnx_early(folder, threads, 2.0)


def onnx_whole(folder: Path, threads: int) -> Predict:
    from edge_sdk.exported import read_file, read_model
    from edge_sdk.infer import open_session

    model = read_model(folder / MODEL)
    session = open_session(read_file(folder / MODEL, model.whole), "whole", threads)

    def predict(x: Any) -> Answer:
        logits = session.run(None, {"input": x})[-1]
        return int(logits[0].argmax()), model.spec.exit

    return predict


def torch_early(folder: Path, threads: int) -> Predict:
    thresholds = json.loads((folder / MODEL / "calibration.json").read_text())["thresholds"]
    return _torch(folder, threads, thresholds)


def torch_whole(folder: Path, threads: int) -> Predict:
    return _torch(folder, threads, [])


def _torch(folder: Path, threads: int, thresholds: Sequence[float]) -> Predict:
    """Stage by stage with thresholds, all exits without."""
    import torch

    from edge_sdk.export import read_weights
    from edge_sdk.models import build

    torch.set_num_threads(threads)
    spec, tensors = read_weights(folder / WEIGHTS)
    model = build(spec)
    model.load(tensors)
    model.eval()

    @torch.inference_mode()
    def predict(x: Any) -> Answer:
        features = torch.from_numpy(x)
        if not thresholds:
            return int(model(features)[-1].argmax()), spec.exit
        for exit, limit in enumerate([*thresholds, 0.0], 1):
            features = model.stages[exit - 1](features)
            probabilities = model.exits[exit - 1](features).softmax(1)
            if float(probabilities.max()) >= limit:
                break
        return int(probabilities.argmax()), exit

    return predict


def nothing(folder: Path, threads: int) -> Predict:
    return lambda x: (0, 0)


KINDS: dict[str, Callable[[Path, int], Predict]] = {
    "numpy only": nothing,
    "onnxruntime, early exit": onnx_early,
    "onnxruntime, stages to the deepest exit": onnx_deepest,
    "onnxruntime, whole model": onnx_whole,
    "torch, early exit": torch_early,
    "torch, whole model": torch_whole,
}


def measured(kind: str, folder: Path, threads: int, begun: float) -> dict[str, Any]:
    """The child: predict every input one by one."""
    x = np.load(folder / INPUTS)
    predict = KINDS[kind](folder, threads)
    predict(x[:1])
    first_s = time.monotonic() - begun
    answers, times_s = [], []
    for number in range(len(x)):
        start = time.perf_counter()
        answers.append(predict(x[number : number + 1]))
        times_s.append(time.perf_counter() - start)
    return {
        "first_s": first_s,
        "peak_mb": peak_bytes() / 1e6,
        "mean_ms": 1e3 * statistics.mean(times_s),
        "median_ms": 1e3 * statistics.median(times_s),
        "answers": answers,
    }


def peak_bytes() -> int:
    """Of this process since it began its program; ru_maxrss would count what forked it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no VmHWM in /proc/self/status; this benchmark needs Linux")


# -- around it ---------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", help="a data source with a test part")
    add("--model", default="cnn", help="family, three exits")
    add("--examples", type=int, default=6000, help="to train with")
    add("--epochs", type=int, default=3)
    add("--predictions", type=int, default=1000, help="and as many for calibration")
    add("--runs", type=int, default=5, help="processes of each kind")
    add("--threads", type=int, default=1)
    add("--csv", type=Path)
    add("--child", nargs=3, metavar=("KIND", "FOLDER", "BEGUN"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, folder, begun = args.child
        print(json.dumps(measured(kind, Path(folder), args.threads, float(begun))))
        return 0
    if not args.data:
        parser.error("give --data")
    with tempfile.TemporaryDirectory() as name:
        y, about = prepare(Path(name), args)
        found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for _ in range(args.runs):
            for kind in KINDS:
                found[kind].append(in_child(kind, Path(name), args.threads))
    rows = [row(kind, runs, y) for kind, runs in found.items()]
    print(about)
    for cells in rows:
        print("  ".join(f"{key} {value}" for key, value in cells.items()))
    if args.csv:
        write_csv(args.csv, rows, args, about)
    return 0


def prepare(folder: Path, args: argparse.Namespace) -> tuple[Any, str]:
    """Train, export and calibrate. Returns the labels of the inputs written, and what was made."""
    import msgspec
    import torch
    from safetensors.torch import save_file

    from edge_sdk.calibrate import calibrate
    from edge_sdk.data import load_dataset
    from edge_sdk.export import export
    from edge_sdk.models import initial_tensors
    from edge_sdk.trainer import train
    from edge_sdk.wire import ModelSpec, Plan, Segment

    torch.set_num_threads(args.threads)
    count = args.predictions
    data = load_dataset(args.data, 0, args.examples, 2 * count)
    spec = ModelSpec(
        family=args.model,
        input_shape=data.train.input_shape,
        num_classes=data.train.num_classes,
        exit=3,
    )
    plan = Plan(segments=(Segment(first=1, last=3),), epochs=args.epochs)
    tensors = train(spec, plan, initial_tensors(spec, 0), data.train).tensors
    save_file(tensors, folder / WEIGHTS, {"spec": msgspec.json.encode(spec).decode()})
    export(spec, tensors, folder / MODEL, examples=data.test)
    order = np.random.default_rng(0).permutation(len(data.test))
    held, tried = data.test.take(order[:count]), data.test.take(order[count:])
    done = calibrate(folder / MODEL, held.x, held.y, accuracy_loss=LOSS, threads=args.threads)
    np.save(folder / INPUTS, tried.x)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return tried.y, (
        f"{args.model}, {parameters} parameters, {args.epochs} epochs of {len(data.train)} "
        f"examples of {data.name}; threshold {done.thresholds[0]:g}; {len(tried)} predictions"
    )


def in_child(kind: str, folder: Path, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.bench_infer", "--threads", str(threads), "--child"]
    command += [kind, str(folder), repr(time.monotonic())]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{kind} failed: {ended.stderr.strip()}")
    result: dict[str, Any] = json.loads(ended.stdout)
    return result


def row(kind: str, runs: Sequence[dict[str, Any]], y: Any) -> dict[str, object]:
    """Medians over the processes; answers are the same in each."""
    labels, exits = np.array(runs[0]["answers"]).T
    middle = {
        key: statistics.median(run[key] for run in runs) for key in runs[0] if key != "answers"
    }
    is_model = kind != "numpy only"
    return {
        "process": kind,
        "first_prediction_s": f"{middle['first_s']:.2f}",
        "peak_rss_mb": f"{middle['peak_mb']:.0f}",
        "latency_mean_ms": f"{middle['mean_ms']:.3f}" if is_model else "",
        "latency_median_ms": f"{middle['median_ms']:.3f}" if is_model else "",
        "accuracy": f"{(labels == y).mean():.4f}" if is_model else "",
        **{
            f"share_exit_{exit}": f"{(exits == exit).mean():.3f}" if is_model else ""
            for exit in (1, 2, 3)
        },
    }


def write_csv(
    path: Path, rows: Sequence[dict[str, object]], args: argparse.Namespace, about: str
) -> None:
    from tools.experiments import git, machine

    commit, threads = git("rev-parse", "--short", "HEAD"), args.threads
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.write(
            f"# python -m tools.bench_infer --model {args.model}; commit {commit}; {machine()}, "
            f"{threads} thread(s); median of {args.runs} processes; {about}\n"
        )
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
