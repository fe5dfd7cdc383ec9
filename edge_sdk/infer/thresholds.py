"""When to stop: thresholds for a wanted accuracy or latency, from held-out data of this device.

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
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.helpers.files import sha256_of, write_struct
from edge_sdk.infer.early_exit import NEVER, EarlyExit, confidences
from edge_sdk.infer.model_folder import MODEL, THRESHOLDS, ExitThresholds, ExportedModel, Measure

# Trained networks are sure of most of what they see, hence the steps that get finer towards 1.
GRID = (
    *(number / 20 for number in range(18)),
    *(number / 100 for number in range(90, 100)),
    *(0.995, 0.998, 0.999, 0.9999, 0.99999, 1.0, NEVER),
)
TIMED_RUNS, WARM_RUNS = 50, 5


@dataclass(frozen=True)
class Point:
    """What one threshold gives: accuracy as a share, mean latency, share of examples per exit."""

    threshold: float
    accuracy: float
    latency_s: float
    shares: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Answers:
    """Every exit's answer to held-out examples: labels and confidences (exits, n); y (n,) true."""

    labels: Ints
    confidences: Floats
    y: Ints

    def accuracies(self) -> list[float]:
        """The accuracy of each exit, if all examples stopped there."""
        return [float((labels == self.y).mean()) for labels in self.labels]


def choose_thresholds(
    folder: str | Path,
    x: npt.NDArray[Any],
    y: npt.NDArray[Any],
    *,
    accuracy: float | None = None,
    accuracy_loss: float | None = None,
    latency_s: float | None = None,
    measure: Measure = "softmax",
    threads: int = 1,
) -> ExitThresholds:
    """Write calibration.json beside the model: the fastest threshold that reaches `accuracy` (a
    share), or that loses at most `accuracy_loss` against the deepest exit; or the most accurate
    one within a mean latency of `latency_s`. Give one of the three.

    x: (n, *input_shape), y: (n,) labels: held-out examples, none that trained the model. Raises
    ConfigError for a wish that nothing fulfils, DataError or ShapeError for wrong data, and what
    EarlyExit.load raises."""
    folder = Path(folder)
    engine = EarlyExit.load(folder, threshold=NEVER, measure=measure, threads=threads)
    answers = answers_of(engine, x, y, [measure])[measure]
    points = curve(answers, exit_seconds(engine, x))
    deepest = answers.accuracies()[-1]
    point, wanted = choose(points, deepest, accuracy, accuracy_loss, latency_s)
    found = ExitThresholds(
        model_sha256=sha256_of((folder / MODEL).read_bytes()),
        measure=measure,
        thresholds=(point.threshold,) * len(engine.thresholds),
        wanted=wanted,
        num_examples=len(y),
        accuracy=point.accuracy,
        deepest_accuracy=deepest,
        latency_s=point.latency_s,
        exit_shares=point.shares,
        threads=threads,
    )
    write_struct(folder / THRESHOLDS, found)
    return found


def choose(
    points: Sequence[Point],
    deepest: float,
    accuracy: float | None,
    accuracy_loss: float | None,
    latency_s: float | None,
) -> tuple[Point, str]:
    """The best point for the one wish that is given, and the wish in words. deepest: accuracy of
    the deepest exit. Raises ConfigError with what is reachable."""
    if sum(wish is not None for wish in (accuracy, accuracy_loss, latency_s)) != 1:
        raise ConfigError("give one of accuracy, accuracy_loss and latency_s")
    if latency_s is not None:
        wanted = f"latency {1e3 * latency_s:g} ms"
        fitting = [point for point in points if point.latency_s <= latency_s]
        best = max(fitting, key=lambda p: (p.accuracy, -p.latency_s, p.threshold), default=None)
    else:
        loss = accuracy_loss or 0.0
        wanted = f"accuracy at most {loss:g} below the deepest exit's {deepest:.4f}"
        if accuracy is not None:
            wanted = f"accuracy {accuracy:g}"
        least = deepest - loss if accuracy is None else accuracy
        fitting = [point for point in points if point.accuracy >= least - 1e-12]
        best = min(fitting, key=lambda p: (p.latency_s, -p.accuracy, -p.threshold), default=None)
    if best is None:
        fastest = min(points, key=lambda point: point.latency_s)
        top = max(points, key=lambda point: (point.accuracy, -point.latency_s))
        raise ConfigError(
            f"{wanted} is not reachable on these examples; the fastest is accuracy "
            f"{fastest.accuracy:.4f} at {1e3 * fastest.latency_s:.3f} ms, the most accurate "
            f"{top.accuracy:.4f} at {1e3 * top.latency_s:.3f} ms"
        )
    return best, wanted


def curve(answers: Answers, exit_s: Sequence[float], grid: Sequence[float] = GRID) -> list[Point]:
    """One point per threshold. exit_s: seconds of one example that stops at exit 1, 2, ..."""
    exits, n = answers.labels.shape
    points = []
    for threshold in grid:
        stops = answers.confidences >= threshold  # (exits, n)
        stops[-1] = True
        at = stops.argmax(0)  # (n,) the first exit that stops it, from 0
        shares = np.bincount(at, minlength=exits) / n
        accuracy = (answers.labels[at, np.arange(n)] == answers.y).mean()
        latency_s = float(shares @ np.array(exit_s))
        points.append(Point(threshold, float(accuracy), latency_s, tuple(shares.tolist())))
    return points


def answers_of(
    engine: EarlyExit, x: npt.NDArray[Any], y: npt.NDArray[Any], measures: Sequence[Measure]
) -> dict[Measure, Answers]:
    """The answers by each measure, from one run of every example through every stage. Raises
    DataError for labels that do not fit."""
    true = checked_labels(x, y, engine.model)
    logits = engine.all_exits(x)  # (exits, n, K)
    labels = logits.argmax(2).astype(np.int64)
    reached = {one: np.stack([confidences(part, one) for part in logits]) for one in measures}
    return {one: Answers(labels, reached[one], true) for one in measures}


def checked_labels(x: npt.NDArray[Any], y: npt.NDArray[Any], model: ExportedModel) -> Ints:
    """The labels y as (n,) int64. Raises DataError for those that do not fit the model."""
    num_classes = model.spec.num_classes
    labels = np.asarray(y)
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
