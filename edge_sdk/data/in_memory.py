"""A program's own arrays or Dataset, handed to the trainer as a private file.

The trainer is another process, and may be started again after it died for memory, so it reads
a shard from the disk, as `--data` gives it one. A Dataset is read item by item to a file, not
into an array: the program never holds it as a whole."""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np

from edge_sdk.data.examples import MIN_BATCH, Examples, Ints, bad, check_enough, mapped
from edge_sdk.data.loading import save_shard
from edge_sdk.data.readers.arrays import checked_arrays

EXPECTED = "a path, (x, y) arrays, or a Dataset with a length, of pairs of a tensor and an int"


@runtime_checkable
class Dataset(Protocol):
    """As torch's map-style ones: pairs of an input and its label, by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


Source: TypeAlias = Examples | Dataset


def checked_source(data: object) -> Source:
    """Arrays checked whole; of a Dataset its length, the rest when it is read. Raises DataError."""
    if isinstance(data, tuple):
        if len(data) != 2:
            raise bad("data", f"a tuple of {len(data)}", "(x, y)", "give inputs and labels")
        with mapped("data", "(x, y) arrays", "correct the data"):
            arrays = {"x": np.asarray(data[0]), "y": np.asarray(data[1])}
        return check_enough(checked_arrays(arrays, "data"), "data")
    if isinstance(data, np.ndarray | str | bytes | dict) or not isinstance(data, Dataset):
        raise bad("data", type(data).__name__, EXPECTED, "give one of them")
    with mapped("data", EXPECTED, "give one of them"):
        length = len(data)
    if length < MIN_BATCH:
        raise bad("data", f"a length of {length}", f"at least {MIN_BATCH} examples", "add data")
    return data


@contextmanager
def shard_of(source: Source) -> Iterator[str]:
    """The path of the shard, mode 0600 in a folder of mode 0700 under tempfile.gettempdir(); gone
    afterwards. Raises DataError."""
    with mapped(tempfile.gettempdir(), "a folder to write to", "set TMPDIR to another", to="write"):
        folder = tempfile.TemporaryDirectory(prefix="edge-sdk-")
    with folder as name:
        path = Path(name) / "shard.npz"
        if isinstance(source, Examples):
            save_shard(path, source)
        else:
            items = Path(name) / "items"
            save_shard(path, _gathered(source, items))
            items.unlink()
        path.chmod(0o600)
        yield str(path)


def _gathered(dataset: Dataset, file: Path) -> Examples:
    """The Dataset's items, their inputs one after another in `file`."""
    labels: Ints = np.empty(len(dataset), np.int64)
    first = _item(dataset, 0, labels)
    advice = "free space, or set TMPDIR"
    with mapped(file, "to write the data", advice, to="write"), file.open("wb") as stream:
        for index in range(len(labels)):
            x = _item(dataset, index, labels)
            if (x.shape, x.dtype) != (first.shape, first.dtype):
                wanted = f"{first.shape} of {first.dtype} as data[0]"
                raise bad(f"data[{index}]", f"{x.shape} of {x.dtype}", wanted)
            stream.write(x.tobytes())
    x = np.memmap(file, first.dtype, "r", shape=(len(labels), *first.shape))
    return checked_arrays({"x": x, "y": labels}, "data")


@np.errstate(all="ignore")  # what becomes infinite is found by checked_arrays
def _item(dataset: Dataset, index: int, labels: Ints) -> np.ndarray[Any, Any]:
    """One input, floats as float32; its label is written to `labels`."""
    where = f"data[{index}]"
    with mapped(where, "a pair of a tensor and an int", "correct the Dataset"):
        value, label = dataset[index]
        x = np.asarray(value)
        labels[index] = operator.index(label)
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        raise bad(where, f"an input of {x.dtype}", "uint8 or float")
    if not x.size:
        raise bad(where, f"an empty input of shape {x.shape}", "(C, H, W) or (C, window)")
    return x if x.dtype == np.uint8 else x.astype(np.float32)
