"""IDX (MNIST) files, .npz files and scikit-learn's digits."""

from __future__ import annotations

import gzip
import math
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from edge_sdk.data.bounded import MOST_PACKED, Stream, check_fits, read_arrays, read_exactly
from edge_sdk.data.contract import bad, checked_names, laid_out
from edge_sdk.data.examples import Examples, Floats, Scaling, check_examples, mapped
from edge_sdk.data.plain_arrays import checked_inputs, plain
from edge_sdk.data.readers.scaling import PIXELS, image_examples, scaled
from edge_sdk.data.readers.table import FileSet, register_reader
from edge_sdk.helpers.imports import optional_module
from edge_sdk.protocol.fields import PLAIN_TEXT, Task
from edge_sdk.tasks.metrics import METRICS
from edge_sdk.tasks.table import task_of

NPY = b"\x93NUMPY"  # first bytes of an .npy file
LABELS = ("num_classes", "subject", "class_names", "task")
ARRAYS = ("x", "y", *LABELS, "scaling", "layout", "made_of", "vocabulary")
DIGITS: Scaling = (8.0, 1.0)  # 0..16 to -1..1


def read_digits(_: Sequence[Path] = ()) -> Examples:
    """scikit-learn's own 1,797 digits of 8 x 8 pixels. Raises ConfigError without scikit-learn."""
    digits = optional_module("sklearn.datasets", "this data", "data").load_digits()
    x = scaled(digits.images[:, None], *DIGITS)  # (n, 8, 8) in 0..16 -> (n, 1, 8, 8)
    y = digits.target.astype(np.int64)
    return check_examples(Examples(x, y, 10, scaling=DIGITS), "digits")


def read_npz(paths: Sequence[Path]) -> Examples:
    """Arrays x and y, and perhaps others of ARRAYS, see `checked_arrays`."""
    (path,) = paths
    expected = "an .npz file with numeric arrays x and y"
    with mapped(path, expected), path.open("rb") as file:
        check_begin(path, file, b"PK", expected)
        arrays = read_arrays(file, path, ARRAYS, ("x", "y"))
    return checked_arrays(arrays, str(path))


def check_begin(path: Path, file: BinaryIO, begin: bytes, expected: str) -> None:
    """Raise DataError unless the file begins so: numpy also reads other kinds, even pickles."""
    found = file.read(6)
    file.seek(0)
    if not found.startswith(begin):
        got = "a single .npy array" if found == NPY else f"first bytes {found!r}"
        raise bad(path, got, f"{expected}, which begins with {begin!r}", "give another file")


@np.errstate(all="ignore")  # as for scaled
def checked_arrays(given: Mapping[str, object], where: str) -> Examples:
    """Examples of what is given under the names of ARRAYS, x and y at least. Raises DataError.

    uint8 x is scaled as pixels; float x stays as it is, so that shards come back unchanged; with a
    vocabulary x are token ids. Without a task the labels are those of classes."""
    arrays = {name: plain(value, name, where) for name, value in given.items()}
    for name in arrays.keys() & {"num_classes", "subject", "vocabulary"}:
        if arrays[name].dtype.kind not in "iu":
            raise bad(where, f"{name} of dtype {arrays[name].dtype}", "integers")
    task = _task(arrays.get("task"), where)
    vocabulary = _number(arrays.get("vocabulary", np.asarray(0)), "vocabulary", where)
    names, subject = _class_names(arrays.get("class_names"), where), arrays.get("subject")
    x = checked_inputs(arrays["x"], where, vocabulary=vocabulary)
    if not arrays["y"].size:
        raise bad(where, "empty data, no label", "at least one example")
    y = task_of(task).labels(arrays["y"], names, where)
    if not vocabulary:
        layout = _text(arrays.get("layout"), "layout", where)
        x = x.reshape(laid_out(x.shape, layout, where))
    most = len(names) or task_of(task).num_outputs(y)
    num_classes = _number(arrays.get("num_classes", np.asarray(most)), "num_classes", where)
    scaling = _scaling(arrays.get("scaling"), where)
    if vocabulary and scaling:
        raise bad(where, "scaling of token ids", "none", "leave `scaling` out")
    if x.dtype == np.uint8 and not vocabulary:
        x, scaling = scaled(x, *PIXELS), PIXELS
    x = np.asarray(x, dtype=np.int64 if vocabulary else np.float32, order="C")
    if scaling:
        _check_scaled(x, scaling, where)
    subject = None if subject is None else subject.astype(np.int64)
    made_of = _text(arrays.get("made_of"), "made_of", where) or ""
    found = Examples(x, y, num_classes, subject, scaling, names, made_of, task, vocabulary)
    return check_examples(found, where)


def _class_names(array: npt.NDArray[Any] | None, where: str) -> tuple[str, ...]:
    if array is None:
        return ()
    if array.ndim != 1:
        raise bad(where, f"class_names of shape {array.shape}", "a list of names")
    return checked_names(array.tolist(), where)


def _text(array: npt.NDArray[Any] | None, name: str, where: str) -> str | None:
    if array is None:
        return None
    if array.ndim or array.dtype.kind != "U" or not re.match(PLAIN_TEXT, str(array)[:201]):
        got, step = f"{name} {array.shape} of {array.dtype}", f'give np.array("...") as {name}'
        raise bad(where, got, "one line of text", step)
    return str(array)


def _task(array: npt.NDArray[Any] | None, where: str) -> Task:
    task = _text(array, "task", where) or "classify"
    if task not in METRICS:
        known = f"one of {', '.join(METRICS)}"
        raise bad(where, f"task {task!r:.60}", known, "name one of them")
    return task


def _number(array: npt.NDArray[Any], name: str, where: str) -> int:
    if array.size != 1:
        raise bad(where, f"{name} of shape {array.shape}", "one number")
    if (number := int(array.item())) < 0:
        raise bad(where, f"{name} {number}", "at least 0")
    return number


def _check_scaled(x: Floats, scaling: Scaling, where: str) -> None:
    """Raise DataError unless float x can have been made of integers by that rule."""
    divisor, offset = scaling
    integers = (x[:: max(1, len(x) // 100)].astype(np.float64) + offset) * divisor
    if not np.allclose(integers, integers.round(), rtol=1e-5, atol=0.01):
        got = f"floats that are no integers / {divisor:g} - {offset:g}, as `scaling` says"
        raise bad(where, got, "floats made by that rule", "leave `scaling` out, or correct it")


def _scaling(array: npt.NDArray[Any] | None, where: str) -> Scaling | None:
    """How float x came from integers, as `save_shard` wrote it down. Raises DataError."""
    if array is None:
        return None
    if array.shape != (2,) or array.dtype.kind != "f" or not np.isfinite(array).all():
        raise bad(where, f"scaling {array.shape} of {array.dtype}", "two finite numbers")
    divisor, offset = array.tolist()
    if divisor <= 0:
        raise bad(where, f"scaling by {divisor}", "a divisor above 0")
    return divisor, offset


def read_idx(paths: Sequence[Path]) -> Examples:
    """The first of these image files that is there, with the labels beside it; gzip or not."""
    images = next((path for path in paths if path.is_file()), paths[0])
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    beside = [images.with_name(f"{name}{ending}") for ending in ("", ".gz")]
    labels = next((path for path in beside if path.is_file()), None)
    if labels is None:
        raise bad(images, "no labels", f"{name} or {name}.gz beside it", "copy it there")
    x = _read_idx(images, 3)[:, None]  # (n, H, W) -> (n, 1, H, W)
    y = _read_idx(labels, 1)
    return image_examples(x, y, int(y.max()) + 1, f"{images} with {labels.name}")


def _read_idx(path: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes: magic 0x0000080N, N sizes of 4 bytes big endian, the data."""
    header_bytes = 4 + 4 * num_dims
    magic = (0x0800 + num_dims).to_bytes(4, "big")
    expected = f"{magic.hex()} (IDX, gzip if named .gz)"
    with mapped(path, "an IDX file, gzip if named .gz"), ExitStack() as stack:
        file: Stream = stack.enter_context(path.open("rb"))
        held_bytes = os.fstat(file.fileno()).st_size
        if path.suffix == ".gz":
            file, held_bytes = stack.enter_context(gzip.open(file)), MOST_PACKED * held_bytes
        head = file.read(header_bytes)
        if head[:4] != magic[: len(head)]:
            raise bad(path, f"first bytes {head[:4].hex()}", expected)
        shape = [int.from_bytes(head[at : at + 4], "big") for at in range(4, len(head), 4)]
        if len(head) < header_bytes or 0 in shape:
            step = "empty or truncated, copy the file again"
            raise bad(path, f"{len(head)} bytes of sizes {shape}", "sizes above 0", step)
        check_fits(path, math.prod(shape), 1, held_bytes)
        raw = read_exactly(file, math.prod(shape), path)
    return np.frombuffer(raw, dtype=np.uint8).reshape(shape)


def _image_files(part: str) -> tuple[str, ...]:
    names = (f"{part}-images-idx3-ubyte", f"{part}-images.idx3-ubyte")
    return tuple(f"{name}{ending}" for name in names for ending in ("", ".gz"))


def _folder_name(path: Path) -> str:
    path = path.resolve()
    return path.name if path.is_dir() else path.parent.name


register_reader(
    FileSet(name="digits", read=read_digits),
    FileSet(
        name="idx",
        read=read_idx,
        train=_image_files("train"),
        test=_image_files("t10k"),
        alone=("*images*idx3*",),
        title=_folder_name,
        rank=0,
    ),
    FileSet(
        name="npz",
        read=read_npz,
        train=("train.npz",),
        test=("test.npz",),
        alone=("*.npz",),
        title=lambda path: path.resolve().name if path.is_dir() else path.stem,
        rank=2,
    ),
)
