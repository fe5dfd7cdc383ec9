"""Examples that an exported model is to answer: of a data set, a shard or an .npy file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.data.contract import TrainedOn, bad, listed, mismatch, scaling_of
from edge_sdk.data.examples import mapped
from edge_sdk.data.loading import load_test
from edge_sdk.data.readers.arrays import NPY, check_begin
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.infer.model_folder import ExportedModel, read_model

log = logging.getLogger(__name__)


def read_inputs(
    model: Path, data: str, skip: int = 0, limit: int | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
    """Inputs (n, *input_shape), n at least 1, and labels (n,), None for an .npy file.

    model: the folder of the exported model that is to answer them. data: as for --data, or an .npy
    file. skip: how many of the first are left out; limit: the most that are taken, None: all.
    Raises ConfigError, DataError, and StoreError for the model."""
    if skip < 0 or (limit is not None and limit < 1):
        raise ConfigError(f"--skip {skip} --limit {limit}, expected at least 0 and 1")
    part = slice(skip, None if limit is None else skip + limit)
    y: npt.NDArray[Any] | None = None
    if data.endswith(".npy"):
        x = read_npy(Path(data))
        if x.dtype.kind == "f" and np.isfinite(x).all() and x.size:
            floats = scaling_of(float(x.min()), float(x.max()), None)
            check_like_model(read_model(model), TrainedOn(scaling=floats), data)
        x = x[part]
    else:
        examples = load_test(data)
        check_like_model(read_model(model), examples.trained_on, data)
        x, y = examples.x[part], examples.y[part]
    if not len(x):
        raise DataError(f"{data}: no examples are left after --skip {skip}")
    return x, y


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


def read_npy(path: Path) -> npt.NDArray[Any]:
    """An array of numbers; nothing is ever unpickled. Raises DataError."""
    expected = "an .npy file with inputs (n, *input_shape)"
    with mapped(path, expected), path.open("rb") as file:
        check_begin(path, file, NPY, expected)
        x: npt.NDArray[Any] = np.load(file, allow_pickle=False)
        if not x.ndim:
            raise bad(path, "no array", expected)
    return x
