"""Data sets and shards by name or path."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edge_sdk.data.contract import AXES, bad, described, from_one, integers, mismatch
from edge_sdk.data.examples import DataSet, Examples, check_examples, mapped
from edge_sdk.data.partition import stratified_split, stratified_subset
from edge_sdk.data.readers.scaling import PIXELS
from edge_sdk.data.readers.table import Reader, readers
from edge_sdk.errors import ConfigError, DataError, UsageError
from edge_sdk.helpers.files import replacing
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import InputScaling
from edge_sdk.tasks.metrics import METRICS

__all__ = ["DataSet", "Examples", "load", "load_dataset", "load_shard", "load_test", "save_shard"]
log = logging.getLogger(__name__)
UNSCALED = 100.0  # no float input that somebody scaled is larger; 0..255 and -9999 are
NARROW = 0.01  # no inputs that somebody scaled have a range smaller than this
DARK = 64  # of 256: pixels have a larger one among them
MANY_CLASSES, SEEN = 1000, 0.01  # of more classes, a share that labels have if they are no ids
VALUES, FEW = 50, 4  # of more classes, examples of each, where the classes may be numbers to tell
TEST_FRACTION = 0.2


def load(source: str) -> tuple[str, Examples, Examples | None]:
    """Name, train part (or all there is) and official test part, if the source has one.

    source: what `readers.table.known` tells. Raises DataError if it is missing, corrupt or of
    another kind, and ConfigError if reading it needs a package that is not installed."""
    name, read_train, read_test = readers(source)
    train = _read(read_train, source)
    if read_test is None:
        return name, train, None
    test = _read(read_test, source)
    if train.input_shape != test.input_shape:
        raise bad(source, f"test inputs {test.input_shape}", f"{train.input_shape} as in train")
    if train.task != test.task:
        raise bad(source, f"a test part for {test.task}", f"{train.task} as in train")
    whose = (f"{source} (train)", "its test part")
    if found := mismatch(train.input_scaling, test.input_scaling, whose):
        if found.is_certain:
            raise DataError(found.text)
        log.warning("%s", found.text)
    names = train.class_names or test.class_names
    if test.class_names and names != test.class_names:
        raise bad(source, "other class_names in test than in train", "the same in both")
    num_classes = max(train.num_classes, test.num_classes)
    vocabulary = max(train.vocabulary, test.vocabulary)
    train, test = (
        replace(part, num_classes=num_classes, class_names=names, vocabulary=vocabulary)
        for part in (train, test)
    )
    return name, check_examples(train, source), check_examples(test, source)


def _read(reader: Reader, source: str, is_for_training: bool = True) -> Examples:
    """What a reader gives, which may be a user's own, checked; doubts about labels and scaling are
    told."""
    examples = check_examples(reader(), source)
    if examples.task == "classify":
        _tell_labels(examples, source)
    is_scaled = is_for_training and not examples.vocabulary
    if is_scaled and (said := _badly_scaled(examples.input_scaling)):
        log.warning("%s: %s", source, said)
    return examples


def _tell_labels(examples: Examples, source: str) -> None:
    lowest, highest = int(examples.y.min()), int(examples.y.max())
    said = from_one(lowest, highest, examples.num_classes)
    if said and not examples.class_names:  # named classes are numbered by their names
        log.warning("%s: %s", source, said)
    seen, num_classes = len(np.unique(examples.y)), examples.num_classes
    if seen > VALUES and len(examples) < FEW * seen:
        said = (
            "%s: %d examples of %d classes, fewer than %d each; numbers to be told are of the task "
        )
        log.warning(said + "regress (task in data.toml)", source, len(examples), seen, FEW)
    if num_classes > MANY_CLASSES and seen < SEEN * num_classes:
        log.warning(
            "%s: labels from %d to %d are of %d classes only, and the model gets %d; number the "
            "classes from 0 without gaps, the same on every device",
            source,
            lowest,
            highest,
            seen,
            num_classes,
        )


def _badly_scaled(scaling: InputScaling) -> str:
    """What to say of inputs that training does not want; "" for others."""
    if scaling.divisor is None:
        if max(scaling.high, -scaling.low) <= UNSCALED and scaling.high - scaling.low >= NARROW:
            return ""
        return (
            f"the inputs are {described(scaling)}, and training wants about -1 to 1; scale them by "
            "constants (of a table by range in data.toml), or give pixels of 0 to 255 as uint8"
        )
    largest = round((scaling.high + scaling.offset) * scaling.divisor)
    if (scaling.divisor, scaling.offset) != PIXELS or not 0 < largest < DARK:
        return ""
    return (
        f"the inputs are uint8 of {integers(scaling)}, scaled as pixels of 0 to 255 to "
        f"{scaling.low:g} to {scaling.high:g}; if they are no dark pictures give floats scaled by "
        f"constants that are the same on every device, e.g. x / {largest / 2:g} - 1"
    )


def load_dataset(
    source: str, seed: int, examples: int | None = None, test_examples: int | None = None
) -> DataSet:
    """A data set with a test part: the official one, else a stratified 20 % drawn from `seed`.

    The drawn part mixes subjects between train and test. examples, test_examples: sizes of
    stratified subsets drawn from `seed`; None takes all."""
    name, train, test = load(source)
    if test is None:
        train_indices, test_indices = stratified_split(train.strata, TEST_FRACTION, seed)
        train, test = train.take(train_indices), train.take(test_indices)
    train = stratified_subset(train, examples, seed, "train subset")
    return DataSet(name, train, stratified_subset(test, test_examples, seed, "test subset"))


def load_test(source: str, is_for_training: bool = True) -> Examples:
    """The official test part of a source, or all of it where it has none; reads nothing else.
    is_for_training: whether scaling that training does not want is told."""
    _, read_train, read_test = readers(source)
    return _read(read_test or read_train, source, is_for_training)


def load_shard(source: str) -> Examples:
    """The train part of a source, for a device's own training; its test part is not read."""
    return _read(readers(source)[1], source)


def as_asked(
    examples: Examples,
    source: str,
    input_shape: tuple[int, ...] | None,
    num_classes: int | None,
    task: Task | None = None,
    vocabulary: int | None = None,
) -> Examples:
    """The examples for a model of what --input, --classes, --task and --vocabulary say beside them:
    more classes or token ids than they happen to hold, never fewer, and else the same. None: not
    asked. Raises UsageError."""
    if task not in (None, examples.task):
        raise UsageError(
            f"--task {task}, but the labels of {source} are for {examples.task}; leave --task out, "
            "or give data that say so (docs/tasks.md)"
        )
    if vocabulary is not None and not 0 < examples.vocabulary <= vocabulary:
        there = f"token ids below {examples.vocabulary}" if examples.vocabulary else "numbers"
        raise UsageError(
            f"--vocabulary {vocabulary}, but {source} has {there}; leave --vocabulary out"
        )
    if input_shape is not None and tuple(input_shape) != examples.input_shape:
        asked, there = ("x".join(map(str, s)) for s in (input_shape, examples.input_shape))
        raise UsageError(f"--input {asked}, but {source} has {there}; leave --input out")
    if num_classes is not None and num_classes < examples.num_classes:
        raise UsageError(
            f"--classes {num_classes}, but {source} has {examples.num_classes}; leave --classes "
            "out, or raise it"
        )
    if num_classes not in (None, examples.num_classes) and examples.class_names:
        raise UsageError(
            f"--classes {num_classes}, but {source} has {len(examples.class_names)} class_names; "
            "leave --classes out, or name the others there"
        )
    if num_classes not in (None, examples.num_classes) and METRICS[examples.task].is_by_column:
        raise UsageError(
            f"--classes {num_classes}, but {source} has {examples.num_classes} columns of y; leave "
            "--classes out"
        )
    return replace(
        examples,
        num_classes=num_classes or examples.num_classes,
        vocabulary=vocabulary or examples.vocabulary,
    )


def save_shard(path: str | os.PathLike[str], examples: Examples) -> None:
    """Writes an .npz that `load_shard` reads back bit for bit; whole or not at all."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ConfigError(f"shard file {path}: expected a name that ends in .npz")
    check_examples(examples, str(path))
    arrays: dict[str, Any] = {
        "x": examples.x,
        "y": examples.y,
        "num_classes": np.int64(examples.num_classes),
    }
    if examples.vocabulary:
        arrays["vocabulary"] = np.int64(examples.vocabulary)
    else:
        arrays["layout"] = np.array(AXES[examples.x.ndim])
    if examples.task != "classify":
        arrays["task"] = np.array(examples.task)
    if examples.subject is not None:
        arrays["subject"] = examples.subject
    if examples.class_names:
        arrays["class_names"] = np.array(examples.class_names)
    if examples.made_of:
        arrays["made_of"] = np.array(examples.made_of)
    if examples.scaling is not None:
        arrays["scaling"] = np.array(examples.scaling)
    step = "check the folder, its rights and its free space"
    with mapped(path, "to write the shard", step, to="write"), replacing(path) as file:
        np.savez(file, **arrays)
