"""The metric against latency of an exported model on this device, as CSV, Markdown and a plot."""

from __future__ import annotations

import csv
import io
import logging
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.files import make_folder, write_file
from edge_sdk.infer.early_exit import NEVER, EarlyExit
from edge_sdk.infer.thresholds import Point, answers_of, curve, exit_seconds
from edge_sdk.protocol.fields import Measure
from edge_sdk.tasks.metrics import Metric

log = logging.getLogger(__name__)
EXPLAINED = (
    "Each example stops at the first exit whose confidence reaches the threshold. Latency: the "
    "median seconds here, at batch 1, of an example that stops at each exit; mean of all examples."
)


def write_report(
    engine: EarlyExit, x: npt.NDArray[Any], y: npt.NDArray[Any], folder: Path, about: str
) -> list[Path]:
    """Write curve.csv, curve.md and, where matplotlib is installed, curve.png into `folder`.

    x: (n, *input_shape), y: labels as the task has them; about: what they are, for the heading.
    Raises StoreError where the folder cannot be written, and what EarlyExit.predict and
    choose_thresholds raise."""
    make_folder(folder, "--out")
    metric = engine.model.metric
    answers = answers_of(engine, x, y, metric.measures)
    exit_s = exit_seconds(engine, x)
    curves = {measure: curve(answers[measure], exit_s) for measure in metric.measures}
    alone = list(zip(answers[metric.measures[0]].metrics(), exit_s, strict=True))
    contents = {
        "curve.csv": csv_of(curves, metric).encode(),
        "curve.md": markdown(engine, curves, alone, about).encode(),
    }
    try:
        contents["curve.png"] = plot(curves, alone, metric)
    except ConfigError as error:
        log.warning("no curve.png: %s", error)
    for name, content in contents.items():
        write_file(folder / name, content)
    return [folder / name for name in contents]


def csv_of(curves: Mapping[Measure, Sequence[Point]], metric: Metric) -> str:
    """One line per measure and threshold; "never" stops nothing before the last exit."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    num_exits = len(next(iter(curves.values()))[0].shares)
    exits = [f"share_exit_{number}" for number in range(1, num_exits + 1)]
    writer.writerow(["measure", "threshold", metric.key, "latency_ms", *exits])
    for measure, points in curves.items():
        for p in points:
            shares = [f"{share:.4f}" for share in p.shares]
            latency = f"{1e3 * p.latency_s:.4f}"
            writer.writerow([measure, _name(p), f"{p.metric:.4f}", latency, *shares])
    return text.getvalue()


def markdown(
    engine: EarlyExit,
    curves: Mapping[Measure, Sequence[Point]],
    alone: Sequence[tuple[float, float]],
    about: str,
) -> str:
    spec, metric = engine.model.spec, engine.model.metric
    title = metric.name[0].upper() + metric.name[1:]
    lines = [
        f"# {title} and latency: {spec.family}, {spec.exit} exits, on {about}",
        "",
        f"{EXPLAINED} Machine: {platform.machine()}.",
        "",
        f"| exit, all stop there | {metric.head} | latency ms |",
        "| --- | --- | --- |",
    ]
    for number, (value, latency_s) in enumerate(alone, 1):
        lines.append(f"| {number} | {metric.shown(value, 2)} | {1e3 * latency_s:.3f} |")
    heads = " | ".join(f"exit {number} %" for number in range(1, spec.exit + 1))
    for measure, points in curves.items():
        lines += ["", f"## {measure}", "", f"| threshold | {metric.head} | latency ms | {heads} |"]
        lines.append("| --- " * (3 + spec.exit) + "|")
        for p in points:
            shares = " | ".join(f"{100 * share:.1f}" for share in p.shares)
            cells = f"{metric.shown(p.metric, 2)} | {1e3 * p.latency_s:.3f} | {shares}"
            lines.append(f"| {_name(p)} | {cells} |")
    return "\n".join(lines) + "\n"


def plot(
    curves: Mapping[Measure, Sequence[Point]],
    alone: Sequence[tuple[float, float]],
    metric: Metric,
) -> bytes:
    """PNG: a line per measure, a cross per exit alone. Raises ConfigError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("matplotlib is not installed; pip install matplotlib") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, factor = figure.subplots(), 100 if metric.is_share else 1
    for measure, points in curves.items():
        latencies = [1e3 * point.latency_s for point in points]
        axes.plot(latencies, [factor * point.metric for point in points], ".-", label=measure)
    for number, (value, latency_s) in enumerate(alone, 1):
        axes.plot(1e3 * latency_s, factor * value, "k+")
        axes.annotate(f"exit {number}", (1e3 * latency_s, factor * value))
    axes.set_xlabel("mean latency, ms")
    axes.set_ylabel(metric.name + ", %" * metric.is_share)
    axes.legend()
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    return image.getvalue()


def _name(point: Point) -> str:
    return "never" if point.threshold == NEVER else f"{point.threshold:g}"
