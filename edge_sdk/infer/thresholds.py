"""When to stop: thresholds for a wanted metric or latency, from held-out data of this device.

Every example goes through all stages once; what each threshold would have done is then counted. The
same threshold holds for all exits. Latency is not assumed: `predict` is timed here at batch 1 for
each exit that an example may stop at."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.data.examples import Floats, Ints
from edge_sdk.errors import ConfigError, DataError, UsageError
from edge_sdk.helpers.files import sha256_of, write_struct
from edge_sdk.infer.early_exit import NEVER, EarlyExit
from edge_sdk.infer.model_folder import MODEL, THRESHOLDS, ExitThresholds, ExportedModel
from edge_sdk.protocol.fields import Measure, Task
from edge_sdk.tasks.base import Sums
from edge_sdk.tasks.metrics import Metric
from edge_sdk.tasks.table import task_of

# Trained networks are sure of most of what they see, hence the steps that get finer towards 1.
GRID = (
    *(number / 20 for number in range(18)),
    *(number / 100 for number in range(90, 100)),
    *(0.995, 0.998, 0.999, 0.9999, 0.99999, 1.0, NEVER),
)
TIMED_RUNS, WARM_RUNS = 50, 5


@dataclass(frozen=True)
class Point:
    """What one threshold gives: the task's metric, mean latency, share of examples per exit."""

    threshold: float
    metric: float
    latency_s: float
    shares: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Answers:
    """Every exit's answers to held-out examples, as what the task counts of each (exits, n, C), and
    confidences (exits, n)."""

    task: Task
    counts: Sums
    confidences: Floats

    def metric_at(self, at: Ints) -> float:
        """The metric where each example stops at that exit, from 0. at: (n,)."""
        sums = self.counts[at, np.arange(len(at))].sum(0)
        return task_of(self.task).figure(sums)

    def metrics(self) -> list[float]:
        """The metric of each exit, if all examples stopped there."""
        return [task_of(self.task).figure(counts.sum(0)) for counts in self.counts]


def choose_thresholds(
    folder: str | Path,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    *,
    metric: float | None = None,
    metric_loss: float | None = None,
    latency_s: float | None = None,
    measure: Measure | None = None,
    threads: int = 1,
) -> ExitThresholds:
    """Write calibration.json beside the model: the fastest threshold that reaches `metric`, of the
    model's task, an accuracy or F1 as a share, or that loses at most `metric_loss` against the
    deepest exit; or the best one within a mean latency of `latency_s`. Give one of the three.

    x: (n, *input_shape), y: labels as the task has them: held-out examples, none that trained the
    model. Raises ConfigError for a wish that nothing fulfils, DataError or ShapeError for wrong
    data, and what EarlyExit.load raises."""
    folder = Path(folder)
    engine = EarlyExit.load(folder, threshold=NEVER, measure=measure, threads=threads)
    name, wished = engine.model.metric.name, metric or metric_loss or 0.0
    if engine.model.metric.is_share and wished > 1:
        raise UsageError(f"{name} {wished:g}, expected a share from 0 to 1")
    answers = answers_of(engine, x, y, [engine.measure])[engine.measure]
    points = curve(answers, exit_seconds(engine, x))
    deepest = answers.metrics()[-1]
    point, wanted = choose(points, deepest, engine.model.metric, metric, metric_loss, latency_s)
    found = ExitThresholds(
        model_sha256=sha256_of((folder / MODEL).read_bytes()),
        measure=engine.measure,
        thresholds=(point.threshold,) * len(engine.thresholds),
        wanted=wanted,
        num_examples=len(y),
        metric=point.metric,
        deepest_metric=deepest,
        latency_s=point.latency_s,
        exit_shares=point.shares,
        threads=threads,
    )
    write_struct(folder / THRESHOLDS, found)
    return found


def choose(
    points: Sequence[Point],
    deepest: float,
    of: Metric,
    metric: float | None,
    metric_loss: float | None,
    latency_s: float | None,
) -> tuple[Point, str]:
    """The best point for the one wish that is given, and the wish in words. deepest: the metric of
    the deepest exit. Raises ConfigError with what is reachable."""
    if sum(wish is not None for wish in (metric, metric_loss, latency_s)) != 1:
        raise ConfigError("give one of metric, metric_loss and latency_s")

    def worse(point: Point) -> float:
        return of.worse_by(point.metric, 0.0)

    if latency_s is not None:
        wanted = f"latency {1e3 * latency_s:g} ms"
        fitting = [point for point in points if point.latency_s <= latency_s]
        best = min(fitting, key=lambda p: (worse(p), p.latency_s, -p.threshold), default=None)
    else:
        loss = metric_loss or 0.0
        side = "above" if of.is_lower_better else "below"
        wanted = f"{of.name} at most {loss:g} {side} the deepest exit's {deepest:.4f}"
        if metric is not None:
            wanted = f"{of.name} {metric:g}"
        reference = deepest if metric is None else metric
        fitting = [p for p in points if of.worse_by(p.metric, reference) <= loss + 1e-12]
        best = min(fitting, key=lambda p: (p.latency_s, worse(p), -p.threshold), default=None)
    if best is None:
        fastest = min(points, key=lambda point: point.latency_s)
        top = min(points, key=lambda point: (worse(point), point.latency_s))
        raise ConfigError(
            f"{wanted} is not reachable on these examples; the fastest is {of.name} "
            f"{fastest.metric:.4f} at {1e3 * fastest.latency_s:.3f} ms, the best "
            f"{top.metric:.4f} at {1e3 * top.latency_s:.3f} ms"
        )
    return best, wanted


def curve(answers: Answers, exit_s: Sequence[float], grid: Sequence[float] = GRID) -> list[Point]:
    """One point per threshold. exit_s: seconds of one example that stops at exit 1, 2, ..."""
    exits, n = answers.confidences.shape
    points = []
    for threshold in grid:
        stops = answers.confidences >= threshold  # (exits, n)
        stops[-1] = True
        at = stops.argmax(0)  # (n,) the first exit that stops it, from 0
        shares = np.bincount(at, minlength=exits) / n
        latency_s = float(shares @ np.array(exit_s))
        points.append(Point(threshold, answers.metric_at(at), latency_s, tuple(shares.tolist())))
    return points


def answers_of(
    engine: EarlyExit, x: npt.NDArray[Any], y: npt.NDArray[Any], measures: Sequence[Measure]
) -> dict[Measure, Answers]:
    """The answers by each measure, from one run of every example through every stage. Raises
    DataError for labels that do not fit."""
    true = checked_labels(x, y, engine.model)
    name = engine.model.spec.task
    task, start = task_of(name), 0
    counts: list[npt.NDArray[Any]] = []  # of each batch (exits, n, C)
    reached: dict[Measure, list[npt.NDArray[Any]]] = {one: [] for one in measures}  # (exits, n)
    for logits in engine.batches(x):  # (exits, n, K)
        labels = true[start : start + logits.shape[1]]
        start += len(labels)
        counts.append(np.stack([task.counts(task.answers(part), labels) for part in logits]))
        pairs = list(zip(logits, [None, *logits[:-1]], strict=True))
        for one in measures:
            reached[one].append(np.stack([engine.confidences(*pair, one) for pair in pairs]))
    whole = np.concatenate(counts, 1)
    return {one: Answers(name, whole, np.concatenate(reached[one], 1)) for one in measures}


def checked_labels(
    x: npt.NDArray[Any], y: npt.NDArray[Any], model: ExportedModel
) -> npt.NDArray[Any]:
    """The labels y as the model's task has them, of classes (n,) int64. Raises DataError for those
    that do not fit the model."""
    num_classes, task = model.spec.num_classes, task_of(model.spec.task)
    labels = np.asarray(y)
    if model.spec.task != "classify":
        labels = task.labels(labels, model.class_names, "labels")
        task.check_labels(labels, x, num_classes, "labels")
        return labels
    if labels.shape != x.shape[:1] or labels.dtype.kind not in "iu" or not len(labels):
        raise DataError(
            f"labels are {labels.shape} of {labels.dtype} for {len(x)} examples, expected one "
            "integer each and at least one"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        raise DataError(
            f"labels from {labels.min()} to {labels.max()}, the model knows 0 to {num_classes - 1}"
        )
    return labels.astype(np.int64)


def exit_seconds(
    engine: EarlyExit, x: npt.NDArray[Any], runs: int = TIMED_RUNS
) -> tuple[float, ...]:
    """Median seconds of `predict` for one example here, if it stops at exit 1, 2, ..."""
    last = len(engine.sessions)
    stopping = [
        replace(engine, thresholds=(*[NEVER] * (exit - 1), *[0.0] * (last - exit)))
        for exit in range(1, last + 1)
    ]
    times: list[list[float]] = [[] for _ in stopping]
    for number in range(WARM_RUNS + runs):
        at = number % len(x)
        for one, taken in zip(stopping, times, strict=True):
            start = time.perf_counter()
            one.predict(x[at : at + 1])
            taken.append(time.perf_counter() - start)
    return tuple(statistics.median(taken[WARM_RUNS:]) for taken in times)
