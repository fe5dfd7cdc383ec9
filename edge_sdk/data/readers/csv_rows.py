"""The rows of a CSV file, one at a time, and the sign between their cells."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TextIO, TypeAlias

from edge_sdk.data.contract import bad
from edge_sdk.data.readers.description import NAME
from edge_sdk.data.readers.lines import lines_of

Row: TypeAlias = list[str]
EXPECTED = "a CSV file in UTF-8"
DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}


def rows_of(file: TextIO, path: Path, delimiter: str | None) -> Iterator[tuple[int, Row]]:
    """Each row that holds anything, with the number of its last line. Raises DataError."""
    lines = lines_of(file, path, EXPECTED)
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


def _delimiter(line: str, path: Path) -> str:
    unquoted = re.sub(r'"[^"]*"', "", line)
    found = [sign for sign in DELIMITERS if sign in unquoted]
    if len(found) == 1:
        return found[0]
    got = " and ".join(DELIMITERS[sign] for sign in found) or "no delimiter"
    wanted = f"names with one of {', '.join(DELIMITERS.values())} between them"
    step = f'write delimiter = ";", or another, in {NAME} beside the file'
    raise bad(path, f"{got} in the first line, {line.strip()!r:.60}", wanted, step)
