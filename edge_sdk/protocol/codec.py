"""Control frames: a message as msgpack, and back with every field checked."""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec

from edge_sdk.errors import ProtocolError, VersionError
from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.fields import MAX_LINE
from edge_sdk.protocol.messages import (
    MAX_FRAME_BYTES,
    MAX_TENSORS,
    PROTOCOL,
    Message,
)

MAX_CONTROL_BYTES = MAX_FRAME_BYTES - 1024  # one control frame; CURVE adds 33 bytes to each
_DECODE: Any = Message


def encode(message: Message) -> bytes:
    """The message as one control frame. Raises ProtocolError when it exceeds MAX_CONTROL_BYTES."""
    frame: bytes = msgpack.packb(msgspec.to_builtins(message))
    if len(frame) > MAX_CONTROL_BYTES:
        wanted = f"at most {MAX_CONTROL_BYTES} travel; use a model with fewer tensors"
        raise ProtocolError(f"{type(message).__name__} takes {len(frame)} bytes, {wanted}")
    return frame


def unpack(frame: bytes | memoryview) -> Any:
    """Plain values of a frame of msgpack, under hard limits. Raises ProtocolError."""
    size = len(frame)
    if size > MAX_CONTROL_BYTES:
        wanted = f"at most {MAX_CONTROL_BYTES} are accepted"
        raise ProtocolError(f"control frame of {size} bytes, {wanted}")
    try:
        return msgpack.unpackb(
            frame,
            max_str_len=4 * MAX_LINE,  # bytes
            max_bin_len=0,
            max_ext_len=0,
            max_array_len=MAX_TENSORS,
            max_map_len=1000,
        )
    except Exception as error:  # msgpack raises several unrelated types for bad bytes
        cause = f"{type(error).__name__}: {one_line(str(error))}".rstrip(": ")
        raise ProtocolError(f"control frame of {size} bytes is not msgpack: {cause}") from error


def decode(frame: bytes | memoryview) -> Message:
    """The message of a control frame. Raises ProtocolError naming the field that is wrong."""
    plain = unpack(frame)
    if isinstance(plain, dict) and plain.get("protocol", PROTOCOL) != PROTOCOL:
        raise VersionError(
            f"{_quoted(plain.get('type'))} speaks protocol {_quoted(plain['protocol'])}, this "
            f"side {PROTOCOL}; install the same edge-sdk on both"
        )
    try:
        message: Message = msgspec.convert(plain, type=_DECODE)
    except (msgspec.ValidationError, RecursionError) as error:
        step = f"see docs/protocol.md, version {PROTOCOL}"
        raise ProtocolError(f"message refused: {one_line(str(error))}; {step}") from error
    return message


def _quoted(value: object) -> str:
    """A short value that a peer sent, quoted; of others only the type: the repr of nested arrays
    recurses, and has no end."""
    is_short = isinstance(value, int) or (isinstance(value, str) and len(value) <= 40)
    return repr(value) if is_short else type(value).__name__
