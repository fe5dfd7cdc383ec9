"""Examples that an exported model is to answer: of a data set, a shard or an .npy file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.data.examples import bad, mapped
from edge_sdk.data.loading import load_test
from edge_sdk.data.readers.arrays import NPY, check_begin
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.infer.model_folder import read_model


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
        x = read_npy(Path(data))[part]
    else:
        examples, own = load_test(data), read_model(model).scaling
        if examples.scaling and own and examples.scaling != own:
            raise DataError(
                f"{data} becomes x / {examples.scaling[0]:g} - {examples.scaling[1]:g}, the "
                f"model was trained on x / {own[0]:g} - {own[1]:g}; give it as .npy"
            )
        x, y = examples.x[part], examples.y[part]
    if not len(x):
        raise DataError(f"{data}: no examples are left after --skip {skip}")
    return x, y


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
