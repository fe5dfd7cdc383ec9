"""CURVE key pairs as two small files: NAME.public to hand out, NAME.secret (mode 0600) to keep.

A key is 40 characters of Z85 text. pyzmq's own certificate writer leaves secrets readable by
everyone, so the files are written here."""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.files import heir_of, is_there, read_user_text, sync, why_not, write_whole
from edge_sdk.protocol.fields import CURVE_KEY

DEVICE_KEYS = "device"  # names of the two pairs of files
SERVER_KEYS = "server"
MAKE = "make one with `keys`"
NEXT_KEYS = f"{DEVICE_KEYS}.next"  # while a new pair of the device is not confirmed yet


@dataclass(frozen=True)
class KeyPair:
    """Two CURVE keys, Z85 texts as bytes as ZeroMQ takes them. The secret never shows in a repr."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"KeyPair(public={self.public!r})"


def make_keys(folder: Path, name: str) -> KeyPair:
    """Make NAME.public and NAME.secret in `folder`. Raises ConfigError if they are there.

    What root makes in another user's folder belongs to that user: the service's keys, made by an
    administrator, are read by the service's own user."""
    import zmq

    public_file, secret_file = folder / f"{name}.public", folder / f"{name}.secret"
    public = b"-"
    while public.startswith(b"-"):  # a command line would take it for a flag
        public, secret = zmq.curve_keypair()
    try:
        for file in (public_file, secret_file):
            if file.exists():
                raise ConfigError(f"{file} exists; a key is never overwritten, remove it first")
        is_new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True, mode=0o755)
        owner_ids = heir_of(folder.parent if is_new else folder)
        if is_new and owner_ids:
            os.chown(folder, *owner_ids, follow_symlinks=False)
        try:
            _write_new(secret_file, secret, 0o600, owner_ids)
            _write_new(public_file, public, 0o644, owner_ids)
        except OSError:
            for file in (secret_file, public_file):
                file.unlink(missing_ok=True)
            raise
        sync(folder)
    except OSError as error:
        raise ConfigError(f"keys cannot be written to {folder}: {why_not(error)}") from error
    return KeyPair(public, secret)


def own_keys(folder: Path, name: str = DEVICE_KEYS) -> KeyPair:
    """The pair that is there, else a new one. Raises ConfigError.

    A secret without its public key is what remains where making a pair was cut short. If it is not
    whole either, it has never been used and makes room for another."""
    secret_file = folder / f"{name}.secret"
    if not is_there(secret_file, ConfigError):
        return make_keys(folder, name)
    try:
        secret = read_key(secret_file)
    except ConfigError as error:
        if isinstance(error.__cause__, OSError) or is_there(folder / f"{name}.public", ConfigError):
            raise
        try:
            secret_file.unlink(missing_ok=True)
        except OSError as again:
            raise ConfigError(f"{secret_file} cannot be made anew: {why_not(again)}") from again
        return make_keys(folder, name)
    try:
        read_key(folder / f"{name}.public")
    except ConfigError:
        import zmq

        write_public(folder, name, zmq.curve_public(secret))
    return read_keys(folder, name)


def has_keys(folder: Path, name: str) -> bool:
    """Whether both files are there. Raises ConfigError."""
    return all(is_there(folder / f"{name}.{half}", ConfigError) for half in ("secret", "public"))


def next_keys(folder: Path) -> KeyPair:
    """The device's next pair, made unless a rotation was begun with one. Raises ConfigError.

    A secret that was not written whole has never been used: it makes room for another."""
    try:
        read_key(folder / f"{NEXT_KEYS}.secret")
    except ConfigError as error:
        if isinstance(error.__cause__, PermissionError):
            raise
        drop_next_keys(folder)
    return own_keys(folder, NEXT_KEYS)


def drop_next_keys(folder: Path) -> None:
    """Remove the next pair, which is in no coordinator's list. Raises ConfigError."""
    try:
        for half in ("secret", "public"):
            (folder / f"{NEXT_KEYS}.{half}").unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"keys cannot be removed from {folder}: {error.strerror}") from error


def has_next_keys(folder: Path) -> bool:
    """Whether a rotation was begun here and not finished."""
    return is_there(folder / f"{NEXT_KEYS}.secret", ConfigError)


def swap_keys(folder: Path) -> None:
    """The next pair becomes the device's. Between the two files read_keys takes the public key that
    is still the next one's. Raises ConfigError."""
    try:
        for half in ("secret", "public"):
            (folder / f"{NEXT_KEYS}.{half}").replace(folder / f"{DEVICE_KEYS}.{half}")
            sync(folder)
    except OSError as error:
        raise ConfigError(f"keys cannot be written to {folder}: {why_not(error)}") from error


def write_public(folder: Path, name: str, key: bytes) -> None:
    """Write NAME.public in place of the one that is there. Raises ConfigError."""
    file = folder / f"{name}.public"
    try:
        write_whole(file, key + b"\n", mode=0o644, owner_ids=heir_of(folder))
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {why_not(error)}") from error


def _write_new(file: Path, key: bytes, mode: int, owner_ids: tuple[int, int] | None) -> None:
    """Write a file that is not there yet. It is made with O_EXCL and given away by its handle, so a
    link that is put there meanwhile is not followed."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(handle, "wb") as stream:
        if owner_ids:
            os.fchown(handle, *owner_ids)
        stream.write(key + b"\n")
        stream.flush()
        os.fsync(handle)


def read_keys(folder: Path, name: str, advice: str = MAKE) -> KeyPair:
    """The pair of both files. Raises ConfigError: missing (advice: what to do then), not a key, a
    secret others can read, or two files that are not a pair."""
    import zmq

    secret_file = folder / f"{name}.secret"
    public = read_key(folder / f"{name}.public", advice)
    secret = read_key(secret_file, advice)
    mode = stat.S_IMODE(secret_file.stat().st_mode)
    if mode & 0o077:
        step = f"run chmod 600 {secret_file} and think about making a new key"
        raise ConfigError(f"{secret_file} has mode {mode:04o}, others can read it; {step}")
    own = zmq.curve_public(secret)
    if own != public and not _is_halfway(folder, name, own):
        step = "bring back the file that does, or remove both and make new keys"
        raise ConfigError(f"{folder / name}.public does not belong to {secret_file}; {step}")
    return KeyPair(own, secret)


def _is_halfway(folder: Path, name: str, own: bytes) -> bool:
    """Whether swap_keys was cut short between its files; it is then finished, if that may be."""
    file = folder / f"{name}.next.public"
    try:
        is_next = read_key(file) == own
    except ConfigError:
        return False
    if is_next:
        with contextlib.suppress(OSError):
            file.replace(folder / f"{name}.public")
    return is_next


def read_all_keys(
    folder: Path, server_key: str | None, flag: str = "--server-key"
) -> tuple[KeyPair, bytes]:
    """This device's pair and the coordinator's public key, which is given as text or as a file, or
    lies beside them. Raises ConfigError."""
    keys = read_keys(
        folder,
        DEVICE_KEYS,
        f"make it by `edge-sdk join LINE --keys {folder}` with an invitation, or by "
        f"`edge-sdk keys --keys {folder}`, or give --keys with the folder that has it",
    )
    if server_key is None:
        advice = f"copy the coordinator's {SERVER_KEYS}.public there, or give {flag}"
        return keys, read_key(folder / f"{SERVER_KEYS}.public", advice)
    if re.match(CURVE_KEY, server_key) and not os.path.exists(server_key):
        return keys, check_key(server_key, flag)
    try:
        return keys, read_key(Path(server_key), "it is in the coordinator's folder of keys")
    except ConfigError as error:
        raise ConfigError(
            f"{flag} is neither a key of 40 characters nor its file: {error}"
        ) from error


def read_key(path: Path, advice: str = MAKE) -> bytes:
    """The key that a file holds; advice: what to do where there is none. Raises ConfigError."""
    try:
        text = read_user_text(path).strip()
    except (OSError, ValueError) as error:  # no text, a path with a null byte
        reason = getattr(error, "strerror", None) or error
        if isinstance(error, PermissionError):
            advice = "run this as the user whose file it is"
        raise ConfigError(f"key file {path} cannot be read: {reason}; {advice}") from error
    return check_key(text, str(path))


def check_key(text: str, where: str) -> bytes:
    """The key as bytes. Raises ConfigError unless it is Z85 of 32 bytes."""
    if not re.match(CURVE_KEY, text):
        raise ConfigError(f"{where} holds no key: expected 40 characters of Z85, got {len(text)}")
    from zmq.utils import z85

    key = text.encode("ascii")
    try:
        is_key = z85.encode(z85.decode(key)) == key
    except struct.error:  # five characters above 2^32 - 1
        is_key = False
    if not is_key:
        raise ConfigError(f"{where} holds no key: 40 characters, but not Z85 of 32 bytes")
    return key
