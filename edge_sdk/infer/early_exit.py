"""Inference with an exported model by onnxruntime, stopping at the first exit that is confident.

    model = EarlyExit.load("model")          # a folder of edge-sdk export; thresholds as chosen
    found = model.predict(x)                 # x (n, *input_shape); found.label, .exit, .confidence

Stages are separate ONNX files, so what stops at exit 1 never runs stage 2. torch is never imported:
tests/test_light.py."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_sdk.data.contract import unlike_integers, unlike_model
from edge_sdk.data.examples import Floats, Ints
from edge_sdk.data.readers.scaling import scaled
from edge_sdk.errors import ConfigError, DataError, ShapeError, StoreError
from edge_sdk.helpers.imports import optional_module
from edge_sdk.helpers.text import one_line
from edge_sdk.infer.model_folder import (
    ExportedModel,
    read_file,
    read_model,
    read_thresholds,
)
from edge_sdk.protocol.fields import Measure
from edge_sdk.tasks.base import check_ids
from edge_sdk.tasks.table import answered_at_once, task_of

log = logging.getLogger(__name__)
NEVER = 2.0  # a threshold above every confidence
# of onnxruntime 1.32: of a learnable scalar before a product it leaves an input that nothing makes
BROKEN = ["MatMulScaleFusion"]
Session: TypeAlias = Any  # onnxruntime.InferenceSession, or what has its `run`


@dataclass(frozen=True, eq=False)
class Prediction:
    """Per example: label (n, ...), the answer as the task's labels are (docs/tasks.md), of classes
    (n,) int64; exit (n,) int64 from 1, confidence (n,) float32 at it."""

    label: Ints | Floats
    exit: Ints
    confidence: Floats


@dataclass(frozen=True, eq=False)
class EarlyExit:
    """A model ready to run. thresholds: one per exit but the last, which always answers; an example
    stops at the first exit whose confidence by `measure` is at least its threshold. So 0 stops all
    at exit 1, NEVER none before the last."""

    model: ExportedModel
    sessions: tuple[Session, ...]  # one per stage
    thresholds: tuple[float, ...]
    measure: Measure
    told: set[str] = field(default_factory=set)  # doubts about inputs, each told once

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        threads: int = 1,
        threshold: float | Sequence[float] | None = None,
        measure: Measure | None = None,
    ) -> EarlyExit:
        """Open a folder of edge-sdk export. threshold: one for all exits or one for each but the
        last; None: as chosen by edge-sdk calibrate, else NEVER. threads: of each stage; each keeps
        its own pool.

        Raises StoreError for a folder that is corrupt, changed or of another version, and
        ConfigError for thresholds that do not fit or if onnxruntime is not installed."""
        folder = Path(folder)
        model = read_model(folder)
        chosen = read_thresholds(folder, model) if threshold is None else None
        if chosen:
            if measure not in (None, chosen.measure):
                raise ConfigError(
                    f"{folder} is calibrated for {chosen.measure}, not for {measure}; give a "
                    "threshold, or calibrate again"
                )
            threshold, measure = chosen.thresholds, chosen.measure
        thresholds = checked_thresholds(NEVER if threshold is None else threshold, model)
        measure = checked_measure(measure, model)
        sessions = tuple(
            open_session(read_file(folder, file), str(folder / file.name), threads)
            for file in model.stages
        )
        check_sessions(model, sessions, folder)
        return cls(model, sessions, thresholds, measure)

    def predict(self, x: npt.NDArray[Any]) -> Prediction:
        """Answer each example at its exit. x: (n, *input_shape) of float32 as in training, of uint8
        where model.json says how integers are scaled, or of int64 token ids. Raises ShapeError for
        another shape or dtype, DataError for NaN or infinite values, StoreError if a stage
        fails."""
        features, spec = self._checked(x), self.model.spec
        task, exit = task_of(spec.task), np.zeros(len(x), np.int64)
        none = task.answers(np.zeros((0, *task.output_shape(spec)), np.float32))
        label = np.zeros((len(x), *none.shape[1:]), none.dtype)
        confidence = np.zeros(len(x), np.float32)
        before: Floats | None = None  # the outputs of the exit before, where the task compares them
        left = np.arange(len(x))  # examples that have not stopped, and their features beside it
        if not len(x):
            return Prediction(label, exit, confidence)
        for number, threshold in enumerate((*self.thresholds, 0.0), 1):
            features, logits = self.step(number, features)
            reached = self.confidences(logits, before)
            before = logits
            stops = reached >= threshold
            if not stops.any():
                continue  # no copies: at batch 1 they take as long as a small stage
            done = left[stops]
            label[done], exit[done] = task.answers(logits[stops]), number
            confidence[done] = reached[stops]
            if len(done) == len(left):
                break
            left, features, before = left[~stops], features[~stops], logits[~stops]
        return Prediction(label, exit, confidence)

    def confidences(
        self, outputs: Floats, before: Floats | None, measure: Measure | None = None
    ) -> Floats:
        """(n,) in 0..1, by this engine's measure or another of the task. before: the outputs of the
        exit before, None at exit 1."""
        model = self.model
        spread = np.array(model.output_spread or (1.0,), np.float32)
        task = task_of(model.spec.task)
        return task.confidence(outputs, measure or self.measure, before, spread)

    def _checked(self, x: npt.NDArray[Any]) -> Floats | Ints:
        """The inputs as stage 1 takes them; a doubt about their scaling is told once."""
        features = checked_inputs(x, self.model)
        if not len(x) or self.model.spec.vocabulary:
            return features
        compare = unlike_integers if x.dtype == np.uint8 else unlike_model
        found = compare(self.model.inputs, float(features.min()), float(features.max()))
        if found and found.is_certain:
            raise DataError(found.text)
        if found and not self.told:
            self.told.add(found.text)
            log.warning("%s", found.text)
        return features

    def step(self, number: int, features: Floats | Ints) -> tuple[Floats | Ints, Floats]:
        """Stage `number`, from 1, on features (n, ...): the next stage's features (for the last
        stage the ones given) and this exit's logits, (n, K) or as the task has them."""
        is_last = number == len(self.sessions)
        names = ["logits"] if is_last else ["features", "logits"]
        try:
            *made, logits = self.sessions[number - 1].run(names, {"input": features})
        except Exception as error:  # onnxruntime's errors have no common base
            step = "export the model again"
            raise StoreError(f"stage {number} failed: {one_line(str(error))}; {step}") from error
        if not np.isfinite(logits).all():
            raise DataError(f"exit {number} gave NaN or infinite logits; are the inputs scaled?")
        return (features if is_last else made[0]), logits

    def all_exits(self, x: npt.NDArray[Any]) -> Floats:
        """Logits of every exit, (exits, n, K) or as the task has them; raises what predict does."""
        spec, start = self.model.spec, 0
        shape = (len(self.sessions), len(x), *task_of(spec.task).output_shape(spec))
        found = np.empty(shape, np.float32)
        for logits in self.batches(x):
            found[:, start : start + logits.shape[1]] = logits
            start += logits.shape[1]
        return found

    def batches(self, x: npt.NDArray[Any]) -> Iterator[Floats]:
        """As `all_exits`, of the first examples, then of the next, and so on: of all texts together
        they may be more than there is memory for."""
        features, count = self._checked(x), answered_at_once(self.model.spec)
        for start in range(0, len(x), count):
            part: Floats | Ints = features[start : start + count]
            made = []
            for number in range(1, len(self.sessions) + 1):
                part, logits = self.step(number, part)
                made.append(logits)
            yield np.stack(made)


def checked_measure(given: Measure | None, model: ExportedModel) -> Measure:
    """Of an exit's confidence; None: the task's first. Raises ConfigError."""
    known = model.metric.measures
    if given not in (None, *known):
        raise ConfigError(f"--measure {given}, expected one of the task's, {', '.join(known)}")
    return given or known[0]


def checked_inputs(x: npt.NDArray[Any], model: ExportedModel) -> Floats | Ints:
    """The inputs as stage 1 takes them. Raises ShapeError, DataError."""
    shape, vocabulary = model.spec.input_shape, model.spec.vocabulary
    expected = f"(n, {', '.join(map(str, shape))}) of {'int64' if vocabulary else 'float32'}"
    if not isinstance(x, np.ndarray) or x.shape[1:] != shape or x.ndim != len(shape) + 1:
        got = f"shape {x.shape}" if isinstance(x, np.ndarray) else type(x).__name__
        raise ShapeError(f"inputs are {got}, expected {expected}; a single one is x[None]")
    if vocabulary and x.dtype.kind in "iu":
        ids = x.astype(np.int64)
        check_ids(ids, vocabulary, "inputs")
        return ids
    if x.dtype == np.uint8 and model.scaling:
        return scaled(x, *model.scaling)
    if x.dtype != np.float32 or vocabulary:
        wanted = f"{expected}, or uint8" if model.scaling else expected
        step = "give token ids" if vocabulary else "scale them as the training data were"
        raise ShapeError(f"inputs are {x.dtype}, expected {wanted}; {step}")
    # Two numbers tell of all: this is the way of every single example on a device.
    if x.size and not (math.isfinite(x.min()) and math.isfinite(x.max())):
        is_bad = ~np.isfinite(x).all(axis=tuple(range(1, x.ndim)))  # (n,)
        raise DataError(
            f"inputs hold NaN or infinite values in {is_bad.sum()} of {len(x)} examples, first at "
            f"{is_bad.argmax()}; remove or repair them"
        )
    return x


def checked_thresholds(given: float | Sequence[float], model: ExportedModel) -> tuple[float, ...]:
    """The thresholds, one for each exit but the last. Raises ConfigError."""
    wanted = model.spec.exit - 1
    values = [float(given)] * wanted if isinstance(given, int | float) else [*map(float, given)]
    if len(values) != wanted:
        limit = f"expected {wanted}: one for each but the last"
        raise ConfigError(f"{len(values)} thresholds for {model.spec.exit} exits, {limit}")
    if not all(value >= 0 for value in values):  # refuses NaN too
        raise ConfigError(f"thresholds {values}, expected numbers of at least 0")
    return tuple(values)


def open_session(content: bytes, where: str, threads: int = 1) -> Session:
    """onnxruntime's session for a stage. Raises ConfigError without it, StoreError if it fails."""
    if threads < 1:
        raise ConfigError(f"{threads} threads, expected at least 1")
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what is fatal; errors are raised
    try:
        return runtime.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], disabled_optimizers=BROKEN
        )
    except Exception as error:  # onnxruntime's errors have no common base
        step = "export the model again"
        raise StoreError(f"{where} cannot be loaded: {one_line(str(error))}; {step}") from error


def onnx_runtime() -> Any:
    """The package onnxruntime. From 1.29 on it reports its use to its maker unless this variable is
    set before it is imported: data about a device leave it only where its owner sets it to 0.
    Raises ConfigError if it is not installed."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    return optional_module("onnxruntime", "inference", "infer")


def check_sessions(model: ExportedModel, sessions: Sequence[Session], folder: Path) -> None:
    """Raise StoreError unless the stages take and give what model.json says."""
    spec = model.spec
    features: Sequence[int | str | None] = spec.input_shape
    for number, session in enumerate(sessions, 1):
        inputs = {value.name: value.shape[1:] for value in session.get_inputs()}
        outputs = {value.name: value.shape[1:] for value in session.get_outputs()}
        is_last = number == len(sessions)
        if (
            set(inputs) != {"input"}
            or set(outputs) != ({"logits"} if is_last else {"features", "logits"})
            or not is_same(inputs["input"], features)
            or not is_same(outputs["logits"], task_of(spec.task).output_shape(spec))
        ):
            raise StoreError(
                f"{folder / model.stages[number - 1].name} takes {inputs} and gives {outputs}, "
                f"which is not stage {number} of its model.json; export the model again"
            )
        features = outputs.get("features", [])


def is_same(got: Sequence[int | str | None], wanted: Sequence[int | str | None]) -> bool:
    """Whether two shapes fit; a size that the graph leaves open is no number."""
    return len(got) == len(wanted) and all(
        a == b or not (isinstance(a, int) and isinstance(b, int))
        for a, b in zip(got, wanted, strict=True)
    )
