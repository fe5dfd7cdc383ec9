"""Frames that docs/protocol.md refuses, and the fault that answers them."""

from __future__ import annotations

from typing import Any

import msgpack

from edge_sdk.protocol.messages import PROTOCOL

PING = {"type": "heartbeat", "round": 7}
FETCH = {"type": "fetch", "round": 7, "have": 0, "first": 0, "count": 1}


def nested(depth: int) -> bytes:
    """A heartbeat whose round is an array in an array ..."""
    return b"\x82\xa4type\xa9heartbeat\xa5round" + b"\x91" * depth + b"\x90"


def changed(message: dict[str, Any], **fields: Any) -> bytes:
    packed: bytes = msgpack.packb(message | fields)
    return packed


def lacking(message: dict[str, Any], name: str) -> bytes:
    packed: bytes = msgpack.packb({key: value for key, value in message.items() if key != name})
    return packed


# What is wrong by name, with the frames of one ZeroMQ message. Messages that either side refuses.
BAD_FRAMES: dict[str, tuple[bytes, ...]] = {
    "no msgpack": (b"\xc1",),
    "nothing": (b"",),
    "cut in the middle": (msgpack.packb(PING)[:-1],),
    "bytes after the value": (msgpack.packb(PING) + b"\x00",),
    "an array instead of a map": (msgpack.packb([1, 2]),),
    "no tag": (lacking(PING, "type"),),
    "an unknown tag": (changed(PING, type="ping"),),
    "an unknown field": (changed(PING, extra=1),),
    "a required field is missing": (lacking(FETCH, "first"),),
    "a float for an int": (changed(PING, round=7.0),),
    "a bool for an int": (changed(PING, round=True),),
    "a str for an int": (changed(PING, round="7"),),
    "nil where none may be": (changed(PING, round=None),),
    "below its range": (changed(PING, round=-1),),
    "above its range": (changed(PING, round=2**31 + 1),),
    "bin for a str": (changed({"type": "bye"}, reason=b"bye"),),
    "a control character in a str": (changed({"type": "bye"}, reason="a\nb"),),
    "U+2028 in a str": (changed({"type": "bye"}, reason="a\u2028b"),),
    "a str that is no UTF-8": (b"\x82\xa4type\xa3bye\xa6reason\xa1\xff",),
    "a str of 2001 characters": (changed({"type": "bye"}, reason="x" * 2001),),
    "an extension type": (b"\x82\xa4type\xa9heartbeat\xa5round\xd4\x01\x07",),
    "nesting of 1100": (nested(1100),),
    "a second frame": (msgpack.packb(PING), b"x"),
    "a part without its bytes": (msgpack.packb({"type": "part", "round": 7, "index": 0}),),
    "a part with three frames": (
        msgpack.packb({"type": "part", "round": 7, "index": 0}),
        b"x",
        b"y",
    ),
    "NaN where a range is": (
        msgpack.packb({"type": "ready", "exit": 1, "prefix_s": float("nan")}),
    ),
}
# By name; the code is `version`.
OTHER_VERSION: dict[str, tuple[bytes, ...]] = {
    "protocol 4": (changed(PING, protocol=PROTOCOL - 1),),
    "a later protocol, whatever else it holds": (
        msgpack.packb({"type": "nonsense", "protocol": PROTOCOL + 1, "new": [1]}),
    ),
}


def bad_frames_for_a_device() -> dict[str, tuple[bytes, ...]]:
    """Those that a coordinator could send, and a device refuses at the least: what is no msgpack,
    no message, or not in its frames."""
    names = ("no msgpack", "cut in the middle", "an array instead of a map", "no tag")
    more = ("a part without its bytes", "a second frame")
    return {name: BAD_FRAMES[name] for name in (*names, *more)}
