"""Text of people and peers: one line of it, sizes and addresses as they write them."""

from __future__ import annotations

import re

from edge_sdk.errors import ConfigError

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
_ENDPOINT = re.compile(r"tcp://[^/\s]+:(\*|[0-9]{1,5})")


def one_line(text: str, max_length: int = 200) -> str:
    """`text` with what does not print escaped; cut in the middle, as errors end with advice."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(text) <= max_length:
        return text
    tail = max_length // 3
    return f"{text[: max_length - tail - 5]} ... {text[-tail:]}"


def mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 1024**2:.1f} MiB"


def parse_size(text: str) -> int:
    """Bytes of a size such as 512M; K, M and G are powers of 1024. Raises ConfigError."""
    unit = text[-1:].upper() if text[-1:].upper() in UNITS else ""
    try:
        num_bytes = round(float(text[: len(text) - len(unit)]) * UNITS[unit])
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes < 1:
        raise ConfigError(f"size {text!r}, expected one such as 512M or 1.5G")
    return num_bytes


def checked_endpoint(text: str, flag: str) -> str:
    """The same text, if it is a TCP address; else ConfigError. ZeroMQ would take any number for a
    port, and wait in vain or listen elsewhere.

    Port 0 or * is any free one, for who listens."""
    found = _ENDPOINT.fullmatch(text)
    is_bound = flag == "--listen"
    if not found or (found[1] == "*" and not is_bound):
        raise ConfigError(f"{flag} {text!r} is not tcp://HOST:PORT")
    if found[1] != "*" and not (0 if is_bound else 1) <= int(found[1]) <= 65535:
        raise ConfigError(f"{flag} {text!r} has a port outside 1 to 65535")
    return text
