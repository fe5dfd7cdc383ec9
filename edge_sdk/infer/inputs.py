"""Examples that an exported model is to answer: of a data set, a shard or an .npy file."""

from __future__ import annotations

import logging
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from edge_sdk.data.bounded import Arrays, read_array, read_arrays
from edge_sdk.data.contract import AXES, TrainedOn, bad, listed, mismatch
from edge_sdk.data.examples import Examples, mapped
from edge_sdk.data.loading import load_test
from edge_sdk.data.plain_arrays import plain
from edge_sdk.data.readers.arrays import ARRAYS, NPY, check_begin, checked_arrays
from edge_sdk.data.readers.scaling import PIXELS
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.infer.model_folder import ExportedModel, read_model

log = logging.getLogger(__name__)


def read_inputs(
    model: Path, data: str, skip: int = 0, limit: int | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Inputs (n, *input_shape), n at least 1, and labels (n, ...), None where there are none.

    model: the folder of the exported model that is to answer them. data: as for --data, or inputs
    alone, an .npy file or an .npz without y. skip: how many of the first are left out; limit: the
    most that are taken, None: all. Raises ConfigError, DataError, and StoreError for the model."""
    if skip < 0 or (limit is not None and limit < 1):
        raise ConfigError(f"--skip {skip} --limit {limit}, expected at least 0 and 1")
    part = slice(skip, None if limit is None else skip + limit)
    y: npt.NDArray[Any] | None = None
    if arrays := read_alone(Path(data)):
        x = unlabelled(arrays, read_model(model), data)[part]
    else:
        examples, about = load_test(data, is_for_training=False), read_model(model)
        check_shape(examples, about, data)
        if (examples.task, bool(examples.vocabulary)) != (
            about.spec.task,
            bool(about.spec.vocabulary),
        ):
            got = f"labels for the task {examples.task}, vocabulary {examples.vocabulary}"
            wanted = f"{about.spec.task}, {about.spec.vocabulary} as the model has"
            raise bad(data, got, wanted, "give data that say so")
        x, y = examples.x[part], examples.y[part]
        own = examples.trained_on
        is_bytes = examples.scaling == PIXELS and np.abs(examples.x).max() <= 1
        if about.scaling and is_bytes:  # as uint8 without labels: by the model's rule
            x = np.rint((x + PIXELS[1]) * PIXELS[0]).astype(np.uint8)
            own = replace(own, scaling=None)
        check_like_model(about, own, data)
    if not len(x):
        raise DataError(f"{data}: no examples are left after --skip {skip}")
    return x, y


def check_shape(examples: Examples, model: ExportedModel, data: str) -> None:
    """Raise DataError for examples of another shape than the model's."""
    wanted, shape = ", ".join(map(str, model.spec.input_shape)), examples.x.shape
    if examples.input_shape == model.spec.input_shape:
        return
    is_flat = math.prod(shape[1:]) == math.prod(model.spec.input_shape)
    step = f"give x.reshape(-1, {wanted})" if is_flat else "give what the model was trained for"
    raise bad(data, f"x of shape {shape}", f"(n, {wanted}) as the model takes", step)


def check_like_model(model: ExportedModel, own: TrainedOn, data: str) -> None:
    """Raise DataError where the data are not such as the model was trained for; tell a doubt."""
    found = mismatch(model.inputs, own.scaling, ("the model's training data", data))
    if found and found.is_certain:
        raise DataError(found.text)
    if found:
        log.warning("%s", found.text)
    if own.class_names and model.class_names not in ((), own.class_names):
        got = f"class_names {listed(own.class_names)}"
        raise bad(data, got, f"those of the model, {listed(model.class_names)}")


def read_labelled(
    model: Path, data: str, skip: int = 0, limit: int | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """As `read_inputs`, with labels. Raises DataError where there are none."""
    x, y = read_inputs(model, data, skip, limit)
    if y is None:
        raise DataError(f"{data} has no labels, which this needs; give an .npz with x and y")
    return x, y


def read_alone(path: Path) -> Arrays:
    """The arrays of a file of inputs without labels, x among them; {} where data is something else.
    Raises DataError."""
    if path.suffix not in (".npy", ".npz") or (path.suffix == ".npz" and not path.is_file()):
        return {}
    expected = f"an {path.suffix} file with inputs x (n, *input_shape)"
    with mapped(path, expected), path.open("rb") as file:
        if path.suffix == ".npy":
            check_begin(path, file, NPY, expected)
            return {"x": read_array(file, path, os.fstat(file.fileno()).st_size)}
        check_begin(path, file, b"PK", expected)
        if "y.npy" in zipfile.ZipFile(file).namelist():
            return {}
        return read_arrays(file, path, ARRAYS, ("x",))


def unlabelled(arrays: Arrays, model: ExportedModel, data: str) -> npt.NDArray[Any]:
    """The inputs, by the rules for labelled ones; those of uint8 stay so where the model says how
    they are scaled. Raises DataError."""
    x, wanted = plain(arrays["x"], "x", data), model.spec.input_shape
    if x.shape == wanted:
        raise bad(
            data,
            f"x of shape {x.shape}, one example",
            f"(n, {', '.join(map(str, wanted))})",
            "give x[None]",
        )
    if x.shape[1:] == wanted and not model.spec.vocabulary:
        arrays = {"layout": np.array(AXES[x.ndim])} | arrays
    labels = {"y": np.zeros(x.shape[:1], np.int64), "num_classes": np.array(model.spec.num_classes)}
    # whatever the task: without labels it says nothing of the inputs
    labels |= {"vocabulary": np.array(model.spec.vocabulary), "task": np.array("classify")}
    examples = checked_arrays({**arrays, **labels}, data)
    check_shape(examples, model, data)
    if x.dtype == np.uint8 and model.scaling:
        return x.reshape(examples.x.shape)
    check_like_model(model, examples.trained_on, data)
    return examples.x
