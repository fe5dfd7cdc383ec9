"""Which devices may join: a text file with a line `NAME PUBLIC_KEY` per client.

The file is read again when it changes, so an admitted client can connect at once, and one that was
removed is refused at its next message. An editor empties a file before it writes, in the old one's
place or under its name, so one that changed is read when nobody has written to it for SETTLED_S,
for which a command waits. What the coordinator writes itself is in force at once. A list that
became empty revokes nobody: a full disk leaves such. A line that begins with # is a comment. Beside
it lie `invitations` (invitations.py) and `pending` (pending.py).
"""

from __future__ import annotations

import contextlib
import logging
import math
import re
import threading
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from coordinator.admission.invitations import Invitations
from coordinator.admission.pending import PendingKeys
from edge_sdk.errors import ConfigError, UsageError
from edge_sdk.helpers.files import (
    NOWHERE,
    Stamp,
    heir_of,
    locked,
    mode_of,
    read_user_text,
    stamp_of,
    write_whole,
)
from edge_sdk.protocol.fields import CLIENT_NAME
from edge_sdk.protocol.keys import check_key

log = logging.getLogger(__name__)
SETTLED_S = 0.2
MOST_LIST_BYTES = 64 * 1024**2  # half a million clients
TELL_S = 60.0  # between two lines about a list that is not in force
MOST_PATIENCE_S = 10.0  # of a command with a list that somebody goes on writing


class Admission:
    """The list of admitted clients. Raises ConfigError when the file is missing or malformed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.invitations = Invitations(path.with_name("invitations"))
        self.pending = PendingKeys(path.with_name("pending"))
        self._stamp = NOWHERE  # of the file that is in force
        self._refused: Stamp | None = None  # of one that is malformed: not worth reading again
        self._problem = ""  # of the file as it is, "" where it is in force or not read yet
        self._tell_at = -math.inf  # the same problem again; of time.monotonic()
        self._by_key: dict[bytes, str] = {}
        self._by_name: dict[str, bytes] = {}
        self._lock = threading.Lock()  # ZeroMQ's authenticator asks from a thread of its own
        self.reload(is_own=True)

    def reload(self, *, is_own: bool = False) -> None:
        """Unless somebody is writing it. is_own: that was this process. Raises ConfigError."""
        stamp, text = stamp_of(self.path), _read(self.path)
        if is_being_written(self.path) and not is_own:
            return
        by_key = parse_clients(text, str(self.path))
        if not text.strip() and self._by_key:
            raise ConfigError(
                f"client list {self.path} is empty, which revokes nobody: an editor or a full disk "
                "does that too; to revoke everybody use `edge-coordinator clients remove`, or "
                "leave a line that begins with #"
            )
        by_name = {name: key for key, name in by_key.items()}
        with self._lock:
            self._by_key, self._by_name, self._stamp = by_key, by_name, stamp

    def name_of(self, public_key: bytes) -> str | None:
        """The client with this key, None: not in the list. Sees changes of the file."""
        self._look()
        with self._lock:
            return self._by_key.get(public_key)

    def is_admitted(self, name: str) -> bool:
        """Whether a client of this name is in the list now."""
        self._look()
        with self._lock:
            return name in self._by_name

    def is_changing(self) -> bool:
        """Somebody else writes the list this moment."""
        return stamp_of(self.path) != self._stamp and is_being_written(self.path)

    def names(self) -> dict[str, bytes]:
        with self._lock:
            return dict(self._by_name)

    def _look(self) -> None:
        """Read the file again if it is another. This is done for every message, so it complains
        about a problem every TELL_S only."""
        stamp = stamp_of(self.path)
        if stamp == self._stamp:
            self._problem = ""
            return
        if stamp != self._refused and not is_being_written(self.path):
            try:
                self.reload()
                self._problem = ""
            except ConfigError as error:
                if str(error) != self._problem:
                    self._problem, self._tell_at = str(error), -math.inf
                self._refused = None if isinstance(error.__cause__, OSError) else stamp
        if self._problem and (now := time.monotonic()) >= self._tell_at:
            self._tell_at = now + TELL_S
            log.error(
                "client list not reloaded, the last one stays in force: nobody is admitted or "
                "removed by it until this is corrected: %s",
                self._problem,
            )


def parse_clients(text: str, where: str) -> dict[bytes, str]:
    """Key to name. Raises ConfigError with the line: malformed, or a name or key twice."""
    found: dict[bytes, str] = {}
    taken: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 2 or not re.match(CLIENT_NAME, parts[0]):
            raise ConfigError(f"{where} line {number}: expected `NAME PUBLIC_KEY`, got {line!r}")
        key = check_key(parts[1], f"{where} line {number}")
        if said := _clash(found, taken, parts[0], key):
            raise ConfigError(f"{where} line {number}: {said}; remove one of the two lines")
        found[key] = parts[0]
        taken.add(parts[0])
    return found


def _clash(known: dict[bytes, str], names: Collection[str], name: str, key: bytes) -> str:
    """Why a client is not one more; "" where it is. names: of `known`."""
    if known.get(key) == name:
        return f"{name} is there already, with this key"
    if key in known:
        return f"the key of {name} is there already, under the name {known[key]}"
    return f"{name} is there already, with another key" if name in names else ""


def add_client(path: Path, name: str, public_key: bytes) -> None:
    """Append one client. Raises ConfigError; the file is unchanged then."""
    if not re.match(CLIENT_NAME, name):
        raise UsageError(
            f"client name {name!r} is not 1 to 64 letters, digits, dots, - or _, the first a "
            "letter or digit"
        )
    with _changing(path) as text:
        put_client(path, text, name, public_key)


def remove_client(path: Path, name: str) -> bool:
    """Revoke: its links are refused from their next message on. False: there is no such client.
    Raises ConfigError."""
    with _changing(path) as text:
        if name not in parse_clients(text, str(path)).values():
            return False
        left = _without(text, name)
        _replace(path, left if left.strip() else "# nobody is admitted\n")
    return True


def ensure_list(path: Path) -> None:
    """Make an empty list if there is none. Raises ConfigError."""
    with _changing(path) as text:
        parse_clients(text, str(path))
        if stamp_of(path) == NOWHERE:
            _replace(path, "")


def put_client(path: Path, text: str, name: str, public_key: bytes) -> None:
    """Write the list with one line more than `text`; the caller holds the folder's lock.

    Raises ConfigError when name or key are there already, OSError."""
    known = parse_clients(text, str(path))
    if said := _clash(known, known.values(), name, public_key):
        other = known.get(public_key, name)
        raise ConfigError(
            f"client list {path}: {said}; to replace it, `edge-coordinator clients remove {other}`"
        )
    if text and not text.endswith("\n"):
        text += "\n"
    text += f"{name} {public_key.decode()}\n"
    parse_clients(text, str(path))
    _replace(path, text)


def replace_client(path: Path, text: str, name: str, public_key: bytes) -> None:
    """put_client, the client's present key if it has one making room for this. Raises likewise."""
    parse_clients(text, str(path))
    put_client(path, _without(text, name), name, public_key)


def read_list(path: Path) -> str:
    """The list's text, "" where there is none. Raises ConfigError."""
    return "" if stamp_of(path) == NOWHERE else _read(path)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[str]:
    """The list's text, which no other command changes meanwhile. A change of it is in force at the
    end, also in a coordinator that serves. Raises ConfigError."""
    before = stamp_of(path)
    try:
        with locked(path.parent):
            give_up, text = time.monotonic() + MOST_PATIENCE_S, read_list(path)
            while is_being_written(path):
                if time.monotonic() > give_up:
                    raise ConfigError(f"client list {path} is being written by hand; try again")
                time.sleep(SETTLED_S / 10)
                text = read_list(path)
            yield text
    except OSError as error:
        raise ConfigError(f"client list {path} cannot be written: {error}") from error
    if stamp_of(path) != before:
        time.sleep(SETTLED_S)


def is_being_written(path: Path) -> bool:
    """Whether the file changed so recently that what was just read of it may be half."""
    return 0 <= time.time() - stamp_of(path)[0] / 1e9 < SETTLED_S


def _replace(path: Path, text: str) -> None:
    """Write the list. A symbolic link stays one: the file that it names is written. Where several
    folders share that file, this folder's lock does not keep off the changes of the others."""
    path = path.resolve()
    write_whole(path, text, mode=mode_of(path, 0o644), owner_ids=heir_of(path))


def _without(text: str, name: str) -> str:
    """The lines but those of this client; comments and blank lines stay."""
    return "".join(line for line in text.splitlines(True) if line.split()[:1] != [name])


def _read(path: Path) -> str:
    try:
        return read_user_text(path, MOST_LIST_BYTES)
    except FileNotFoundError as error:
        said = "there is no such file; make it with `edge-coordinator clients add` or `invite`"
        raise ConfigError(f"client list {path} cannot be read: {said}") from error
    except OSError as error:
        said = f"{error.strerror}; expected a text file that this user may read"
        raise ConfigError(f"client list {path} cannot be read: {said}") from error
    except UnicodeDecodeError as error:
        said = "this is not UTF-8 text; expected lines of `NAME PUBLIC_KEY`"
        raise ConfigError(f"client list {path} cannot be read: {said}") from error
