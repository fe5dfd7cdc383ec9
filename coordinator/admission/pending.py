"""Devices that tried to connect with a key that is not in the list: `clients pending` shows them.

Anybody can make keys and knock, so the newest MOST are kept and the file is written at most once in
WRITE_S. It is a convenience: that it cannot be read or written is logged, and stops nothing.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from coordinator.admission.invitations import Time, write_private
from edge_sdk.errors import ConfigError
from edge_sdk.helpers.files import NOWHERE, locked, stamp_of
from edge_sdk.protocol.fields import CurveKey

log = logging.getLogger(__name__)
MOST = 100
WRITE_S = 1.0
RETRY_S = 60.0  # after a write that failed


class PendingKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """first and last: when it was seen, seconds of UTC since 1970."""

    public_key: CurveKey
    first: Time
    last: Time
    tries: Annotated[int, Meta(ge=1)] = 1


class PendingKeys:
    """Used by the authenticator's thread and the coordinator's."""

    def __init__(
        self,
        path: Path,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = path
        self._clock, self._timer = clock, timer
        self._due: float | None = None  # when to write; None: nothing is new
        self._written = -WRITE_S  # of `timer`
        self._has_failed = False
        self._lock = threading.Lock()
        try:
            found = read_pending(path)
        except ConfigError as error:
            log.warning("%s", error)
            found = []
        self._known = {pending_key.public_key: pending_key for pending_key in found}

    def note(self, public_key: bytes) -> None:
        """One of them has tried to connect."""
        key, now = public_key.decode(), self._clock()
        with self._lock:
            old = self._known.pop(key, None)  # the newest stands last
            first, tries = (old.first, old.tries + 1) if old else (now, 1)
            self._known[key] = PendingKey(public_key=key, first=first, last=now, tries=tries)
            while len(self._known) > MOST:
                del self._known[next(iter(self._known))]
            if self._due is None:
                self._due = self._written + WRITE_S

    def write_if_due(self, is_known: Callable[[bytes], bool], *, is_last: bool = False) -> None:
        """Write what is new, not too often. is_known: says of a key whether it has been
        admitted meanwhile; such a key is left out."""
        with self._lock:
            if self._due is None or (self._timer() < self._due and not is_last):
                return
            self._known = {k: s for k, s in self._known.items() if not is_known(k.encode())}
            self._due, self._written = None, self._timer()
            try:
                with locked(self.path.parent, is_patient=False):
                    # Rounds would wait for the disk as often as strangers knock.
                    write_private(self.path, list(self._known.values()), is_synced=False)
                self._has_failed = False
            except BlockingIOError:  # another changes the folder's files just now
                self._due = self._timer() + WRITE_S
            except OSError as error:
                if not self._has_failed:
                    log.warning("who was turned away is not kept: %s", error)
                self._has_failed = True
                self._due = self._timer() + RETRY_S


def read_pending(path: Path) -> list[PendingKey]:
    """The one seen last at the end; [] when there is no file. Raises ConfigError."""
    if stamp_of(path) == NOWHERE:
        return []
    try:
        found = msgspec.json.decode(path.read_bytes(), type=list[PendingKey])
    except PermissionError as error:
        raise ConfigError(
            f"pending keys in {path} cannot be read: {error.strerror}; run this as the user who "
            "runs the coordinator"
        ) from error
    except (OSError, ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(
            f"pending keys in {path} cannot be read: {error}; remove the file, it is made again"
        ) from error
    return sorted(found, key=lambda pending_key: pending_key.last)[-MOST:]


def forget_pending(path: Path, public_key: bytes) -> None:
    """Its key was admitted. A coordinator that serves leaves it out by itself."""
    try:
        with locked(path.parent):
            known = read_pending(path)
            left = [pending for pending in known if pending.public_key != public_key.decode()]
            if left != known:
                write_private(path, left)
    except (OSError, ConfigError) as error:
        log.warning("not taken off the pending keys: %s", error)
