"""The small files beside the coordinator's keys: who is admitted, invited, or was turned away.

Each is replaced whole, so a reader sees the old or the new text; whoever changes one by what is in
it holds the folder's lock, as the command line and a coordinator that serves write the same files.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeAlias

from msgspec import Meta

# Time of the last change in ns, size in bytes, inode: a new key has the old one's length, and two
# changes within a tick of the kernel's clock the same time.
Stamp: TypeAlias = tuple[int, int, int]
NOWHERE: Stamp = (0, -1, 0)
WHOLE_AGE_NS = 10**9
Time: TypeAlias = Annotated[float, Meta(ge=0, le=2**37)]  # seconds of UTC since 1970, to year 6325


def stamp_of(path: Path) -> Stamp:
    """NOWHERE: there is no such file, or it cannot be looked at."""
    try:
        stat = path.stat()
    except OSError:
        return NOWHERE
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


@contextlib.contextmanager
def locked(folder: Path, *, is_patient: bool = True) -> Iterator[None]:
    """Nobody else changes files of this folder meanwhile. It is made if it is not there.

    Raises OSError; BlockingIOError when another holds the lock and is_patient is not set."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o755)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if is_patient else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system that cannot lock a folder, as NFS: the replacing is still whole
        yield
    finally:
        os.close(handle)


def replace_text(path: Path, text: str, mode: int | None = None) -> None:
    """Whole or not at all, and on the disk when it returns. mode None: that of the old file, or
    what the umask allows. What root writes belongs to whom the old file or the folder does. The
    file's time is WHOLE_AGE_NS ago, as nobody is writing to it any more.

    Raises OSError."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    is_new = stamp_of(path) == NOWHERE
    try:
        handle = os.open(
            draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, mode or 0o666
        )
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            if os.geteuid() == 0:
                owner = (path.parent if is_new else path).stat()
                os.fchown(handle, owner.st_uid, owner.st_gid)
            if mode is not None:
                os.fchmod(handle, mode)
            elif not is_new:
                shutil.copymode(path, draft)
            stream.write(text)
            stream.flush()
            before = time.time_ns() - WHOLE_AGE_NS
            os.utime(handle, ns=(before, before))
            os.fsync(handle)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is written; only a power cut could bring the old back
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
