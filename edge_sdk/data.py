"""Data sets and shards: read, check, scale, split, and divide among clients. All numpy.

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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_sdk.errors import ConfigError, DataError, EdgeError

Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]

TEST_FRACTION = 0.2
MAX_CLASSES = 1_000_000  # as in wire.ModelSpec; larger labels are something else, e.g. hashes
DIRICHLET_DRAWS = 100
MAX_ALPHA = 1e12  # shares are equal to 1e-6 there; numpy's gamma draws overflow near 1e308
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
_PURPOSES = ("split", "train subset", "test subset", "iid", "dirichlet", "subject")


@dataclass(frozen=True, eq=False)
class Examples:
    """Inputs and labels: x (n, C, H, W) or (n, C, window) float32, y (n,) int64 in
    0..num_classes - 1, subject (n,) int64 or None: who was measured."""

    x: Floats
    y: Ints
    num_classes: int
    subject: Ints | None = None

    def __len__(self) -> int:
        return len(self.y)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, (C, H, W) or (C, window)."""
        return self.x.shape[1:]

    def take(self, indices: Ints) -> Examples:
        """The examples at `indices`, in that order, as copies."""
        subject = None if self.subject is None else self.subject[indices]
        return replace(self, x=self.x[indices], y=self.y[indices], subject=subject)

    def label_counts(self) -> Ints:
        """Examples per class, (num_classes,). Zeros are legitimate: clients may be skewed."""
        return np.bincount(self.y, minlength=self.num_classes).astype(np.int64)


@dataclass(frozen=True, eq=False)
class DataSet:
    """A named data set with its test part; both have the same input_shape and num_classes."""

    name: str
    train: Examples
    test: Examples


Reader: TypeAlias = Callable[[], Examples]


def load(source: str) -> tuple[str, Examples, Examples | None]:
    """Name, train part (or all there is) and official test part, if the source has one.

    source: one of KINDS. Raises DataError if it is missing, corrupt or of another kind, and
    ConfigError if reading it needs a package that is not installed."""
    name, read_train, read_test = _readers(source)
    train = read_train()
    if read_test is None:
        return name, train, None
    test = read_test()
    if train.input_shape != test.input_shape:
        raise _bad(source, f"test inputs {test.input_shape}", f"{train.input_shape} as in train")
    num_classes = max(train.num_classes, test.num_classes)
    return name, replace(train, num_classes=num_classes), replace(test, num_classes=num_classes)


def load_dataset(
    source: str, seed: int, examples: int | None = None, test_examples: int | None = None
) -> DataSet:
    """A data set with a test part: the official one, else a stratified 20 % drawn from `seed`.

    The drawn part mixes subjects between train and test. examples, test_examples: sizes of
    stratified subsets drawn from `seed`; None takes all."""
    name, train, test = load(source)
    if test is None:
        train_indices, test_indices = stratified_split(train.y, TEST_FRACTION, seed)
        train, test = train.take(train_indices), train.take(test_indices)
    train = _subset(train, examples, seed, "train subset")
    return DataSet(name, train, _subset(test, test_examples, seed, "test subset"))


def load_shard(source: str) -> Examples:
    """A device's own data, all of it for training; a test part of the source is not read."""
    return _readers(source)[1]()


def save_shard(path: str | os.PathLike[str], examples: Examples) -> None:
    """Writes an .npz that `load_shard` reads back bit for bit; whole or not at all."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ConfigError(f"shard file {path}: expected a name that ends in .npz")
    check_examples(examples, str(path))
    arrays = {"x": examples.x, "y": examples.y, "num_classes": np.int64(examples.num_classes)}
    if examples.subject is not None:
        arrays["subject"] = examples.subject
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _mapped(path, "to write the shard", "check the folder, its rights and its free space"):
        try:
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def check_examples(examples: Examples, where: str) -> Examples:
    """The same examples, if they are as `Examples` promises; else DataError naming `where`.

    Checks shapes, dtypes, lengths, label range, finite values. A single class is no error."""
    x, y, num_classes = examples.x, examples.y, examples.num_classes
    if x.ndim not in (3, 4) or x.dtype != np.float32:
        wanted = "(n, C, H, W) or (n, C, window) of float32"
        raise _bad(where, f"x of shape {x.shape}, {x.dtype}", wanted)
    if 0 in x.shape:
        raise _bad(where, f"empty data, x of shape {x.shape}", "at least one example")
    for name, array in (("y", y), ("subject", y if examples.subject is None else examples.subject)):
        if array.shape != x.shape[:1] or array.dtype != np.int64:
            wanted = f"{x.shape[:1]} of int64, one for each example in x"
            raise _bad(where, f"{name} of shape {array.shape}, {array.dtype}", wanted)
    if not 1 <= num_classes <= MAX_CLASSES:
        raise _bad(where, f"{num_classes} classes", f"1 to {MAX_CLASSES}")
    if y.min() < 0 or y.max() >= num_classes:
        raise _bad(where, f"labels from {y.min()} to {y.max()}", f"0 to {num_classes - 1}")
    is_bad = ~np.isfinite(x).all(axis=tuple(range(1, x.ndim)))  # (n,)
    if is_bad.any():
        got = f"NaN or infinite values in {is_bad.sum()} examples, first at {is_bad.argmax()}"
        raise _bad(where, got, "finite numbers", "remove or repair these examples")
    return examples


def stratified_split(y: Ints, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """Sorted train and test indices; test is `fraction` of every class, to one example.

    A class keeps at least one example in train. Raises DataError if test would be empty."""
    if not 0 < fraction < 1:
        raise ConfigError(f"test fraction is {fraction}, expected between 0 and 1")
    counts = np.unique(y, return_counts=True)[1]
    size = min(max(1, round(fraction * len(y))), len(y) - len(counts))
    if size < 1:
        got = f"{len(y)} examples of {len(counts)} classes"
        raise _bad("train and test split", got, "two of one class at least", "add examples")
    test = _stratified(y, size, 1, _generator(seed, "split"))
    return np.setdiff1d(np.arange(len(y)), test), test


def partition_iid(n: int, num_clients: int, seed: int) -> list[Ints]:
    """Sorted indices per client: 0..n - 1 shuffled and cut into parts equal to one example."""
    _check_clients(n, num_clients, 1)
    order = _generator(seed, "iid").permutation(n)
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def partition_dirichlet(
    y: Ints, num_clients: int, alpha: float, seed: int, min_examples: int = 10
) -> list[Ints]:
    """Sorted indices per client; each class is shared out by proportions ~ Dirichlet(alpha).

    Proportions are drawn anew until every client has `min_examples`, at most DIRICHLET_DRAWS
    times: published code draws without bound, and at alpha 0.1 may never end. After that, examples
    move one by one from the largest shard of the last draw to the smallest."""
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"Dirichlet alpha is {alpha}, expected a finite number above 0")
    _check_clients(len(y), num_clients, min_examples)
    rng = _generator(seed, "dirichlet")
    counts = np.unique(y, return_counts=True)[1]
    concentration = np.full(num_clients, min(alpha, MAX_ALPHA))
    for _ in range(DIRICHLET_DRAWS):
        shares = rng.dirichlet(concentration, size=len(counts))  # (classes, clients)
        cuts = np.floor(shares.cumsum(axis=1) * counts[:, None]).astype(np.int64)
        cuts[:, -1] = counts  # the sum of the shares may round to below 1
        sizes = np.diff(cuts, axis=1, prepend=0)
        if sizes.sum(axis=0).min() >= min_examples:
            break
    order = rng.permutation(len(y))
    by_class = order[np.argsort(y[order], kind="stable")]  # shuffled within each class
    owner = np.empty(len(y), dtype=np.int64)  # the client that gets each example
    owner[by_class] = np.tile(np.arange(num_clients), len(counts)).repeat(sizes.ravel())
    shards = [order[owner[order] == client].tolist() for client in range(num_clients)]
    while len(smallest := min(shards, key=len)) < min_examples:
        smallest.append(max(shards, key=len).pop())
    return [np.sort(np.array(shard, dtype=np.int64)) for shard in shards]


def partition_by_subject(subject: Ints | None, num_clients: int, seed: int) -> list[Ints]:
    """Sorted indices per client; whole subjects, as many for each client, to one subject."""
    if subject is None:
        raise ConfigError("this data set has no subjects; choose an iid or Dirichlet partition")
    subjects = np.unique(subject)
    if not 1 <= num_clients <= len(subjects):
        raise ConfigError(f"got {num_clients} clients, expected 1 to {len(subjects)}, the subjects")
    order = _generator(seed, "subject").permutation(subjects)
    return [np.flatnonzero(np.isin(subject, part)) for part in np.array_split(order, num_clients)]


def _check_clients(n: int, num_clients: int, min_examples: int) -> None:
    got = f"partition: got {num_clients} clients with at least {min_examples} examples each"
    if num_clients < 1 or min_examples < 1:
        raise ConfigError(f"{got}, expected 1 or more of both")
    if num_clients * min_examples > n:
        raise ConfigError(f"{got}, expected at most {n} in all; take fewer clients or examples")


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """One stream per purpose, so that one draw does not depend on whether another was made."""
    if seed < 0:
        raise ConfigError(f"seed is {seed}, expected 0 or more")
    stream = (_PURPOSES.index(purpose),)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _stratified(y: Ints, size: int, spared: int, rng: np.random.Generator) -> Ints:
    """Sorted indices of `size` examples, shared over the classes by largest remainders; leaves
    `spared` of each class, so `size` is at most len(y) - spared * classes."""
    labels, counts = np.unique(y, return_counts=True)
    quota = counts * (size / len(y))
    chosen = np.minimum(np.floor(quota).astype(np.int64), counts - spared)
    while chosen.sum() < size:
        chosen[np.where(chosen < counts - spared, quota - chosen, -np.inf).argmax()] += 1
    pairs = zip(labels, chosen, strict=True)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == k))[:m] for k, m in pairs]))


def _subset(examples: Examples, size: int | None, seed: int, purpose: str) -> Examples:
    if size is None:
        return examples
    if not 1 <= size <= len(examples):
        raise ConfigError(f"{purpose} of {size} examples, expected 1 to {len(examples)}")
    return examples.take(_stratified(examples.y, size, 0, _generator(seed, purpose)))


def _bad(where: str | Path, got: str, expected: str, step: str = "correct the data") -> DataError:
    return DataError(f"{where}: got {got}, expected {expected}; {step}")


@contextmanager
def _mapped(path: Path, expected: str, step: str = "copy the file again") -> Iterator[None]:
    """Maps whatever a foreign reader raises to one DataError. On corrupt files numpy, zipfile
    and zlib raise a dozen unrelated types, hence `Exception`."""
    try:
        yield
    except EdgeError:
        raise
    except Exception as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise _bad(path, f"{type(error).__name__} ({reason})", expected, step) from error


def _optional(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        how = 'run pip install "edge-sdk[data]"'
        raise ConfigError(f"this data needs {module}, which is not installed; {how}") from error


def _readers(source: str) -> tuple[str, Reader, Reader | None]:
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
        return _readers(str(mats[0]))
    if mats:
        got = ", ".join(path.name for path in mats)
        raise _bad(folder, got, "one of them", "give the path of the one to use")
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
    with _mapped(path, expected), path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise _bad(path, "a single .npy array", expected)
        if not {"x", "y"} <= set(archive.files):
            raise _bad(path, f"arrays {archive.files}", expected)
        names = {"x", "y", "num_classes", "subject"}.intersection(archive.files)
        arrays = {name: np.asarray(archive[name]) for name in names}
    for name in names - {"x"}:
        if arrays[name].dtype.kind not in "iu":
            raise _bad(path, f"{name} of dtype {arrays[name].dtype}", "integers")
    x, y, subject = arrays["x"], arrays["y"].astype(np.int64), arrays.get("subject")
    num_classes = arrays.get("num_classes", np.asarray(int(y.max(initial=0)) + 1))
    if num_classes.size != 1:
        raise _bad(path, f"num_classes of shape {num_classes.shape}", "one number")
    if x.dtype == np.uint8:
        x = _scaled(x[:, None] if x.ndim == 3 else x, 127.5, 1)  # (n, H, W) -> (n, 1, H, W)
    elif x.dtype.kind != "f":
        raise _bad(path, f"x of dtype {x.dtype}", "uint8 or float")
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
        raise _bad(images, "no labels", f"{name} or {name}.gz beside it", "copy it there")
    x = _scaled(_read_idx(images, 3)[:, None], 127.5, 1)  # (n, H, W) -> (n, 1, H, W)
    y = _read_idx(labels, 1).astype(np.int64)
    return check_examples(Examples(x, y, int(y.max()) + 1), f"{images} with {labels.name}")


def _read_idx(path: Path, num_dims: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes: magic 0x0000080N, N sizes of 4 bytes big endian, the data."""
    header_bytes = 4 + 4 * num_dims
    magic = (0x0800 + num_dims).to_bytes(4, "big")
    with _mapped(path, "an IDX file, gzip if named .gz"):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if raw[:4] != magic[: len(raw)]:
        raise _bad(path, f"first bytes {raw[:4].hex()}", f"{magic.hex()} (IDX, gzip if named .gz)")
    shape = [int.from_bytes(raw[at : at + 4], "big") for at in range(4, header_bytes, 4)]
    num_bytes = header_bytes + math.prod(shape)
    if len(raw) != num_bytes or 0 in shape:
        step = "empty or truncated, copy the file again"
        raise _bad(path, f"{len(raw)} bytes", f"{num_bytes} for sizes {shape}, none 0", step)
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
        raise _bad(path, f"data {data.shape} with labels {shape}", expected)
    with np.errstate(all="ignore"):  # NaN differs from whatever integer it becomes
        labels = raw_labels.astype(np.int64)
    labels = labels.reshape(-1, 3 if is_early else 1, shape[1])  # (n, rows of a sample, columns)
    if (labels.reshape(shape) != raw_labels).any() or (labels != labels[:, :1]).any():
        got = "labels that are fractional or differ within a sample"
        raise _bad(path, got, "integers, the same in all rows of a sample")
    x = _scaled(data.reshape(-1, 3, columns if is_early else columns // 3), TWO_G, 0)
    y, subject = labels[:, 0, 0] - 1, labels[:, 0, 1].copy()
    return check_examples(Examples(x, y, UNIMIB_CLASSES[kind], subject), str(path))


def _read_mat(path: Path, variable: str) -> npt.NDArray[Any]:
    """A real 2-D matrix of a MATLAB 5 file. Not by scipy.io.loadmat: scipy 1.17 looks data types up
    without a bound, so one wrong byte ends the process by a segmentation fault."""
    expected = f"a little-endian MATLAB 5 file with the matrix {variable}"
    with _mapped(path, expected):
        raw = path.read_bytes()
        if raw[124:128] != b"\x00\x01IM":
            raise _bad(path, f"version bytes {raw[124:128]!r}", expected)
        matrices = [body for kind, body in _mat_elements(raw[128:]) if kind == MAT_MATRIX]
        variables = [list(_mat_elements(body)) for body in matrices]
        found = {parts[2][1].decode("latin-1"): parts for parts in variables if len(parts) > 3}
        if variable not in found:
            raise _bad(path, f"variables {sorted(found)}", expected)
        (_, flags), (_, sizes), _, (kind, values) = found[variable][:4]
        shape = np.frombuffer(sizes, dtype="<i4").tolist()
        if len(shape) != 2 or not 6 <= flags[0] <= 15 or flags[1] & 8:  # 6..15: double to uint64
            got = f"{variable} of shape {tuple(shape)}, class {flags[0]}, flags {flags[1]}"
            raise _bad(path, got, f"{expected}, of real numbers")
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
