"""The saved update: a finished one lies on the device's disk until the coordinator has accepted it,
so that a reboot does not cost the training. There is one at a time, so the folder grows to its
size.

A folder belongs to one agent. Its name tells the device and the coordinator
(setup.saved_updates_folder); a lock on it, which ends with the process, keeps off a second agent
that was told the same. Beside it stay the folders of the MOST_OTHERS coordinators that this device
last trained for: a board may have no clock, so their number is bounded and not their age."""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from edge_sdk.errors import CapacityError
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.helpers.files import lock, sync
from edge_sdk.protocol.fields import Struct
from edge_sdk.protocol.messages import Job, Update
from edge_sdk.protocol.stream import layout
from edge_sdk.protocol.tensors import Sender, views

log = logging.getLogger(__name__)
MOST_OTHERS = 3
DATA, ABOUT = "update.data", "update.json"
KEPT = "frozen"  # beside them, what never travels again (kept_tensors.py)
STATE = "state"  # beside them, what the client keeps between rounds (client_state.py)
COORDINATOR_MARK = re.compile(r"-[0-9a-f]{12}\Z")  # ends a folder's name, behind the device's name


class _Finished(Struct, frozen=True, kw_only=True):
    job: Job
    update: Update


class SavedUpdate:
    """folder: this agent's own, made when needed; None: nothing is saved. An update that cannot be
    written or read counts as not saved: the device then trains again."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._is_locked = False
        self._syncing: threading.Thread | None = None

    def save(self, job: Job, update: Update, sender: Sender) -> None:
        if self._folder is None:
            return
        data, about = _files(self._folder)
        try:
            self._folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._folder.mkdir(exist_ok=True, mode=0o700)
            self._lock(self._folder)
            forget_old_ones(self._folder)
            about.unlink(missing_ok=True)
            with os.fdopen(_private(data), "wb") as file:
                for index in range(sender.num_parts):
                    file.write(sender.part(index))
            with os.fdopen(_private(about), "wb") as file:  # last: it makes the rest count
                file.write(msgspec.json.encode(_Finished(job=job, update=update)))
            self._sync(data, about, self._folder)
        except OSError as error:
            why = _reason(error)
            log.warning("the update is not kept over a restart: %s: %s", self._folder, why)
            self.forget()

    def load(self) -> tuple[Job, Update, Sender] | None:
        """The saved update of a process before this one, with its job and tensors, if it is whole
        and there is memory for it."""
        if self._folder is None:
            return None
        data, about = _files(self._folder)
        try:
            self._lock(self._folder)
            found = msgspec.json.decode(about.read_bytes(), type=_Finished)
            with memory_errors("while reading an update"):
                sender = _read(data, found.update)
        except (CapacityError, BlockingIOError) as error:
            log.warning("%s is left out: %s", data, _reason(error))
            return None
        except OSError:
            return None
        except (ValueError, msgspec.MsgspecError):  # by another version, or not to its end
            self.forget()
            return None
        if sender.digest() != found.update.digest:
            log.warning("%s is damaged and left out", data)
            self.forget()
            return None
        return found.job, found.update, sender

    def forget(self) -> None:
        if self._folder is None:
            return
        data, about = _files(self._folder)
        with suppress(OSError):
            self._lock(self._folder)
            about.unlink(missing_ok=True)
            data.unlink(missing_ok=True)

    def _sync(self, *paths: Path) -> None:
        """Write the files through to the disk, as a board may lose power at any time. A card takes
        seconds for it, so the update is sent meanwhile; the order is free, as the digest tells
        whether an update is whole."""
        self._syncing = threading.Thread(target=_synced, args=paths, daemon=True)
        self._syncing.start()

    def _lock(self, folder: Path) -> None:
        """Lock the folder until this object or its process is gone. Raises OSError if there is no
        folder, or another agent has locked it."""
        if self._is_locked:
            return
        handle = os.open(folder, os.O_RDONLY)
        close = weakref.finalize(self, os.close, handle)
        try:
            lock(handle)
        except BlockingIOError as error:
            close()
            what = (
                "another agent with this device's name and coordinator uses it; give another --id"
            )
            raise BlockingIOError(errno.EAGAIN, what) from error
        os.register_at_fork(after_in_child=close)  # one that counts costs may live longer
        self._is_locked = True


def _reason(error: Exception) -> str:
    """Without the number of an OSError, which tells a person nothing."""
    return getattr(error, "strerror", None) or str(error)


def _files(folder: Path) -> tuple[Path, Path]:
    return folder / DATA, folder / ABOUT


def _synced(*paths: Path) -> None:
    for path in paths:
        with suppress(OSError):  # accepted meanwhile
            sync(path)


def forget_old_ones(folder: Path) -> None:
    """Remove this device's other folders, but for the newest of them and those in use."""
    try:
        others = [
            (other.stat().st_mtime_ns, other)
            for other in folder.parent.iterdir()
            if other != folder
            and COORDINATOR_MARK.sub("", other.name) == COORDINATOR_MARK.sub("", folder.name)
        ]
    except OSError as error:
        log.debug("%s cannot be looked at: %s", folder.parent, error)
        return
    for _, other in sorted(others, reverse=True)[MOST_OTHERS:]:
        with suppress(OSError):  # another user's, or in use
            _remove(other)


def _remove(folder: Path) -> None:
    """Remove a folder. Raises OSError; BlockingIOError while an agent has locked it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if lock(handle):
            for path in _files(folder):
                path.unlink(missing_ok=True)
            for inside in (STATE, KEPT):
                shutil.rmtree(folder / inside, ignore_errors=True)
            folder.rmdir()
    finally:
        os.close(handle)


def _read(data: Path, update: Update) -> Sender:
    """The update's tensors as views of the only copy of the file in memory. Raises ValueError for a
    file of another size, OSError."""
    size = layout(update.tensors)[1]
    if data.stat().st_size != size:
        raise ValueError(f"{data} is not of {size} bytes")
    stream = torch.empty(size, dtype=torch.uint8)
    with data.open("rb") as file:
        file.readinto(stream.numpy().data)
    return Sender(views(update.tensors, stream))


def _private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
