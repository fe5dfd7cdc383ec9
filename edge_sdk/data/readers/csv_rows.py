"""The rows of a CSV file, one at a time: its encoding, the sign between cells, and lines that are
no table's, of which none is held whole."""

from __future__ import annotations

import codecs
import csv
import os
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO, TextIO, TypeAlias

from edge_sdk.data.bounded import check_free
from edge_sdk.data.contract import bad
from edge_sdk.data.readers.description import NAME

Row: TypeAlias = list[str]
EXPECTED = "a CSV file in UTF-8"
MOST_LINE = 4 * 1024**2  # characters
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
WORK_BYTES = 12  # of a number as float64, and as float32 that trains


def opened(path: Path) -> TextIO:
    """As text of UTF-8, or of UTF-16 as spreadsheets save it, without a byte order mark."""
    with path.open("rb") as file:
        is_wide = file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return path.open(encoding="utf-16" if is_wide else "utf-8-sig", newline="")


def rows_of(file: TextIO, path: Path, delimiter: str | None) -> Iterator[tuple[int, Row]]:
    """Each row that holds anything, with the number of its last line. Raises DataError."""
    lines = _lines(file, path)
    first = next(lines, "")
    sign = delimiter or _delimiter(first, path)
    reader = csv.reader(chain([first], lines), delimiter=sign, strict=True)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            wanted = 'cells, those with a delimiter, quote or line end in them between "'
            raise bad(f"{path}, line {reader.line_num}", str(error), wanted) from error
        if any(row):
            yield reader.line_num, row


def _lines(file: TextIO, path: Path) -> Iterator[str]:
    while line := file.readline(MOST_LINE + 1):
        if len(line) > MOST_LINE or "\0" in line:
            got = "null bytes" if "\0" in line else f"a line of more than {MOST_LINE} characters"
            raise bad(path, got, EXPECTED, "give another file")
        yield line


def _delimiter(line: str, path: Path) -> str:
    unquoted = re.sub(r'"[^"]*"', "", line)
    found = [sign for sign in DELIMITERS if sign in unquoted]
    if len(found) == 1:
        return found[0]
    got = " and ".join(DELIMITERS[sign] for sign in found) or "no delimiter"
    wanted = f"names with one of {', '.join(DELIMITERS.values())} between them"
    step = f'write delimiter = ";", or another, in {NAME} beside the file'
    raise bad(path, f"{got} in the first line, {line.strip()!r:.60}", wanted, step)


def check_memory(file: TextIO, path: Path, count: int) -> None:
    """Raise DataError where the numbers of the whole file will not fit, as far as its first part,
    which held `count`, tells."""
    buffer: BinaryIO = file.buffer
    share = os.fstat(file.fileno()).st_size / max(1, buffer.tell())
    check_free(path, round(WORK_BYTES * share * count) - 8 * count, "numbers")
