"""The table of readers: what `--data` may name, and which function reads it.

A reader's file puts its rows into the table by `register_reader`. Every file of this folder is
imported with the folder, so a new reader is one new file here; a reader of your own elsewhere is
imported by `--import MODULE`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TypeAlias

from edge_sdk.data.examples import Examples, bad
from edge_sdk.errors import DataError

Reader: TypeAlias = Callable[[], Examples]


@dataclass(frozen=True, kw_only=True)
class FileSet:
    """One row: data in files of known names, or, without `train`, a data set known by its name.

    read: from the files of one part to its examples. train, test: the files of the two parts in one
    folder; no test files: there is no official test part. alone: other names, or patterns such as
    *.npz, of files that are read only when they are named themselves. title: the data set's name by
    the path that was given, where `name` is a format's. rank: of several rows that fit a folder the
    lowest is read."""

    name: str
    read: Callable[[Sequence[Path]], Examples]
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    title: Callable[[Path], str] | None = None
    rank: int = 1

    def readers(self, source: Path, train: Sequence[Path], test: Sequence[Path] = ()) -> Readers:
        """The readers of these files; nothing is read yet. source: the path that was given."""
        title = self.title(source) if self.title else self.name
        return title, partial(self.read, train), partial(self.read, test) if test else None


Readers: TypeAlias = tuple[str, Reader, Reader | None]  # name, train part, test part
FILE_SETS: list[FileSet] = []


def register_reader(*rows: FileSet) -> None:
    """Put rows into the table, behind those that are there."""
    FILE_SETS.extend(rows)


def readers(source: str) -> Readers:
    """The data set's name and the readers of its parts; nothing is read yet. Raises DataError."""
    path = Path(os.path.expanduser(source))
    for row in FILE_SETS:
        if source == row.name and not row.train:
            return row.readers(path, [])
    if source and os.path.isdir(path):
        return _folder_readers(path)
    if not os.path.isfile(path):
        raise DataError(f"data {source!r}: no such file, directory or name; known are {known()}")
    for row in FILE_SETS:
        if any(fnmatchcase(path.name, name) for name in (*row.train, *row.test, *row.alone)):
            return row.readers(path, [path])
    raise DataError(f"data {source!r}: a file of unknown kind; known are {known()}")


def known() -> str:
    """What `--data` may be, in words."""
    names = [f'"{row.name}"' for row in FILE_SETS if not row.train]
    patterns = [name for row in FILE_SETS for name in row.alone if "*" in name]
    folders = [f"{row.train[0]} ({row.name})" for row in FILE_SETS if row.train]
    return (
        f"{', '.join(names)}; a file {' or '.join(patterns)}; a directory with one of "
        f"{', '.join(folders)}; or the path of one of these files"
    )


def _folder_readers(folder: Path) -> Readers:
    fitting = [row for row in FILE_SETS if _is_any_there(folder, row.train)]
    found = [row for row in fitting if row.rank == min(row.rank for row in fitting)]
    if not found:
        raise DataError(f"{folder}: got a directory without data files; known are {known()}")
    if len(found) > 1:
        got = ", ".join(row.train[0] for row in found)
        step = "give the path of the one to use, or move it to a folder of its own"
        raise bad(folder, got, "one of them", step)
    (row,) = found
    test = row.test if _is_any_there(folder, row.test) else ()
    return row.readers(folder, [folder / name for name in row.train], [folder / n for n in test])


def _is_any_there(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)
