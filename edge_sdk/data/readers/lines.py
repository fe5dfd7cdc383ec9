"""The lines of a text file of a person: its encoding, and what is no text, of which nothing long is
held."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from edge_sdk.data.bounded import check_free
from edge_sdk.data.contract import bad

MOST_LINE = 4 * 1024**2  # characters


def opened(path: Path, newline: str | None = None) -> TextIO:
    """As text of UTF-8, or of UTF-16 as Windows saves it, without a byte order mark. newline: ""
    leaves line ends as they are."""
    with path.open("rb") as file:
        is_wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return path.open(encoding="utf-16" if is_wide else "utf-8-sig", newline=newline)


def lines_of(file: TextIO, path: Path, expected: str) -> Iterator[str]:
    """Raises DataError for a line that is too long, or holds null bytes."""
    while line := file.readline(MOST_LINE + 1):
        if len(line) > MOST_LINE or "\0" in line:
            got = "null bytes" if "\0" in line else f"a line of more than {MOST_LINE} characters"
            raise bad(path, got, expected, "give another file")
        yield line


def check_memory(file: TextIO, path: Path, num_bytes: int, held_bytes: int) -> None:
    """Raise DataError where the whole file will not fit, as far as its first part tells, which
    takes num_bytes in the end, of which held_bytes are held."""
    buffer: BinaryIO = file.buffer
    share = os.fstat(file.fileno()).st_size / max(1, buffer.tell())
    check_free(path, round(share * num_bytes) - held_bytes, "numbers")
