"""One process writes in a run's folder. The lock goes with the process, however that ends."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edge_sdk.errors import StoreError
from edge_sdk.helpers.files import lock

LOCK = "lock"
TOO_MANY = (errno.EMFILE, errno.ENFILE)
DESCRIPTOR_S = 10.0


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What fails meanwhile is a StoreError about this file or folder."""
    try:
        _wait_for_descriptor()
        yield
    except (OSError, RuntimeError) as error:
        step = "free space or make it writable"
        if getattr(error, "errno", 0) in TOO_MANY:
            step = "raise the limit of open files with ulimit -Hn, or LimitNOFILE= of a service"
        raise StoreError(
            f"{path} cannot be written: {error}; {step}; go on with --resume"
        ) from error


def _wait_for_descriptor() -> None:
    """Connections that come all at once may take the last one, for the moment that it takes to end
    them. Raises OSError where none is free for DESCRIPTOR_S."""
    give_up = time.monotonic() + DESCRIPTOR_S
    while True:
        try:
            os.close(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            return
        except OSError as error:
            if error.errno not in TOO_MANY or time.monotonic() > give_up:
                raise
        time.sleep(0.01)


class RunLock:
    """Raises StoreError if another process has it, or the folder cannot be written."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        with writing(self._path):
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            lock(self._file)
            os.ftruncate(self._file, 0)
            os.write(self._file, f"{os.getpid()}\n".encode())
        except BlockingIOError as error:
            owner = os.read(self._file, 20).decode(errors="replace").strip() or "?"
            self.release()
            raise StoreError(
                f"{folder} is in use by process {owner}; stop it first, or choose another --run-dir"
            ) from error
        except OSError:  # a full disk: the lock holds without the number
            pass

    @staticmethod
    def holder(folder: Path) -> int | None:
        """The process that has a run's folder, None if none has."""
        try:
            pid = int((folder / LOCK).read_text())
            os.kill(pid, 0)
        except PermissionError:
            return pid
        except (OSError, ValueError):
            return None
        return pid

    def check(self) -> None:
        """Raise StoreError if the folder is no longer the one that was locked."""
        with suppress(OSError):
            if os.path.samestat(self._path.stat(), os.fstat(self._file)):
                return
        raise StoreError(
            f"{self._path.parent} was deleted or replaced while this run was at work, so nothing "
            "more is written there; put the run's folder back and go on with --resume, or start "
            "another run"
        )

    def release(self) -> None:
        os.close(self._file)
