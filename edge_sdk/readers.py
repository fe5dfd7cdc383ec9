"""File formats of data sets: IDX, .npz, UniMiB SHAR's MATLAB files, scikit-learn's digits.

Scaling never depends on the shard, so that every device scales alike: uint8 to x / 127.5 - 1,
digits to x / 8 - 1, UniMiB SHAR to units of 2 g; float arrays are taken as they are. The
alternative, standardising by the shard's own mean, would feed one model inputs of other scales.
Class counts come from the source where it has them. IDX files, and .npz files without
`num_classes`, have only their largest label + 1, so hand skewed shards out with `save_shard`.
"""

from __future__ import annotations

import gzip
import importlib
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError, DataError
from edge_sdk.examples import Examples, Floats, bad, check_examples, mapped

Reader: TypeAlias = Callable[[], Examples]
TWO_G = 19.6133  # m/s^2, the range of the UniMiB SHAR sensor
UNIMIB_CLASSES = {"fall": 8, "adl": 9, "acc": 17}
MAT_DTYPES = {  # by the type numbers of MATLAB 5 files, little endian
    1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8",
    12: "<i8", 13: "<u8",
}  # fmt: skip
MAT_MATRIX, MAT_COMPRESSED = 14, 15
KINDS = (
    '"digits"; a directory with IDX (MNIST) files, one UniMiB SHAR part, or train.npz; a file '
    "*.npz, *images*idx3*, fall_data.mat, adl_data.mat or acc_data.mat"
)


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        how = 'run pip install "edge-sdk[data]"'
        raise ConfigError(f"this data needs {module}, which is not installed; {how}") from error


def readers(source: str) -> tuple[str, Reader, Reader | None]:
    """Name, reader of the train part, reader of the test part; reads nothing yet."""
    if source == "digits":
        return "digits", _read_digits, None
    path = Path(os.path.expanduser(source))
    if source and os.path.isdir(path):
        return _directory_readers(path)
    if not os.path.isfile(path):
        raise DataError(f"data {source!r}: no such file, directory or name; known are {KINDS}")
    if path.suffix == ".npz":
        return path.stem, partial(_read_npz, path), None
    kind = path.name.removesuffix("_data.mat")
    if kind in UNIMIB_CLASSES and path.suffix == ".mat":
        return f"unimib-shar-{kind}", partial(_read_unimib, path), None
    if "images" in path.name and "idx3" in path.name:
        return path.resolve().parent.name, partial(_read_idx_pair, path), None
    raise DataError(f"data {source!r}: a file of unknown kind; known are {KINDS}")


def _directory_readers(folder: Path) -> tuple[str, Reader, Reader | None]:
    stems = ("{}-images-idx3-ubyte", "{}-images.idx3-ubyte")
    name = folder.resolve().name
    train, test = (_first(folder, *(s.format(part) for s in stems)) for part in ("train", "t10k"))
    if train:
        return name, partial(_read_idx_pair, train), partial(_read_idx_pair, test) if test else None
    mats = [path for kind in UNIMIB_CLASSES if (path := folder / f"{kind}_data.mat").is_file()]
    if len(mats) == 1:
        return readers(str(mats[0]))
    if mats:
        got = ", ".join(path.name for path in mats)
        raise bad(folder, got, "one of them", "give the path of the one to use")
    train, test = folder / "train.npz", folder / "test.npz"
    if train.is_file():
        return name, partial(_read_npz, train), partial(_read_npz, test) if test.is_file() else None
    raise DataError(f"{folder}: got a directory without data files; known are {KINDS}")


@np.errstate(all="ignore")  # what is beyond float32 becomes infinite and is refused as such
def _scaled(x: npt.NDArray[Any], divisor: float, offset: float) -> Floats:
    """x / divisor - offset in float32."""
    result = x.astype(np.float32, order="C")
    result /= np.float32(divisor)  # in place: images are the largest arrays of a device
    result -= np.float32(offset)
    return result


def _read_digits() -> Examples:
    digits = _optional("sklearn.datasets").load_digits()
    x = _scaled(digits.images[:, None], 8, 1)  # (n, 8, 8) in 0..16 -> (n, 1, 8, 8)
    return check_examples(Examples(x, digits.target.astype(np.int64), 10), "digits")


@np.errstate(all="ignore")  # as for _scaled
def _read_npz(path: Path) -> Examples:
    """uint8 x of (n, H, W) gets a channel axis and is scaled; float x of (n, C, window) or
    (n, C, H, W) stays as it is, so that shards of both kinds come back unchanged."""
    expected = "an .npz file with numeric arrays x and y"
    with mapped(path, expected), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise bad(path, "a single .npy array", expected)
        if not {"x", "y"} <= set(archive.files):
            raise bad(path, f"arrays {archive.files}", expected)
        names = {"x", "y", "num_classes", "subject"}.intersection(archive.files)
        arrays = {name: np.asarray(archive[name]) for name in names}
    for name in names - {"x"}:
        if arrays[name].dtype.kind not in "iu":
            raise bad(path, f"{name} of dtype {arrays[name].dtype}", "integers")
    x, y, subject = arrays["x"], arrays["y"].astype(np.int64), arrays.get("subject")
    num_classes = arrays.get("num_classes", np.asarray(int(y.max(initial=0)) + 1))
    if num_classes.size != 1:
        raise bad(path, f"num_classes of shape {num_classes.shape}", "one number")
    if x.dtype == np.uint8:
        x = _scaled(x[:, None] if x.ndim == 3 else x, 127.5, 1)  # (n, H, W) -> (n, 1, H, W)
    elif x.dtype.kind != "f":
        raise bad(path, f"x of dtype {x.dtype}", "uint8 or float")
    x = np.asarray(x, dtype=np.float32, order="C")
    subject = None if subject is None else subject.astype(np.int64)
    return check_examples(Examples(x, y, int(num_classes.item()), subject), str(path))


def _first(folder: Path, *names: str) -> Path | None:
    paths = (folder / f"{name}{ending}" for name in names for ending in ("", ".gz"))
    return next((path for path in paths if path.is_file()), None)


def _read_idx_pair(images: Path) -> Examples:
    name = images.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    labels = _first(images.parent, name)
    if labels is None:
        raise bad(images, "no labels", f"{name} or {name}.gz beside it", "copy it there")
    x = _scaled(_read_idx(images, 3)[:, None], 127.5, 1)  # (n, H, W) -> (n, 1, H, W)
    y = _read_idx(labels, 1).astype(np.int64)
    return check_examples(Examples(x, y, int(y.max()) + 1), f"{images} with {labels.name}")


def _read_idx(path: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes: magic 0x0000080N, N sizes of 4 bytes big endian, the data."""
    header_bytes = 4 + 4 * num_dims
    magic = (0x0800 + num_dims).to_bytes(4, "big")
    with mapped(path, "an IDX file, gzip if named .gz"):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:4] != magic[: len(raw)]:
        raise bad(path, f"first bytes {raw[:4].hex()}", f"{magic.hex()} (IDX, gzip if named .gz)")
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header_bytes, 4)]
    num_bytes = header_bytes + math.prod(shape)
    if len(raw) != num_bytes or 0 in shape:
        step = "empty or truncated, copy the file again"
        raise bad(path, f"{len(raw)} bytes", f"{num_bytes} for sizes {shape}, none 0", step)
    return np.frombuffer(raw, dtype=np.uint8, offset=header_bytes).reshape(shape)


def _read_unimib(path: Path) -> Examples:
    """UniMiB SHAR, both releases; the window (51 or 151) is taken from the data.

    early: data (3n, window), one row per axis; labels (3n, 2) class, subject, three alike.
    later: data (n, 3 * window), x then y then z; labels (n, 3) class, subject, trial."""
    kind = path.name.removesuffix("_data.mat")
    data = _read_mat(path, f"{kind}_data")
    raw_labels = _read_mat(path.with_name(f"{kind}_labels.mat"), f"{kind}_labels")
    (rows, columns), shape = data.shape, raw_labels.shape
    is_early = shape == (rows, 2) and rows % 3 == 0
    is_later = shape == (rows, 3) and columns % 3 == 0
    if data.size == 0 or not (is_early or is_later):
        expected = "(3n, window) with (3n, 2), or (n, 3 * window) with (n, 3)"
        raise bad(path, f"data {data.shape} with labels {shape}", expected)
    with np.errstate(all="ignore"):  # NaN differs from whatever integer it becomes
        labels = raw_labels.astype(np.int64)
    labels = labels.reshape(-1, 3 if is_early else 1, shape[1])  # (n, rows of a sample, columns)
    if (labels.reshape(shape) != raw_labels).any() or (labels != labels[:, :1]).any():
        got = "labels that are fractional or differ within a sample"
        raise bad(path, got, "integers, the same in all rows of a sample")
    x = _scaled(data.reshape(-1, 3, columns if is_early else columns // 3), TWO_G, 0)
    y, subject = labels[:, 0, 0] - 1, labels[:, 0, 1].copy()
    return check_examples(Examples(x, y, UNIMIB_CLASSES[kind], subject), str(path))


def _read_mat(path: Path, variable: str) -> npt.NDArray[Any]:
    """A real 2-D matrix of a MATLAB 5 file. Not by scipy.io.loadmat: scipy 1.17 looks data types up
    without a bound, so one wrong byte ends the process by a segmentation fault."""
    expected = f"a little-endian MATLAB 5 file with the matrix {variable}"
    with mapped(path, expected):
        raw = path.read_bytes()
        if raw[124:128] != b"\x00\x01IM":
            raise bad(path, f"version bytes {raw[124:128]!r}", expected)
        matrices = [body for kind, body in _mat_elements(raw[128:]) if kind == MAT_MATRIX]
        variables = [list(_mat_elements(body)) for body in matrices]
        found = {parts[2][1].decode("latin-1"): parts for parts in variables if len(parts) > 3}
        if variable not in found:
            raise bad(path, f"variables {sorted(found)}", expected)
        (_, flags), (_, sizes), _, (kind, values) = found[variable][:4]
        shape = np.frombuffer(sizes, dtype="<i4").tolist()
        if len(shape) != 2 or not 6 <= flags[0] <= 15 or flags[1] & 8:  # 6..15: double to uint64
            got = f"{variable} of shape {tuple(shape)}, class {flags[0]}, flags {flags[1]}"
            raise bad(path, got, f"{expected}, of real numbers")
        matrix: npt.NDArray[Any] = np.frombuffer(values, MAT_DTYPES[kind]).reshape(shape, order="F")
        return matrix


def _mat_elements(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of the elements of a MATLAB 5 file or matrix; compressed ones unpacked."""
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
            yield from _mat_elements(zlib.decompress(content))
        else:
            yield kind, content
