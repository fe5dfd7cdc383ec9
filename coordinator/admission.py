"""Which devices may join: a text file with a line `NAME PUBLIC_KEY` per client.

The file is read again when it changes, so an admitted client can connect at once. A line that
begins with # is a comment.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from pathlib import Path
from typing import TypeAlias

from edge_sdk.errors import ConfigError
from edge_sdk.keys import check_key
from edge_sdk.wire import CLIENT_NAME

log = logging.getLogger(__name__)
Stamp: TypeAlias = tuple[int, int]  # time of the last change in ns, size in bytes
NOWHERE: Stamp = (0, -1)


class Admission:
    """The list of admitted clients. Raises ConfigError when the file is missing or malformed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp = NOWHERE  # of the file that is in force
        self._refused: Stamp | None = None  # of one that is malformed: not worth reading again
        self._told: Stamp | None = None  # of one that an error has been logged about
        self._names: dict[bytes, str] = {}
        self._lock = threading.Lock()  # ZeroMQ's authenticator asks from a thread of its own
        self.reload()

    def reload(self) -> None:
        stamp = _stamp_of(self.path)
        names = parse_clients(_read(self.path), str(self.path))
        with self._lock:
            self._names, self._stamp = names, stamp

    def name_of(self, public_key: bytes) -> str | None:
        """The client with this key, None for a stranger. Sees changes of the file. It is asked for
        every message, so it complains about a file once."""
        stamp = _stamp_of(self.path)
        if stamp == self._stamp:
            self._told = None
        elif stamp != self._refused:
            try:
                self.reload()
            except ConfigError as error:
                if stamp != self._told:
                    log.error("client list not reloaded, the last one stays in force: %s", error)
                self._told = stamp
                self._refused = None if isinstance(error.__cause__, OSError) else stamp
        with self._lock:
            return self._names.get(public_key)

    def names(self) -> dict[str, bytes]:
        with self._lock:
            return {name: key for key, name in self._names.items()}


def parse_clients(text: str, where: str) -> dict[bytes, str]:
    """Key to name. Raises ConfigError with the line: malformed, or a name or key twice."""
    found: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        parts = line.split()
        if len(parts) != 2 or not re.match(CLIENT_NAME, parts[0]):
            raise ConfigError(f"{where} line {number}: expected `NAME PUBLIC_KEY`, got {line!r}")
        key = check_key(parts[1], f"{where} line {number}")
        if key in found or parts[0] in found.values():
            raise ConfigError(f"{where} line {number}: {parts[0]} or its key is there already")
        found[key] = parts[0]
    return found


def add_client(path: Path, name: str, public_key: bytes) -> None:
    """Append one client. Raises ConfigError; the file is unchanged then."""
    if not re.match(CLIENT_NAME, name):
        raise ConfigError(
            f"client name {name!r} is not 1 to 64 letters, digits, dots, - or _, the first a "
            "letter or digit"
        )
    is_new = _stamp_of(path) == NOWHERE
    text = "" if is_new else _read(path)
    if text and not text.endswith("\n"):
        text += "\n"
    text += f"{name} {public_key.decode()}\n"
    parse_clients(text, str(path))
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_text(text, encoding="ascii")
            if not is_new:
                shutil.copymode(path, draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"client list {path} cannot be written: {error}") from error


def _stamp_of(path: Path) -> Stamp:
    try:
        stat = path.stat()
    except OSError:
        return NOWHERE
    return stat.st_mtime_ns, stat.st_size


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"client list {path} cannot be read: {error}; make it with "
            "`edge-coordinator clients add`"
        ) from error
