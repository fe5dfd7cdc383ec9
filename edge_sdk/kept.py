"""A finished update on the device's disk until the coordinator has accepted it, so that a reboot
does not cost the training. One at a time: the folder grows to the size of one update."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

import msgspec
import torch

from edge_sdk.tensors import Sender, views
from edge_sdk.wire import Job, Struct, Update, layout

log = logging.getLogger(__name__)


class _Finished(Struct, frozen=True, kw_only=True):
    job: Job
    update: Update


class Kept:
    """folder: this device's own, made when needed; None: nothing is kept. What cannot be written or
    read is as if it were not there: the device then trains again."""

    def __init__(self, folder: Path | None) -> None:
        self._data = folder / "update.data" if folder else None
        self._about = folder / "update.json" if folder else None

    def save(self, job: Job, update: Update, sender: Sender) -> None:
        if self._data is None or self._about is None:
            return
        try:
            self._data.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._about.unlink(missing_ok=True)
            with os.fdopen(_private(self._data), "wb") as file:
                for index in range(sender.num_parts):
                    file.write(sender.part(index))
            with os.fdopen(_private(self._about), "wb") as file:  # last: it makes the rest count
                file.write(msgspec.json.encode(_Finished(job=job, update=update)))
        except OSError as error:
            log.warning("the update is not kept over a restart: %s: %s", self._data, error)
            self.forget()

    def load(self) -> tuple[Job, Update, Sender] | None:
        """What was finished before this process began, if it is whole."""
        if self._data is None or self._about is None:
            return None
        try:
            found = msgspec.json.decode(self._about.read_bytes(), type=_Finished)
            size = layout(found.update.tensors)[1]
            if self._data.stat().st_size != size:
                return None
            stream = torch.frombuffer(bytearray(self._data.read_bytes()), dtype=torch.uint8)
        except (OSError, ValueError, msgspec.MsgspecError):
            return None
        sender = Sender(views(found.update.tensors, stream))
        if sender.digest() != found.update.digest:
            log.warning("%s is damaged and left out", self._data)
            return None
        return found.job, found.update, sender

    def forget(self) -> None:
        for path in (self._about, self._data):
            if path is not None:
                with suppress(OSError):
                    path.unlink(missing_ok=True)


def _private(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
