"""Small data files in the true formats, broken copies of them, and how examples are compared."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from edge_sdk.data.examples import Examples
from edge_sdk.errors import DataError

# Three images of 1 x 2 pixels: 0 -> -1, 255 -> 1, 51 -> 51 / 127.5 - 1 = -0.6
PIXELS = np.array([[[0, 255]], [[51, 0]], [[255, 255]]], dtype=np.uint8)
SCALED = np.array([[[[-1, 1]]], [[[-0.6, -1]]], [[[1, 1]]]], dtype=np.float32)
LABELS = np.array([1, 0, 2], dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray, ending="") -> Path:
    folder.mkdir(exist_ok=True)
    packed = gzip.compress if ending else bytes
    path = folder / f"{part}-images-idx3-ubyte{ending}"
    path.write_bytes(packed(idx_bytes(images)))
    (folder / f"{part}-labels-idx1-ubyte{ending}").write_bytes(packed(idx_bytes(labels)))
    return path


def write_npz(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def early_unimib(folder: Path) -> Path:
    """Two samples of window 4; rows are the axes in turn, values in quarters of 2 g."""
    data = 19.6133 / 4 * np.arange(-12, 12).reshape(6, 4)
    labels = np.repeat(np.array([[3, 30], [8, 1]], dtype=np.uint8), 3, axis=0)
    savemat(folder / "fall_data.mat", {"fall_data": data})
    savemat(folder / "fall_labels.mat", {"fall_labels": labels})
    return folder / "fall_data.mat"


def later_unimib(folder: Path, kind: str = "fall") -> Path:
    """The same two samples in the later layout."""
    data = 19.6133 / 4 * np.arange(-12, 12).reshape(2, 12)
    labels = np.array([[3, 30, 1], [8, 1, 2]], dtype=np.float64)
    savemat(folder / f"{kind}_data.mat", {f"{kind}_data": data})
    savemat(folder / f"{kind}_labels.mat", {f"{kind}_labels": labels})
    return folder / f"{kind}_data.mat"


def examples_of(y, shape=(1, 2, 2), num_classes=3, subject=None) -> Examples:
    y = np.array(y, dtype=np.int64)
    x = np.random.default_rng(0).normal(size=(len(y), *shape)).astype(np.float32)
    return Examples(x, y, num_classes, subject)


def assert_same(got: Examples, want: Examples) -> None:
    assert got.x.dtype == np.float32
    assert got.y.dtype == np.int64
    np.testing.assert_array_equal(got.x.view(np.uint32), want.x.view(np.uint32))
    np.testing.assert_array_equal(got.y, want.y)
    assert got.num_classes == want.num_classes
    assert (got.subject is None) == (want.subject is None)
    if want.subject is not None:
        np.testing.assert_array_equal(got.subject, want.subject)


def fails(call: Callable[[], object], *fragments: str, error: type[Exception] = DataError) -> str:
    """The call raises exactly `error`, in one line that holds every fragment; that line."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message
    return message


FLOATS = np.zeros((3, 1, 2), dtype=np.float32)


def broken_copies(raw: bytes, count: int) -> list[bytes]:
    """Copies cut short or with four bytes changed, at places drawn from a fixed seed."""
    rng = np.random.default_rng(0)
    copies = []
    for position in rng.integers(0, len(raw) - 4, count):
        copies.append(raw[:position])
        copies.append(raw[:position] + rng.bytes(4) + raw[position + 4 :])
    return copies


class Items:
    """A Dataset of what it is given."""

    def __init__(self, items: list[object]) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> object:
        return self._items[index]
