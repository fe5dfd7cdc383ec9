"""The table of readers: what `--data` may name, and which function reads it.

A reader's file puts its rows into the table by `register_reader`. Every file of this folder is
imported with the folder, so a new reader is one new file here; a reader of your own elsewhere is
imported by `--import MODULE`. A file's exact name goes before a pattern, and of two patterns that
fit the one that was registered last is taken, so that a reader of your own may read any name."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TypeAlias

from edge_sdk.data.examples import Examples, bad, mapped
from edge_sdk.data.readers.class_folders import endings_within, parts_of
from edge_sdk.errors import DataError

Reader: TypeAlias = Callable[[], Examples]


@dataclass(frozen=True, kw_only=True)
class FileSet:
    """One row: data in files of known names, or in a folder for each class, or, with neither, a
    data set known by its name.

    read: from the files of one part to its examples. train, test: the files of the two parts in one
    folder; no test files: there is no official test part. alone: other names, or patterns such as
    *.npz, of files that are read only when they are named themselves. by_class: endings, as .png,
    of files that lie in a folder for each class; `read` gets the one folder that holds those of the
    classes, and `train` and `test` folders in the one that was given are its parts. title: the data
    set's name by the path that was given, where `name` is a format's. rank: of several rows that
    fit a folder the lowest is read."""

    name: str
    read: Callable[[Sequence[Path]], Examples]
    train: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    alone: tuple[str, ...] = ()
    by_class: tuple[str, ...] = ()
    title: Callable[[Path], str] | None = None
    rank: int = 1

    @property
    def is_named(self) -> bool:
        """Whether `--data` gives its name rather than a path."""
        return not (self.train or self.by_class)

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
        if source == row.name and row.is_named:
            return row.readers(path, [])
    if source and os.path.isdir(path):
        return _folder_readers(path)
    if not os.path.isfile(path):
        raise DataError(f"data {source!r}: no such file, directory or name; known are {known()}")
    exact = (row for row in FILE_SETS if path.name in (*row.train, *row.test, *row.alone))
    fitting = (row for row in reversed(FILE_SETS) if _fits(path, row.alone))
    if found := next(exact, None) or next(fitting, None):
        return found.readers(path, [path])
    raise DataError(f"data {source!r}: a file of unknown kind; known are {known()}")


def known() -> str:
    """What `--data` may be, in words."""
    names = [f'"{row.name}"' for row in FILE_SETS if row.is_named]
    patterns = [name for row in FILE_SETS for name in row.alone if "*" in name]
    folders = [f"{row.train[0]} ({row.name})" for row in FILE_SETS if row.train]
    by_class = [f"{row.by_class[0]} ({row.name})" for row in FILE_SETS if row.by_class]
    return (
        f"{', '.join(names)}; a file {' or '.join(patterns)}; a directory with one of "
        f"{', '.join(folders)}; a directory with a folder for each class, of files "
        f"{', '.join(by_class)}; or the path of one of these files"
    )


def _fits(path: Path, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(path.name, pattern) for pattern in patterns)


def _is_alone(path: Path) -> bool:
    """Whether it is read when it is named itself."""
    return any(_fits(path, row.alone) for row in FILE_SETS) and path.is_file()


def _folder_readers(folder: Path) -> Readers:
    fitting = [row for row in FILE_SETS if _is_any_there(folder, row.train)]
    found = [row for row in fitting if row.rank == min(row.rank for row in fitting)]
    if not found:
        return _class_readers(folder)
    if len(found) > 1:
        got = ", ".join(row.train[0] for row in found)
        step = "give the path of the one to use, or move it to a folder of its own"
        raise bad(folder, got, "one of them", step)
    (row,) = found
    test = row.test if _is_any_there(folder, row.test) else ()
    return row.readers(folder, [folder / name for name in row.train], [folder / n for n in test])


def _class_readers(folder: Path) -> Readers:
    """Of a folder that holds one for each class, or `train` and perhaps `test` that do."""
    with mapped(folder, "a folder that may be read", "give this user the right to it"):
        train, test = parts_of(folder)
        endings = endings_within(train)
    found = [row for row in FILE_SETS if endings & set(row.by_class)]
    if not found:
        step = "give one of these"
        if named := sorted(path for path in folder.iterdir() if _is_alone(path)):
            step = f"name the file, {named[0]}, or call it as one of these"
        raise bad(folder, "a directory without data files", known(), step)
    if len(found) > 1:
        got = " and ".join(row.by_class[0] for row in found)
        raise bad(train, f"files {got} in its folders", "one kind", "move the others elsewhere")
    return found[0].readers(folder, [train], [test] if test else [])


def _is_any_there(folder: Path, names: Sequence[str]) -> bool:
    return any((folder / name).is_file() for name in names)
