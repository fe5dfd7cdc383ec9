"""Files that lie in a folder for each class, as FOLDER/cat/1.png: which they are, and what the
classes are called.

A link that leads out of the folder is refused: a copy of the folder on another device would lack
the file, and a link in an archive from elsewhere could bring a private file into training."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.data.bounded import shown
from edge_sdk.data.contract import bad, checked_names

log = logging.getLogger(__name__)
JUNK = ("thumbs.db", "desktop.ini", "__macosx")  # what systems leave behind, beside hidden files
PARTS = ("train", "test")


@dataclass(frozen=True)
class ClassFiles:
    """class_names: of all classes, in the order of their labels. files: each with its label, by
    class and name, in one order on every system; at least one."""

    class_names: tuple[str, ...]
    files: Sequence[tuple[Path, int]]


def class_files(root: Path, endings: Collection[str], classes: Sequence[str] = ()) -> ClassFiles:
    """The files of these endings in the folders of `root`. classes: the names of all classes; ():
    those of the folders, sorted. Raises DataError, and OSError for what may not be read."""
    folders, others = _inside(root)
    for path in folders:
        _check_link(root, path)
    names = checked_names(classes or [path.name for path in folders], str(root))
    if unknown := {path.name for path in folders} - set(names):
        step = "name it in classes of data.toml, on every device, or move it elsewhere"
        raise bad(root, f"the folder {min(unknown)!r:.60}", "a name of classes", step)
    if beside := [path.name for path in others if ending_of(path) in endings]:
        log.warning("%s: %s lie in no folder of a class and are not read", root, shown(beside))
    files = []
    for folder in folders:
        found = _files(root, folder, endings)
        files += [(path, names.index(folder.name)) for path in found]
        if not found:
            said = "%s: no %s in it; this device has none of that class"
            log.warning(said, folder, " or ".join(endings))
    if not files:
        raise bad(root, "no file in the folders of the classes", " or ".join(endings), "add some")
    return ClassFiles(names, files)


def _files(root: Path, folder: Path, endings: Collection[str]) -> list[Path]:
    folders, files = _inside(folder)
    if folders:
        step = "put the files of a class into its folder, with no other folder in it"
        raise bad(folders[0], "a folder within that of a class", "files alone", step)
    for path in files:
        _check_link(root, path)
        if not path.is_file():
            raise bad(path, "no regular file", "a file that can be read", "remove it")
    if other := [path.name for path in files if ending_of(path) not in endings]:
        log.warning("%s: %s are not read; known: %s", folder, shown(other), ", ".join(endings))
    return [path for path in files if ending_of(path) in endings]


def _check_link(root: Path, path: Path) -> None:
    """Raise DataError for a link that leads nowhere or out of root."""
    if not path.is_symlink():
        return
    target = path.resolve()
    if not target.exists():
        raise bad(path, "a link to nothing", "a file", "remove it, or copy the file there")
    if not target.is_relative_to(root.resolve()):
        got = f"a link that leads out of {root}"
        raise bad(path, got, "a file in it, as a copy on another device lacks it", "copy it there")


def _inside(folder: Path) -> tuple[list[Path], list[Path]]:
    """Folders and others, sorted, without what systems leave behind."""
    paths = [
        path
        for path in sorted(folder.iterdir(), key=lambda path: path.name)
        if not path.name.startswith(".") and path.name.lower() not in JUNK
    ]
    return [p for p in paths if p.is_dir()], [p for p in paths if not p.is_dir()]


def ending_of(path: Path) -> str:
    return path.suffix.lower()


def parts_of(folder: Path) -> tuple[Path, Path | None]:
    """Where the classes of the train and the test part lie: in `train` and `test`, where there is a
    `train` with folders in it, else in the folder itself and nowhere. Raises OSError."""
    train, test = (folder / part for part in PARTS)
    if not _has_folders(train):
        return folder, None
    if other := [path.name for path in _inside(folder)[0] if path.name not in PARTS]:
        log.warning("%s: %s beside train and test are not read", folder, shown(other))
    if not test.is_dir():
        return train, None
    if not _has_folders(test):
        step = "put each file into the folder of its class, or move the folder elsewhere"
        raise bad(test, "no folders in it", "one for each class, as in train", step)
    return train, test


def _has_folders(folder: Path) -> bool:
    return folder.is_dir() and bool(_inside(folder)[0])


def endings_within(root: Path) -> set[str]:
    """Of all files in the folders of root. Raises OSError."""
    return {ending_of(path) for folder in _inside(root)[0] for path in _inside(folder)[1]}
