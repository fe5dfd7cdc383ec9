"""uint8 given to an exported model: scaled by its rule, with labels or without, and its range is
compared with that of the training."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.data.examples import Examples
from edge_sdk.errors import DataError
from edge_sdk.infer.early_exit import EarlyExit
from edge_sdk.infer.export import export
from edge_sdk.infer.inputs import read_inputs
from edge_sdk.models import initial_tensors
from tests.support.data_files import fails
from tests.support.examples import cnn

PIXELS, DIGITS = (127.5, 1.0), (8.0, 1.0)


def integers(high: int) -> np.ndarray:
    """(6, 1, 8, 8) of uint8 from 0 to high."""
    return np.linspace(0, high, 6 * 64).astype(np.uint8).reshape(6, 1, 8, 8)


def model(folder, high: int, rule: tuple[float, float]):
    x = (integers(high) / rule[0] - rule[1]).astype(np.float32)
    data = Examples(x, np.arange(6) % 3, 3, scaling=rule)
    export(cnn(), initial_tensors(cnn(), 0), folder / "model", examples=data)
    return folder / "model"


def saved(folder, kind: str, x: np.ndarray) -> str:
    path = folder / f"data.{kind[:3]}"
    if kind == "npy":
        np.save(path, x)
    else:
        np.savez(path, x=x, **({"y": np.arange(6) % 3} if kind == "npz with y" else {}))
    return str(path)


@pytest.mark.parametrize("kind", ["npy", "npz", "npz with y"])
@pytest.mark.parametrize(
    ("trained", "given", "verdict"),
    [
        ((16, DIGITS), 16, None),
        ((16, DIGITS), 48, None),  # three times as wide
        ((16, DIGITS), 100, "integers, 0 to 100; those that trained the model were 0 to 16"),
        ((16, DIGITS), 254, DataError),  # over eight times as wide
        ((255, PIXELS), 255, None),
        ((255, PIXELS), 40, None),  # dark pictures
        ((255, PIXELS), 16, "integers, 0 to 16; those that trained the model were 0 to 255"),
        ((255, PIXELS), 0, None),  # a black picture tells nothing
        ((16, PIXELS), 254, DataError),
    ],
)
def test_bytes_mean_the_same_with_and_without_labels(
    tmp_path, caplog, kind, trained, given, verdict
):
    folder = model(tmp_path, *trained)
    x, y = read_inputs(folder, saved(tmp_path, kind, integers(given)))
    assert (y is not None) == (kind == "npz with y")
    assert x.dtype == np.uint8
    np.testing.assert_array_equal(x, integers(given))
    engine = EarlyExit.load(folder)
    if verdict is DataError:
        fails(lambda: engine.predict(x), "integers, 0 to 254; those that trained the model were 0")
        return
    for _ in range(2):
        engine.predict(x)
    assert [verdict in record.message for record in caplog.records] == [True] * bool(verdict)


def test_integers_that_are_no_bytes_stay_floats(tmp_path):
    folder = model(tmp_path, 255, PIXELS)
    x = (integers(255).astype(np.float32) * 4) / 127.5 - 1
    np.savez(tmp_path / "a.npz", x=x.astype(np.float32), y=np.arange(6) % 3, scaling=PIXELS)
    assert read_inputs(folder, str(tmp_path / "a.npz"))[0].dtype == np.float32


def test_inputs_alone_need_no_labels_of_the_task_beside_them(tmp_path):
    folder = model(tmp_path, 255, PIXELS)
    for task in ("tokens", "regress"):
        np.savez(tmp_path / "a.npz", x=integers(255), task=task)
        x, y = read_inputs(folder, str(tmp_path / "a.npz"))
        np.testing.assert_array_equal(x, integers(255))
        assert y is None


@pytest.mark.parametrize("kind", ["npy", "npz", "npz with y"])
def test_another_shape_is_named_with_its_file(tmp_path, kind):
    folder = model(tmp_path, 255, PIXELS)
    path = saved(tmp_path, kind, np.zeros((6, 64), np.float32))
    said = "x of shape (6, 64), expected (n, 1, 8, 8) as the model takes; give x.reshape(-1, 1, 8,"
    fails(lambda: read_inputs(folder, path, limit=2), f"{path}: got {said}")
    path = saved(tmp_path, kind, np.zeros((6, 63), np.float32))
    fails(lambda: read_inputs(folder, path), "(6, 63)", "give what the model was trained for")
