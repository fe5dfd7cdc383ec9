"""Readers of published data sets by the names of their files; FILE_SETS is the table of them.

Scaling never depends on the shard, so that every device scales alike: uint8 to x / 127.5 - 1,
digits to x / 8 - 1, UniMiB SHAR to units of 2 g; float arrays are taken as they are. The
alternative, standardising by the shard's own mean, would feed one model inputs of other scales.
Class counts come from the source where it has them. IDX files, and .npz files without
`num_classes`, have only their largest label + 1, so hand skewed shards out with `save_shard`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from edge_sdk.data.examples import Examples, bad
from edge_sdk.data.readers.arrays import first_file, read_digits, read_idx_pair, read_npz
from edge_sdk.data.readers.binary import read_cifar_10, read_cifar_100, read_stl_10
from edge_sdk.data.readers.matlab import UNIMIB_CLASSES, read_svhn, read_unimib
from edge_sdk.data.readers.pickled import read_cifar_10_python, read_cifar_100_python
from edge_sdk.errors import DataError

__all__ = ["FILE_SETS", "KINDS", "FileSet", "Reader", "readers"]
Reader: TypeAlias = Callable[[], Examples]


@dataclass(frozen=True)
class FileSet:
    """A data set published as files of fixed names. Each file can also be named on its own;
    those in `alone` are read only then. No test files: the data set has no official test part."""

    name: str
    read: Callable[[Sequence[Path]], Examples]
    train: tuple[str, ...]
    test: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()


BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
FILE_SETS = (
    *(FileSet(f"unimib-shar-{k}", read_unimib, (f"{k}_data.mat",)) for k in UNIMIB_CLASSES),
    FileSet("svhn", read_svhn, ("train_32x32.mat",), ("test_32x32.mat",), ("extra_32x32.mat",)),
    FileSet("stl-10", read_stl_10, ("train_X.bin",), ("test_X.bin",)),
    FileSet("cifar-10", read_cifar_10, tuple(f"{b}.bin" for b in BATCHES), ("test_batch.bin",)),
    FileSet("cifar-10", read_cifar_10_python, BATCHES, ("test_batch",)),
    FileSet("cifar-100", read_cifar_100, ("train.bin",), ("test.bin",)),
    FileSet("cifar-100", read_cifar_100_python, ("train",), ("test",)),
)
KINDS = (
    '"digits"; a file *.npz or *images*idx3*; a directory with IDX (MNIST) files, with train.npz, '
    "or with one of "
    + ", ".join(f"{files.train[0]} ({files.name})" for files in FILE_SETS)
    + "; or the path of one of these files"
)


def readers(source: str) -> tuple[str, Reader, Reader | None]:
    """Name, reader of the train part, reader of the test part; reads nothing yet."""
    if source == "digits":
        return "digits", read_digits, None
    path = Path(os.path.expanduser(source))
    if source and os.path.isdir(path):
        return _directory_readers(path)
    if not os.path.isfile(path):
        raise DataError(f"data {source!r}: no such file, directory or name; known are {KINDS}")
    if path.suffix == ".npz":
        return path.stem, partial(read_npz, path), None
    for files in FILE_SETS:
        if path.name in (*files.train, *files.test, *files.alone):
            return files.name, partial(files.read, [path]), None
    if "images" in path.name and "idx3" in path.name:
        return path.resolve().parent.name, partial(read_idx_pair, path), None
    raise DataError(f"data {source!r}: a file of unknown kind; known are {KINDS}")


def _directory_readers(folder: Path) -> tuple[str, Reader, Reader | None]:
    stems = ("{}-images-idx3-ubyte", "{}-images.idx3-ubyte")
    name = folder.resolve().name
    idx, test = (first_file(folder, *(s.format(part) for s in stems)) for part in ("train", "t10k"))
    if idx:
        return name, partial(read_idx_pair, idx), partial(read_idx_pair, test) if test else None
    found = [files for files in FILE_SETS if _any_file(folder, files.train)]
    if len(found) > 1:
        got = ", ".join(files.train[0] for files in found)
        step = "give the path of the one to use, or move it to a folder of its own"
        raise bad(folder, got, "one of them", step)
    if found:
        return _file_set_readers(folder, found[0])
    train, test = folder / "train.npz", folder / "test.npz"
    if train.is_file():
        return name, partial(read_npz, train), partial(read_npz, test) if test.is_file() else None
    raise DataError(f"{folder}: got a directory without data files; known are {KINDS}")


def _file_set_readers(folder: Path, files: FileSet) -> tuple[str, Reader, Reader | None]:
    train = partial(files.read, [folder / name for name in files.train])
    test = partial(files.read, [folder / name for name in files.test])
    return files.name, train, test if _any_file(folder, files.test) else None


def _any_file(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)
