"""What is done with one input, and what is checked: `decode` and `handler`.

Both return what they saw or raise; an input that makes one raise anything becomes a file of
tests/fuzz/regressions, which tests/tools/test_fuzz.py runs again through here.
"""

from __future__ import annotations

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.codec import decode, encode
from edge_sdk.protocol.link import parse_frames
from edge_sdk.protocol.messages import Message, Part
from tools.fuzz.fakes import Broken, Frame
from tools.fuzz.inputs import unpack_acts
from tools.fuzz.world import Seen, World

MAX_ERROR = 1000  # characters of a refusal


def decode_one(data: bytes) -> Message | None:
    """The message in `data`, None when it is refused as it should be. Raises Broken, or what
    decode let out."""
    try:
        message = decode(data)
    except ProtocolError as error:
        _check_refusal(error)
        return None
    try:
        frame = encode(message)
    except ProtocolError as error:  # a float or a default takes more bytes than what came
        _check_refusal(error)
        return message
    if encode(decode(frame)) != frame:
        raise Broken(f"{message!r:.500} does not come back as it was sent")
    _check_frames(data, is_part=isinstance(message, Part))
    return message


def handler_one(data: bytes, seen: Seen) -> None:
    """A sequence of inputs in one round. Raises Broken, or what the coordinator let out."""
    World(seen=seen).play(unpack_acts(data))


def _check_frames(data: bytes, *, is_part: bool) -> None:
    """A Part comes with one raw frame, everything else with none."""
    for num_raw in range(3):
        frames = [Frame(data), *[Frame(b"raw")] * num_raw]
        try:
            parse_frames(frames)  # type: ignore[arg-type]
        except ProtocolError as error:
            _check_refusal(error)
            is_taken = False
        else:
            is_taken = True
        if is_taken != (num_raw == is_part):
            raise Broken(f"with {num_raw} raw frames: {'taken' if is_taken else 'refused'}")


def _check_refusal(error: ProtocolError) -> None:
    line = str(error)
    if not line or not line.isprintable() or len(line) > MAX_ERROR:
        raise Broken(f"refused with {line[:300]!r} ... ({len(line)} characters)") from error
