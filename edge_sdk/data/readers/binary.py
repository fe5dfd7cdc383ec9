"""STL-10 and the binary versions of CIFAR-10 and CIFAR-100: packed bytes without a header.

So the size of a file is all that tells one from another; labels out of range are refused too."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edge_sdk.data.examples import Examples, bad, mapped
from edge_sdk.data.readers.scaling import image_examples
from edge_sdk.data.readers.table import FileSet, register_reader

STL_SHAPE, CIFAR_SHAPE = (3, 96, 96), (3, 32, 32)
CIFAR_PIXELS = 3 * 32 * 32
BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))  # CIFAR-10's train part
NUM_COARSE = 20  # superclasses of CIFAR-100


def read_stl_10(paths: Sequence[Path]) -> Examples:
    """One `*_X.bin` with its `*_y.bin`: a plane per channel, column by column; labels 1..10."""
    (path,) = paths
    labels = path.with_name(path.name.replace("_X", "_y"))
    x = _records(path, 3 * 96 * 96, "images").reshape(-1, *STL_SHAPE)  # (n, channel, column, row)
    y = _records(labels, 1, "labels")[:, 0]
    if len(x) != len(y):
        raise bad(labels, f"{len(y)} labels", f"{len(x)}, one for each image in {path.name}")
    if y.min() < 1 or y.max() > 10:
        raise bad(labels, f"labels from {y.min()} to {y.max()}", "1 to 10", "copy it again")
    return image_examples(x.transpose(0, 1, 3, 2), y - 1, 10, str(path))


def read_cifar_10(paths: Sequence[Path]) -> Examples:
    """Records of a label and the planes red, green, blue, each row by row; all files joined."""
    raw = np.concatenate([_records(path, 1 + CIFAR_PIXELS, "CIFAR-10 records") for path in paths])
    return image_examples(raw[:, 1:].reshape(-1, *CIFAR_SHAPE), raw[:, 0], 10, joined(paths))


def read_cifar_100(paths: Sequence[Path]) -> Examples:
    """As `read_cifar_10`, with the superclass before the class; the classes are what is learned."""
    raw = np.concatenate([_records(path, 2 + CIFAR_PIXELS, "CIFAR-100 records") for path in paths])
    where = joined(paths)
    if raw[:, 0].max() >= NUM_COARSE:
        got = f"superclasses up to {raw[:, 0].max()}"
        raise bad(where, got, f"0 to {NUM_COARSE - 1}", "copy the file again")
    return image_examples(raw[:, 2:].reshape(-1, *CIFAR_SHAPE), raw[:, 1], 100, where)


def joined(paths: Sequence[Path]) -> str:
    """The names of files that were read as one, for messages."""
    return str(paths[0]) if len(paths) == 1 else f"{paths[0]} to {paths[-1].name}"


def _records(path: Path, size: int, what: str) -> npt.NDArray[np.uint8]:
    """A file as (n, size) bytes, n at least 1."""
    expected = f"{what} of {size} bytes each"
    with mapped(path, expected):
        raw = path.read_bytes()
    if not raw or len(raw) % size:
        step = "empty, truncated or of another data set, copy the file again"
        raise bad(path, f"{len(raw)} bytes", f"{expected}, a multiple above 0", step)
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, size)


CIFAR_10_TRAIN = tuple(f"{name}.bin" for name in BATCHES)
register_reader(
    FileSet(name="stl-10", read=read_stl_10, train=("train_X.bin",), test=("test_X.bin",)),
    FileSet(name="cifar-10", read=read_cifar_10, train=CIFAR_10_TRAIN, test=("test_batch.bin",)),
    FileSet(name="cifar-100", read=read_cifar_100, train=("train.bin",), test=("test.bin",)),
)
