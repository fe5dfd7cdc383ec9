"""Files that are written whole: who reads one, or is killed while writing it, finds the old content
or the new one and never a mix.

The content goes into a draft beside the file, `.NAME.0.new`, which then takes the file's name. A
draft is locked while it is written, so what a killed writer left is told from what another writes
just now: the next writer removes the first, and for the second takes the next number."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import logging
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from edge_sdk.errors import EdgeError, LackError, StoreError, UsageError
from edge_sdk.helpers.text import one_line, user_text

# Time of the last change in ns, size in bytes, inode: a new key has the old one's length, and two
# changes within a tick of the kernel's clock the same time.
Stamp: TypeAlias = tuple[int, int, int]
NOWHERE: Stamp = (0, -1, 0)
ADVICE = {  # where a file or folder cannot be written
    errno.EACCES: "give this user the right to, or choose another",
    errno.EPERM: "give this user the right to, or choose another",
    errno.ENOSPC: "free space, or choose another",
    errno.EDQUOT: "free space, or choose another",
    errno.EEXIST: "a file of that name is in the way; choose another",
    errno.ENAMETOOLONG: "choose a shorter one",
}
MOST_TEXT_BYTES = 1024**2  # of a text that a person writes
log = logging.getLogger(__name__)
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL  # so that a link put there meanwhile is not followed


def write_whole(
    path: Path,
    content: bytes | str,
    *,
    mode: int | None = None,
    owner_ids: tuple[int, int] | None = None,
    is_synced: bool = True,
) -> None:
    """As `replacing` does. Raises OSError; the file is then as it was."""
    with replacing(path, mode=mode, owner_ids=owner_ids, is_synced=is_synced) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(
    path: Path,
    *,
    mode: int | None = None,
    owner_ids: tuple[int, int] | None = None,
    is_synced: bool = True,
) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end, and vanishes after an error.

    mode: None is what the umask allows. owner_ids: user and group, None: whoever writes. is_synced:
    content and name are on the disk at the end. Raises OSError."""
    draft, handle = _draft(path, 0o666 if mode is None else mode)
    with open(draft, "wb", opener=lambda *_: handle) as file:
        try:
            if owner_ids is not None:
                os.fchown(handle, *owner_ids)
            if mode is not None:
                os.fchmod(handle, mode)
            yield file
            file.flush()
            if is_synced:
                os.fsync(handle)
            os.replace(draft, path)
        except BaseException:
            with suppress(OSError):  # on a read-only disk this fails too
                draft.unlink()
            raise
    if is_synced:
        sync(path.parent)


def check_writable(path: Path) -> None:
    """Raises the OSError with which writing this file would begin; changes nothing."""
    draft, handle = _draft(path, 0o600)
    try:
        draft.unlink()
    finally:
        os.close(handle)


def _draft(path: Path, mode: int) -> tuple[Path, int]:
    """Its path and handle; it is locked until that is closed. Raises OSError."""
    for number in itertools.count():
        draft = path.parent / f".{path.name}.{number}.new"  # with_name refuses "."
        with suppress(OSError):
            _remove_abandoned(draft)
        with suppress(FileExistsError):
            handle = os.open(draft, _NEW, mode)
            with suppress(OSError):  # another took it for abandoned before it was locked
                lock(handle)
                if _is_at(draft, handle):
                    break
            os.close(handle)
    return draft, handle


def _remove_abandoned(draft: Path) -> None:
    """Raises BlockingIOError while its writer lives, OSError."""
    with suppress(FileNotFoundError):
        handle = os.open(draft, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if lock(handle) and _is_at(draft, handle):
                draft.unlink()
        finally:
            os.close(handle)


def _is_at(path: Path, handle: int) -> bool:
    return os.path.samestat(os.lstat(path), os.fstat(handle))


def sync(path: Path) -> None:
    """A file's content, or the names in a folder, are on the disk. Nothing is done where this user
    may not read it, or the file system cannot sync a folder. Raises OSError."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def lock(handle: int, *, is_patient: bool = False) -> bool:
    """Take the lock of an open file or folder until it is closed, also by the process's end. False:
    its file system has no locks, as some NFS. Raises BlockingIOError if held, unless is_patient."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if is_patient else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextmanager
def locked(folder: Path, *, is_patient: bool = True) -> Iterator[None]:
    """Nobody else who asks for this lock has it meanwhile. The folder is made if it is not there.

    Raises OSError; BlockingIOError when another holds the lock and is_patient is not set."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, is_patient=is_patient)
        yield
    finally:
        os.close(handle)


def stamp_of(path: Path) -> Stamp:
    """NOWHERE: there is no such file, or it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return NOWHERE
    return found.st_mtime_ns, found.st_size, found.st_ino


def mode_of(path: Path, otherwise: int) -> int:
    """The permissions of a file that is there. Raises OSError."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError:
        return otherwise


def heir_of(path: Path) -> tuple[int, int] | None:
    """User and group to whom a file belongs that root writes here: the old file's, or the folder's.
    None: this user is not root. Raises OSError."""
    if os.geteuid() != 0:
        return None
    try:
        found = path.stat()
    except FileNotFoundError:
        found = path.parent.stat()
    return found.st_uid, found.st_gid


def read_user_text(path: Path, most_bytes: int = MOST_TEXT_BYTES) -> str:
    """The text of a person's file, as `user_text`. Waits for no writer of a pipe and holds no more
    than most_bytes. Raises OSError, also for what is no regular file, and UnicodeDecodeError."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as file:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "it is not a regular file", str(path))
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        most = f"it is larger than {most_bytes // 1024**2} MiB"
        raise OSError(errno.EFBIG, most, str(path))
    return user_text(content)


# -- with errors for people -----------------------------------------------------------------------


def write_struct(path: Path, value: Any) -> None:
    """A msgspec.Struct as one JSON file, whole or not at all. Raises StoreError."""
    import msgspec

    write_file(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def write_file(path: Path, content: bytes) -> None:
    """Whole or not at all. Raises StoreError."""
    try:
        make_parent(path)
        write_whole(path, content)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {why_not(error)}") from error


def check_output(path: Path, flag: str) -> None:
    """Raise now rather than after long work what writing this file would: UsageError, StoreError.
    Leaves nothing but its folder."""
    try:
        make_parent(path)
        if path.exists() and not path.is_file():
            raise UsageError(f"{flag} {path} is no file; give the name of one")
        check_writable(path)
    except OSError as error:
        raise StoreError(f"{flag} {path} cannot be written: {why_not(error)}") from error


def make_folder(folder: Path, flag: str) -> None:
    """With those above it, where they lack. Raises StoreError."""
    try:
        make_parent(folder / "-")
    except OSError as error:
        raise StoreError(f"{flag} {folder} cannot be made: {why_not(error)}") from error


def make_parent(path: Path) -> None:
    """The folder of a file that a person named, and those above it. Raises OSError."""
    if not path.parent.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        log.info("made the folder %s", path.parent)


def why_not(error: BaseException) -> str:
    """Why a file or folder cannot be written and what to do, without the names of drafts beside it
    that a foreign error shows."""
    said = getattr(error, "strerror", None) or one_line(str(error))
    return f"{said}; {ADVICE.get(getattr(error, 'errno', None) or 0, 'choose another')}"


def home() -> Path:
    """Raises LackError for a user who has none, as in a container without an entry for it."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise LackError("no home directory; set HOME, or give --keys and XDG_CACHE_HOME") from error


def is_there(path: Path, kind: type[EdgeError] = StoreError) -> bool:
    """Whether there is such a file or folder. Raises `kind` where nobody can tell, as in a folder
    that may not be read; `exists` then raises a foreign error or says no, by Python's version."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a path that holds NUL
        return False
    except OSError as error:
        step = "give another path, or this user the right to it"
        raise kind(f"{path} cannot be looked at: {error.strerror}; {step}") from error
    return True


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
