"""Invitations: one-time keys with which a device that is not in the list may send `join`, once.

The file holds no secret: an invitation's public key, for which name, until when, and which device
used it. The secret is in the line that `edge-coordinator invite` prints, and nowhere else. A used
or expired invitation is remembered for a while, so that a device hears what is wrong with it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.files import NOWHERE, Stamp, heir_of, stamp_of, write_whole
from edge_sdk.protocol.fields import ClientId, CurveKey

log = logging.getLogger(__name__)
# Seconds of UTC since 1970, to year 6325.
Time: TypeAlias = Annotated[float, Meta(ge=0, le=2**37)]
KEEP_S = 7 * 24 * 3600.0  # after it has expired


class Invitation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """expires: seconds of UTC since 1970. name None: whatever the device calls itself. client and
    client_key: who used it; is_done: and was written into the list, so it is not written again."""

    public_key: CurveKey
    expires: Time
    name: ClientId | None = None
    client: ClientId | None = None
    client_key: CurveKey | None = None
    is_done: bool = False

    def is_about(self, name: str) -> bool:
        return name in (self.name, self.client)


class Invitations:
    """The file as it is now. A file that went bad invites nobody, and is complained about once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = NOWHERE
        self._told = NOWHERE  # of one that an error has been logged about
        self._by_key: dict[bytes, Invitation] = {}
        self._lock = threading.Lock()  # as Admission's

    def find(self, public_key: bytes) -> Invitation | None:
        """The invitation with this key, also a used or expired one. Sees changes of the file."""
        stamp = stamp_of(self.path)
        with self._lock:
            if stamp != self._stamp:
                self._load(stamp)
            return self._by_key.get(public_key)

    def is_open(self, public_key: bytes) -> bool:
        """Whether somebody may still join with this key; also one whose join was cut short."""
        return self.find(public_key) is not None and not self.why_closed(public_key)

    def why_closed(self, public_key: bytes) -> str:
        """Why nobody may join with this invitation any more; "" for another key or an open one."""
        invitation = self.find(public_key)
        if invitation is None:
            return ""
        if invitation.is_done:
            return f"the invitation that {invitation.client} used, key"
        return "an invitation that has expired, key" * (time.time() >= invitation.expires)

    def _load(self, stamp: Stamp) -> None:
        try:
            self._by_key = {i.public_key.encode(): i for i in read_invitations(self.path)}
        except ConfigError as error:
            if stamp != self._told:
                log.error("%s", error)
            self._told, self._by_key = stamp, {}
            if isinstance(error.__cause__, OSError):  # it may be read at the next look
                return
        self._stamp = stamp


def read_invitations(path: Path) -> list[Invitation]:
    """[] when there is no file. Raises ConfigError."""
    if stamp_of(path) == NOWHERE:
        return []
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[Invitation])
    except OSError as error:
        raise ConfigError(f"invitations in {path} cannot be read: {error}") from error
    except (ValueError, msgspec.MsgspecError, RecursionError) as error:
        raise ConfigError(
            f"invitations in {path} cannot be read: {error}; remove the file and invite again"
        ) from error


def write_invitation(path: Path, invitation: Invitation) -> None:
    """Add it or replace the one with its key; what has long expired goes. The caller holds the
    folder's lock. Raises ConfigError, OSError."""
    others = [i for i in read_invitations(path) if i.public_key != invitation.public_key]
    now = time.time()
    write_private(path, [*(i for i in others if now < i.expires + KEEP_S), invitation])


def withdraw(path: Path, name: str) -> list[Invitation]:
    """Forget what was made for this client or used by it: it cannot come back with one. Returns
    those. The caller holds the folder's lock. Raises ConfigError, OSError."""
    known = read_invitations(path)
    gone = [i for i in known if i.is_about(name)]
    if gone:
        write_private(path, [i for i in known if not i.is_about(name)])
    return gone


def write_private(path: Path, entries: Sequence[msgspec.Struct], *, is_synced: bool = True) -> None:
    """As JSON, an entry a line, that others may not read. Raises OSError."""
    text = ",\n".join(msgspec.json.encode(entry).decode() for entry in entries)
    write_whole(path, f"[{text}]\n", mode=0o600, owner_ids=heir_of(path), is_synced=is_synced)
