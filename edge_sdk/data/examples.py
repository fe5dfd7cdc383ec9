"""Labelled examples in memory, and what is checked of them. All numpy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edge_sdk.data.contract import AXES, LAYOUTS, MOST_INPUT, TrainedOn, scaling_of
from edge_sdk.data.contract import bad as bad  # every reader's
from edge_sdk.errors import DataError, EdgeError
from edge_sdk.protocol.fields import MAX_OUTPUTS, Task
from edge_sdk.protocol.messages import InputScaling
from edge_sdk.tasks.base import check_ids
from edge_sdk.tasks.metrics import METRICS
from edge_sdk.tasks.table import task_of

Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]
Scaling: TypeAlias = tuple[float, float]
# BatchNorm statistics of one or two examples ruin a deep stage; such a rest is dropped.
MIN_BATCH = 3


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and labels: x (n, C, H, W), (n, C, window) or (n, F) float32, or with a vocabulary
    (n, T) int64 of token ids below it; y as the task has it (tasks/), of class labels (n,) int64 in
    0..num_classes - 1; subject (n,) int64 or None: who was measured. scaling (divisor, offset): x
    was made of integers as integer / divisor - offset; None: of floats, or it is not known.
    num_classes: K, outputs that a model of such data has; class_names: of each of them, or none.
    made_of: what the inputs are, as `InputScaling` says."""

    x: Floats | Ints
    y: Floats | Ints
    num_classes: int
    subject: Ints | None = None
    scaling: Scaling | None = None
    class_names: tuple[str, ...] = ()
    made_of: str = ""
    task: Task = "classify"
    vocabulary: int = 0

    def __len__(self) -> int:
        return len(self.y)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, (C, H, W), (C, window), (F,) or (T,)."""
        return self.x.shape[1:]

    @property
    def trained_on(self) -> TrainedOn:
        """What is to go with a model that is trained for such examples."""
        return TrainedOn(scaling=self.input_scaling, class_names=self.class_names)

    @property
    def input_scaling(self) -> InputScaling:
        """How x came to be, and its smallest and largest number; of token ids those that may be."""
        low, high = float(self.x.min()), float(self.x.max())
        if self.vocabulary:
            low, high = 0.0, self.vocabulary - 1.0
        return scaling_of(low, high, self.scaling, self.made_of)

    def take(self, indices: Ints) -> Examples:
        """The examples at `indices`, in that order, as copies."""
        subject = None if self.subject is None else self.subject[indices]
        return replace(self, x=self.x[indices], y=self.y[indices], subject=subject)

    @property
    def strata(self) -> Ints:
        """(n,) what parts of the examples are drawn by, so that each has some of each class."""
        return task_of(self.task).strata(self.y)

    def label_counts(self) -> Ints:
        """Of the task classify: examples per class, (num_classes,). Zeros are legitimate: clients
        may be skewed."""
        return np.bincount(self.y, minlength=self.num_classes).astype(np.int64)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A named data set with its test part; both have the same input_shape and num_classes."""

    name: str
    train: Examples
    test: Examples


def check_examples(examples: Examples, where: str) -> Examples:
    """The same examples, if they are as `Examples` promises; else DataError naming `where`.

    Checks shapes, dtypes, lengths, label range, finite values. A single class is no error."""
    x, y, num_classes = examples.x, examples.y, examples.num_classes
    if examples.vocabulary:
        check_ids(x, examples.vocabulary, where)
    elif x.ndim not in AXES or x.dtype != np.float32:
        wanted = f"{', '.join(LAYOUTS.values())} of float32"
        raise bad(where, f"x of shape {x.shape}, {x.dtype}", wanted)
    if 0 in x.shape:
        raise bad(where, f"empty data, x of shape {x.shape}", "at least one example")
    subject, words = examples.subject, METRICS[examples.task].outputs
    if subject is not None and (subject.shape != x.shape[:1] or subject.dtype != np.int64):
        wanted = f"{x.shape[:1]} of int64, one for each example in x"
        raise bad(where, f"subject of shape {subject.shape}, {subject.dtype}", wanted)
    if not 1 <= num_classes <= MAX_OUTPUTS:
        raise bad(where, f"{num_classes} {words}", f"1 to {MAX_OUTPUTS}")
    task_of(examples.task).check_labels(y, x, num_classes, where)
    if examples.class_names and len(examples.class_names) != num_classes:
        got = f"{len(examples.class_names)} class_names for {num_classes} {words}"
        raise bad(where, got, "one for each class")
    if examples.vocabulary:
        return examples
    is_bad = ~np.isfinite(x).all(axis=tuple(range(1, x.ndim)))  # (n,)
    if is_bad.any():
        got = f"NaN or infinite values in {is_bad.sum()} examples, first at {is_bad.argmax()}"
        raise bad(where, got, "finite numbers", "remove or repair these examples")
    low, high = float(x.min()), float(x.max())
    if max(high, -low) > MOST_INPUT:
        step = "is it a mark for missing values? Remove or repair these examples"
        got = f"{high if high > -low else low:g} among the inputs"
        raise bad(where, got, f"scaled numbers, at most {MOST_INPUT:g}", step)
    return examples


def check_enough(examples: Examples, where: str) -> Examples:
    """The same examples, if a device can train with so many; else DataError."""
    if len(examples) < MIN_BATCH:
        raise DataError(
            f"{where} holds {len(examples)} examples, at least {MIN_BATCH} are needed; add data, "
            "or leave this device out"
        )
    return examples


@contextmanager
def mapped(
    path: str | Path, expected: str, step: str = "copy the file again", *, to: str = "read"
) -> Iterator[None]:
    """Map whatever a foreign reader raises to one DataError. to: what is done with the path. On
    corrupt files numpy, zipfile and zlib raise a dozen unrelated types, hence `Exception`."""
    try:
        yield
    except EdgeError:
        raise
    except PermissionError as error:
        raise DataError(
            f"{path}: {error.strerror or error}, this user may not {to} it; give it the "
            "right to, or run this as another"
        ) from error
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise bad(path, f"{type(error).__name__} ({reason})", expected, step) from error
