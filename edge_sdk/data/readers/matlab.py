"""MATLAB 5 files, and the data sets published in them: UniMiB SHAR and SVHN.

Not by scipy.io.loadmat: scipy 1.17 looks data types up without a bound, so one wrong byte ends the
process by a segmentation fault."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.data.bounded import inflate
from edge_sdk.data.examples import Examples, Ints, bad, check_examples, mapped
from edge_sdk.data.readers.scaling import image_examples, scaled
from edge_sdk.data.readers.table import FileSet, register_reader

TWO_G = 19.6133  # m/s^2, the range of the UniMiB SHAR sensor
UNIMIB_CLASSES = {"fall": 8, "adl": 9, "acc": 17}
MAT_DTYPES = {  # by the type numbers of MATLAB 5 files, little endian
    1: "i1",
    2: "u1",
    3: "<i2",
    4: "<u2",
    5: "<i4",
    6: "<u4",
    7: "<f4",
    9: "<f8",
    12: "<i8",
    13: "<u8",
}
MAT_MATRIX, MAT_COMPRESSED = 14, 15


def read_unimib(paths: Sequence[Path]) -> Examples:
    """UniMiB SHAR, both releases; the window (51 or 151) is taken from the data.

    early: data (3n, window), one row per axis; labels (3n, 2) class, subject, three alike.
    later: data (n, 3 * window), x then y then z; labels (n, 3) class, subject, trial."""
    (path,) = paths
    kind = path.name.removesuffix("_data.mat")
    (data,) = read_mat(path, f"{kind}_data")
    (raw_labels,) = read_mat(path.with_name(f"{kind}_labels.mat"), f"{kind}_labels")
    shape = raw_labels.shape
    rows, columns = data.shape[0], data.shape[-1]
    is_early = shape == (rows, 2) and rows % 3 == 0
    is_later = shape == (rows, 3) and columns % 3 == 0
    if data.ndim != 2 or data.size == 0 or not (is_early or is_later):
        expected = "(3n, window) with (3n, 2), or (n, 3 * window) with (n, 3)"
        raise bad(path, f"data {data.shape} with labels {shape}", expected)
    labels = _whole(raw_labels, path).reshape(-1, 3 if is_early else 1, shape[1])
    if (labels != labels[:, :1]).any():  # (n, rows of a sample, columns)
        raise bad(path, "labels that differ within a sample", "the same in all rows of a sample")
    x = scaled(data.reshape(-1, 3, columns if is_early else columns // 3), TWO_G, 0)
    y, subject = labels[:, 0, 0] - 1, labels[:, 0, 1].copy()
    return check_examples(Examples(x, y, UNIMIB_CLASSES[kind], subject), str(path))


def read_svhn(paths: Sequence[Path]) -> Examples:
    """SVHN's cropped digits: X (32, 32, 3, n) is row, column, channel; label 10 is the digit 0."""
    (path,) = paths
    pixels, raw_labels = read_mat(path, "X", "y")
    n = pixels.shape[-1]
    if pixels.shape != (32, 32, 3, n) or pixels.dtype != np.uint8 or raw_labels.shape != (n, 1):
        got = f"X {pixels.shape} of {pixels.dtype} with y {raw_labels.shape}"
        raise bad(path, got, "X (32, 32, 3, n) of uint8 with y (n, 1)", "copy the file again")
    labels = _whole(raw_labels[:, 0], path)
    if labels.size and (labels.min() < 1 or labels.max() > 10):
        got = f"labels from {labels.min()} to {labels.max()}"
        raise bad(path, got, "1 to 10, where 10 is the digit 0", "copy the file again")
    return image_examples(pixels.transpose(3, 2, 0, 1), labels % 10, 10, str(path))


def _whole(raw_labels: npt.NDArray[Any], path: Path) -> Ints:
    """MATLAB's labels may be of any number type, but have to be integers."""
    with np.errstate(all="ignore"):  # NaN differs from whatever integer it becomes
        labels = raw_labels.astype(np.int64)
    if (labels != raw_labels).any():
        raise bad(path, "fractional labels", "integers")
    return labels


def read_mat(path: Path, *variables: str) -> list[npt.NDArray[Any]]:
    """Real arrays of a MATLAB 5 file by name, of any number of axes, read-only, Fortran order."""
    expected = f"a little-endian MATLAB 5 file with {' and '.join(variables)}"
    with mapped(path, expected):
        with path.open("rb") as file:
            head = file.read(128)
            if head[124:128] == b"\x00\x02IM" or head.startswith(b"\x89HDF"):
                got = "a MATLAB 7.3 file, which is HDF5"
                raise bad(path, got, expected, "in MATLAB save it with -v7")
            if head[124:128] != b"\x00\x01IM":
                raise bad(path, f"version bytes {head[124:128]!r}", expected)
            raw = file.read()
        found: dict[str, list[tuple[int, memoryview]]] = {}
        for kind, body in _mat_elements(memoryview(raw), path):
            parts = list(_mat_elements(body, path, is_inner=True)) if kind == MAT_MATRIX else []
            if len(parts) > 3:
                found[bytes(parts[2][1]).decode("latin-1")] = parts
        if missing := [name for name in variables if name not in found]:
            raise bad(path, f"variables {sorted(found)} without {missing}", expected)
        return [_mat_array(path, name, found[name]) for name in variables]


def _mat_array(path: Path, name: str, parts: list[tuple[int, memoryview]]) -> npt.NDArray[Any]:
    """The array of a matrix element: flags, sizes, name, real part."""
    (_, flags), (_, sizes), _, (kind, values) = parts[:4]
    shape = tuple(np.frombuffer(sizes, dtype="<i4").tolist())
    if not 6 <= flags[0] <= 15 or flags[1] & 8 or min(shape) < 0:  # 6..15: double to uint64
        got = f"{name} of shape {shape}, class {flags[0]}, flags {flags[1]}"
        raise bad(path, got, "an array of real numbers")
    array: npt.NDArray[Any] = np.frombuffer(values, MAT_DTYPES[kind])
    return array.reshape(shape, order="F")


def _mat_elements(
    raw: memoryview, path: Path, *, is_inner: bool = False
) -> Iterator[tuple[int, memoryview]]:
    """Type and content of the elements of a MATLAB 5 file or matrix; compressed ones unpacked.

    Contents are views: SVHN's X is 225 MB."""
    at = 0
    while at < len(raw):
        kind, size = struct.unpack_from("<II", raw, at)
        start, end = at + 8, at + 8 + size + (-size % 8 if kind != MAT_COMPRESSED else 0)
        if kind >> 16:  # small element: type and size in 4 bytes, content in the next 4
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if start + size > len(raw):
            raise ValueError(f"element of {size} bytes where {len(raw) - start} are left")
        content, at = raw[start : start + size], end
        if kind == MAT_COMPRESSED:
            if is_inner:
                raise ValueError("a compressed element within another")
            yield from _mat_elements(memoryview(inflate(content, path)), path, is_inner=True)
        else:
            yield kind, content


register_reader(
    *(
        FileSet(name=f"unimib-shar-{kind}", read=read_unimib, train=(f"{kind}_data.mat",))
        for kind in UNIMIB_CLASSES
    ),
    FileSet(
        name="svhn",
        read=read_svhn,
        train=("train_32x32.mat",),
        test=("test_32x32.mat",),
        alone=("extra_32x32.mat",),
    ),
)
