"""The line that `edge-coordinator invite` prints and `edge-sdk join` takes.

`edge-join-1-` and base64 (the alphabet of URLs, so no shell minds it) of: the coordinator's public
key, the invitation's secret key, 32 bytes each, the texts `ENDPOINT NAME` (the name may be empty),
and 4 bytes of SHA-256 over all that, by which a line that was not copied whole is told."""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.text import checked_endpoint
from edge_sdk.protocol.fields import CLIENT_NAME

VERSION = 1
MARK = "edge-join"
KEY_BYTES, CHECK_BYTES = 32, 4
MAX_CHARACTERS = 1000
COPY = "copy the whole line once more"


@dataclass(frozen=True)
class InvitationLine:
    """What an invitation says. name "": the device tells its own. server_key: the coordinator's
    public one, secret: the invitation's; Z85 as bytes. The secret never shows in a repr."""

    endpoint: str
    name: str
    server_key: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"InvitationLine(endpoint={self.endpoint!r}, name={self.name!r})"


def encode_line(line: InvitationLine) -> str:
    from zmq.utils import z85

    content = z85.decode(line.server_key) + z85.decode(line.secret)
    content += f"{line.endpoint} {line.name}".encode("ascii")
    text = base64.urlsafe_b64encode(content + _check(content)).decode("ascii").rstrip("=")
    return f"{MARK}-{VERSION}-{text}"


def decode_line(text: str) -> InvitationLine:
    """What the line says; blanks and line breaks in it do not matter. Raises ConfigError, which
    never quotes the line: it is a secret."""
    from zmq.utils import z85

    text = "".join(text.split()).lstrip("\ufeff")  # a mark that Windows puts before a text
    found = re.fullmatch(rf"{MARK}-([0-9]{{1,9}})-([A-Za-z0-9_-]*)", text)
    if not found or len(text) > MAX_CHARACTERS:
        raise ConfigError(
            f"this is no invitation: expected the line that begins with {MARK}-, as "
            f"`edge-coordinator invite` prints it, got {len(text)} other characters"
        )
    if int(found[1]) != VERSION:
        raise ConfigError(
            f"an invitation of version {int(found[1])}, this edge-sdk reads version {VERSION}; "
            "install the same edge-sdk as on the coordinator"
        )
    try:
        content = base64.urlsafe_b64decode(found[2] + "=" * (-len(found[2]) % 4))
    except binascii.Error:
        content = b""
    content, check = content[:-CHECK_BYTES], content[-CHECK_BYTES:]
    texts = content[2 * KEY_BYTES :]
    if check != _check(content) or not texts.isascii():
        raise ConfigError(f"the invitation is damaged; {COPY}")
    endpoint, _, name = texts.decode("ascii").partition(" ")
    checked_endpoint(endpoint, "the invitation's endpoint")
    if name and not re.match(CLIENT_NAME, name):
        raise ConfigError(f"the invitation is for {name!r}, which is no device's name")
    keys = content[:KEY_BYTES], content[KEY_BYTES : 2 * KEY_BYTES]
    return InvitationLine(endpoint, name, *map(z85.encode, keys))


def _check(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()[:CHECK_BYTES]
