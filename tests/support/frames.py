"""A good frame of each type, to be spoilt, and the one line that decode refuses a frame with."""

from __future__ import annotations

import math
from typing import Any

import msgpack
import pytest

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.codec import decode
from edge_sdk.protocol.messages import PROTOCOL

MODEL = {"family": "cnn", "input_shape": [1, 8, 8], "num_classes": 10, "exit": 3}
PLAN = {"segments": [{"first": 1, "last": 3}]}
SPEC = {"name": "stages.0.w", "shape": [2, 3], "dtype": "float32"}
PROFILE = {
    "platform": "generic",
    "memory_total_bytes": 2,
    "memory_available_bytes": 1,
    "cores": 1.0,
    "gflops": 0.0,
}
HEX = "0123456789abcdef" * 2  # an id or a digest
# One good message of each type as plain values, required fields only.
GOOD: dict[str, dict[str, Any]] = {
    "hello": {
        "protocol": PROTOCOL,
        "client_id": "a",
        "session": "s",
        "profile": PROFILE,
        "num_examples": 3,
        "input_shape": [1, 8, 8],
        "num_classes": 10,
    },
    "welcome": {
        "protocol": PROTOCOL,
        "run": "r",
        "model": MODEL,
        "plan": PLAN,
        "deadline_s": 0.0,
        "heartbeat_s": 5.0,
    },
    "ready": {"exit": 0},
    "job": {
        "id": HEX,
        "round": 1,
        "model": MODEL,
        "plan": PLAN,
        "tensors": [SPEC],
        "deadline_s": 0.0,
    },
    "fetch": {"round": 1, "have": 0, "first": 0, "count": 1},
    "part": {"round": 1, "index": 0},
    "update": {
        "job": HEX,
        "digest": HEX,
        "round": 1,
        "num_examples": 3,
        "num_steps": 0,
        "exits": [{"exit": 1, "loss": 0.5, "metric": 1.0}],
        "phases": {"train": {"wall_s": 1.0}},
        "peak_memory_bytes": 0,
        "tensors": [SPEC],
    },
    "accepted": {"round": 1},
    "fault": {"code": "round", "detail": ""},
    "heartbeat": {},
    "probe": {},
    "bye": {},
}
NAN, INF = math.nan, math.inf


def frame(tag: str, **changes: Any) -> bytes:
    """A good message of this type with some fields changed."""
    return msgpack.packb({"type": tag, **GOOD[tag], **changes})


def refused(data: bytes) -> str:
    """The one line that decode refuses `data` with."""
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    return checked_line(caught.value)


def checked_line(error: ProtocolError) -> str:
    line = str(error)
    assert line
    assert line.isprintable(), "not one printable line"
    assert len(line) < 1000, "a peer decides how long our log lines are"
    return line
