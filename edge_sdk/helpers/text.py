"""Text of people and peers: one line of it, sizes and addresses as they write them."""

from __future__ import annotations

import codecs
import ipaddress
import os
import re
from contextlib import suppress

from edge_sdk.errors import ConfigError, DataError

UNITS = {"": 1, "K": 1024, "M": 1024**2, "G": 1024**3}
KINDS = {"int": "a whole number", "float": "a number", "str": "text", "array": "a list"}
MOST_PATH = 600  # characters of a path in a message
SIGNS = {">=": "at least", "<=": "at most", ">": "above", "<": "below"}
_ENDPOINT = re.compile(r"tcp://(?:\[([^]\s]+)\]|([^][:/\s]+)):(\*|[0-9]{1,5})")


def one_line(text: str, max_length: int = 200) -> str:
    """`text` with what does not print escaped; cut in the middle, as errors end with advice."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    if len(text) <= max_length:
        return text
    tail = max_length // 3
    return f"{text[: max_length - tail - 5]} ... {text[-tail:]}"


def destination(flag: str) -> str:
    """Where argparse keeps the value of a flag."""
    return flag.lstrip("-").replace("-", "_")


def plain_words(refusal: str) -> str:
    """What msgspec says of a value, without its types: "Expected `int` >= 1" is "expected a whole
    number, at least 1"."""
    text = re.sub(r"`(\w+(?: \| \w+)*)`", lambda found: _kinds(found[1]), refusal)
    for sign, words in SIGNS.items():
        text = text.replace(f" {sign} ", f", {words} ")
    return text[:1].lower() + text[1:]


def _kinds(names: str) -> str:
    """Of "int | null": a whole number."""
    kinds = [KINDS.get(name, name) for name in names.split(" | ") if name != "null"]
    return " or ".join(kinds)


def user_text(content: bytes) -> str:
    """The text of a person's file: UTF-8, or UTF-16 as PowerShell writes it; without the byte order
    mark and the line ends of Windows. Raises UnicodeDecodeError."""
    is_wide = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if is_wide else "utf-8-sig").replace("\r\n", "\n")


def csv_cell(value: object) -> object:
    """A cell of a CSV file. Text, which may be a peer's, begins no formula in a spreadsheet: it
    gets an apostrophe in front; a number that is written as text stays one."""
    if not isinstance(value, str) or not value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def mebibytes(num_bytes: int) -> str:
    return f"{num_bytes / 1024**2:.1f} MiB"


def duration(seconds: float) -> str:
    """3.6 s; of less than a second two digits, as 0.01 s is not 0.0 s."""
    return f"{seconds:.1f} s" if seconds >= 1 or not seconds else f"{seconds:.2g} s"


def parse_size(text: str) -> int:
    """Bytes of a size such as 512M; K, M and G are powers of 1024. Raises ConfigError, also for
    less than a MiB without a unit, which was hardly meant in bytes."""
    unit = text[-1:].upper() if text[-1:].upper() in UNITS else ""
    try:
        num_bytes = round(float(text[: len(text) - len(unit)]) * UNITS[unit])
    except (ValueError, OverflowError):
        num_bytes = 0
    if num_bytes < (1 if unit else UNITS["M"]):
        raise ConfigError(
            f"size {text!r}, expected one such as 512M or 1.5G; M is 1024 x 1024 bytes"
        )
    return num_bytes


def parse_option(text: str) -> tuple[str, int | float | str | bool | tuple[int, ...]]:
    """("channels", (16, 32)) of channels=16,32; also number, true, false, text. Raises
    ConfigError."""
    key, _, value = text.partition("=")
    if not (key and value):
        raise ConfigError(f"{text!r}, expected KEY=VALUE, e.g. channels=32,64,128")
    if "," in value:
        parts = value.split(",")
        if all(part.isdecimal() for part in parts):
            return key, tuple(map(int, parts))
        if not all(part[:1].isalpha() for part in parts):  # cuts=layer1,layer2 is a text
            raise ConfigError(f"{text!r}, expected whole numbers with commas")
    if value in ("true", "false"):
        return key, value == "true"
    for kind in (int, float):
        with suppress(ValueError):
            return key, kind(value)
    return key, value


def checked_endpoint(text: str, flag: str) -> str:
    """The same text, if it is a TCP address; else ConfigError. ZeroMQ would take any number for a
    port, and wait in vain or listen elsewhere.

    Port 0 or * is any free one, for who listens."""
    found = _ENDPOINT.fullmatch(text)
    is_bound = flag == "--listen"
    if not found or (found[3] == "*" and not is_bound):
        brackets = "; an IPv6 address stands in brackets: tcp://[::1]:5555" * (text.count(":") > 2)
        raise ConfigError(f"{flag} {text!r} is not tcp://HOST:PORT{brackets}")
    if found[3] != "*" and not (0 if is_bound else 1) <= int(found[3]) <= 65535:
        raise ConfigError(f"{flag} {text!r} has a port outside 1 to 65535")
    if found[1] is not None:
        _check_ipv6(found[1], f"{flag} {text!r}")
    elif re.fullmatch(r"[0-9.]+", found[2]):
        _check_ipv4(found[2], f"{flag} {text!r}")
    return text


def split_endpoint(endpoint: str) -> tuple[str, str, bool]:
    """Host without brackets, port, and whether the host is an IPv6 address; of an endpoint that was
    checked."""
    found = _ENDPOINT.fullmatch(endpoint)
    assert found, endpoint
    return found[1] or found[2], found[3], found[1] is not None


def _check_ipv4(host: str, where: str) -> None:
    """Raise ConfigError, which begins with `where`."""
    try:
        ipaddress.IPv4Address(host)
    except ValueError as error:
        wanted = "expected four numbers from 0 to 255, or a name"
        raise ConfigError(f"{where} has no IPv4 address: {error}; {wanted}") from error


def _check_ipv6(host: str, where: str) -> None:
    """Raise ConfigError, which begins with `where`."""
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError as error:
        raise ConfigError(f"{where} has no IPv6 address in its brackets: {error}") from error
    if address.is_link_local and not address.scope_id:
        interface = "needs its network interface behind a %, as in [fe80::1%eth0]"
        raise ConfigError(f"{where} has a link-local address, which {interface}")


def bad(
    where: str | os.PathLike[str], got: str, expected: str, step: str = "correct the data"
) -> DataError:
    """What is wrong with a data set, in one line."""
    return DataError(f"{one_line(str(where), MOST_PATH)}: got {got}, expected {expected}; {step}")
