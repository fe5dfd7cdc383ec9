"""Tables in CSV files: a line of column names, then an example in each line.

By the standard library's csv: numpy.loadtxt names no column of a wrong cell, and reads labels of
text only beside numbers of one type."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from array import array
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edge_sdk.data.bounded import shown
from edge_sdk.data.contract import MOST_INPUT, bad, checked_names
from edge_sdk.data.examples import Examples, Ints, check_examples, mapped
from edge_sdk.data.readers.csv_rows import EXPECTED, Row, check_memory, opened, rows_of
from edge_sdk.data.readers.description import NAME, Description, described_by
from edge_sdk.data.readers.table import FileSet, register_reader
from edge_sdk.tasks.table import task_of

Column: TypeAlias = Annotated[str, Meta(max_length=1000)]
Size: TypeAlias = Annotated[int, Meta(ge=1)]
Range: TypeAlias = tuple[float, float]
log = logging.getLogger(__name__)
CHECKED = 4096  # rows after which memory is looked at again
MISSING = ("", "na", "n/a", "nan", "null", "none", "?")  # marks of a value that is not known
WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
DECIMAL_COMMA = re.compile(r"[+-]?[0-9.]*,[0-9]+")


class Table(Description, frozen=True, kw_only=True):
    """label: the column that is it. columns: the names, of a file without a line of them. ignore:
    columns that are no inputs. subject: the column that says who was measured. range: the least
    and the greatest value, of all inputs or of columns by name, which become -1 and 1. shape: of an
    example, filled row by row. missing: what becomes of rows that lack a value."""

    label: Column = "label"
    columns: tuple[Column, ...] = ()
    ignore: tuple[Column, ...] = ()
    subject: Column | None = None
    range: Range | dict[str, Range] | None = None
    shape: Annotated[tuple[Size, ...], Meta(max_length=3)] = ()
    delimiter: Literal[",", ";", "\t"] | None = None
    missing: Literal["refuse", "leave out"] = "refuse"


def read_csv(paths: Sequence[Path]) -> Examples:
    """Examples (n, F), or (n, *shape) as data.toml says. Raises DataError with line and column."""
    (path,) = paths
    table = described_by(path.parent, Table)
    with mapped(path, EXPECTED), opened(path) as file:
        rows = rows_of(file, path, table.delimiter)
        if table.columns:
            names = table.columns
        else:
            names = tuple(name.strip() for name in next(rows, (1, []))[1])
        held = _Held(path, _Columns.of(names, table, path), table.missing == "leave out")
        for number, (line, row) in enumerate(rows, start=1):
            held.add(line, row)
            if number % CHECKED == 0:
                check_memory(file, path, len(held.numbers))
        return _examples(held, table, path)


# -- columns ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Columns:
    """names: of all columns. inputs, label, subject: their places."""

    names: tuple[str, ...]
    inputs: tuple[int, ...]
    label: int
    subject: int | None

    @classmethod
    def of(cls, names: tuple[str, ...], table: Table, path: Path) -> _Columns:
        there = f"columns {shown(names)}"
        if names and not table.columns and all(map(_is_number, names)):
            step = f"write one, or columns = [...] in {NAME} beside the file"
            raise bad(path, f"a first line of numbers, {shown(names)}", "names of columns", step)
        if table.label not in names:
            step = f'rename the one that is it, or write label = "NAME" in {NAME} beside the file'
            raise bad(path, there, f"one called {table.label!r:.60}", step)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise bad(path, f"the column {twice[0]!r:.60} twice", "a name for each", "rename one")
        if "" in names and "" not in table.ignore:
            got = f"column {names.index('') + 1} without a name"
            step = f'name it, or if it is an index write ignore = [""] in {NAME} beside the file'
            raise bad(path, got, "a name for each", step)
        subject = [] if table.subject is None else [table.subject]
        others = {*table.ignore, *subject, table.label}
        inputs = tuple(place for place, name in enumerate(names) if name not in others)
        ranges = table.range if isinstance(table.range, dict) else {}
        if unknown := sorted({*others, *ranges} - set(names)):
            raise bad(path, there, f"{unknown[0]!r:.60} among them, as {NAME} says")
        if not inputs:
            raise bad(path, there, "inputs beside the label", "add some")
        places = [names.index(name) for name in subject]
        return cls(names, inputs, names.index(table.label), places[0] if places else None)


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return False


# -- values ----------------------------------------------------------------------------------------


@dataclass
class _Texts:
    """Texts as numbers, in the order in which they were seen first."""

    numbers: dict[str, int] = field(default_factory=dict)
    seen: array[int] = field(default_factory=lambda: array("q"))

    def add(self, text: str) -> None:
        self.seen.append(self.numbers.setdefault(text, len(self.numbers)))


@dataclass
class _Held:
    """What was read: inputs one after another, and the labels and subjects."""

    path: Path
    columns: _Columns
    leaves_out: bool
    numbers: array[float] = field(default_factory=lambda: array("d"))
    labels: _Texts = field(default_factory=_Texts)
    subjects: _Texts = field(default_factory=_Texts)
    left_out: int = 0

    def add(self, line: int, row: Row) -> None:
        columns, where = self.columns, f"{self.path}, line {line}"
        if len(row) != len(columns.names):
            step = "correct the line; a cell with a delimiter in it stands between quotes"
            wanted = f"{len(columns.names)}, {', '.join(columns.names)!r:.60}"
            raise bad(where, f"{len(row)} cells", wanted, step)
        cells = [row[place] for place in columns.inputs]
        values = _numbers(cells)
        label = row[columns.label].strip()
        subject = "-" if columns.subject is None else row[columns.subject].strip()
        if values is None or not (label and subject):
            self._check_cells(where, row)
            self.left_out += 1
            return
        self.numbers.extend(values)
        self.labels.add(label)
        self.subjects.add(subject)

    def _check_cells(self, where: str, row: Row) -> None:
        """Raise DataError, unless all that is wrong with a row is that a value is missing, and such
        rows are left out."""
        columns, is_missing = self.columns, False
        for place, cell in enumerate(map(str.strip, row)):
            is_input = place in columns.inputs
            if not is_input and place not in (columns.label, columns.subject):
                continue
            if cell.lower() in MISSING if is_input else not cell:
                wanted, step = "a value", f'or write missing = "leave out" in {NAME}'
                if self.leaves_out:
                    is_missing = True
                    continue
            elif is_input and _numbers([cell]) is None:
                wanted, step = "a number", f'or write ignore = ["{columns.names[place]}"] in {NAME}'
                if DECIMAL_COMMA.fullmatch(cell):
                    wanted, step = "a decimal point", "1.5 for 1,5, and nothing between thousands"
            else:
                continue
            column = f"{where}, column {columns.names[place]!r:.60}"
            raise bad(column, f"{cell!r:.60}", wanted, f"correct the cell, {step}")
        if not is_missing:
            raise bad(
                where, "numbers of a sum beyond 64 bits", f"at most {MOST_INPUT:g}", "scale them"
            )


def _numbers(cells: Sequence[str]) -> list[float] | None:
    """None: not each of them is a finite number."""
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        return None
    # One look at all: NaN and infinity stay in a sum. Python takes 1_000 for 1000.
    is_plain = math.isfinite(sum(values)) and "_" not in "".join(cells)
    return values if is_plain else None


def _examples(held: _Held, table: Table, path: Path) -> Examples:
    if held.left_out:
        log.warning("%s: %d rows that lack a value are left out", path, held.left_out)
    if not held.labels.seen:
        raise bad(path, "no row", "an example in each line", "add some")
    inputs = [held.columns.names[place] for place in held.columns.inputs]
    ranges = _ranges(inputs, table, path)
    x = np.frombuffer(held.numbers, np.float64).reshape(-1, len(inputs))  # (n, F)
    middle, half = ranges.sum(1) / 2, (ranges[:, 1] - ranges[:, 0]) / 2
    x -= middle
    x /= half
    shape = table.shape or (len(inputs),)
    if math.prod(shape) != len(inputs):
        got = f"{len(inputs)} inputs, {shown(inputs)}"
        raise bad(path, got, f"{math.prod(shape)}, as shape of {NAME} says", "correct either")
    y, class_names = _labels(held.labels, table, path)
    subjects = np.frombuffer(held.subjects.seen, np.int64) if table.subject else None
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        x32 = x.astype(np.float32).reshape(-1, *shape)
    num_classes = len(class_names) or max(0, int(y.max())) + 1
    told = json.dumps([inputs, ranges.tolist()])  # their order and scale mean the same everywhere
    made_of = f"{len(inputs)} columns ({hashlib.sha256(told.encode()).hexdigest()[:8]})"
    examples = Examples(x32, y, num_classes, subjects, None, class_names, made_of)
    return check_examples(examples, str(path))


def _ranges(inputs: Sequence[str], table: Table, path: Path) -> npt.NDArray[np.float64]:
    """(F, 2), what becomes -1 and 1; of inputs that stay as they are these themselves."""
    by_name = table.range if isinstance(table.range, dict) else dict.fromkeys(inputs, table.range)
    for name, range in by_name.items():
        if range is not None and not -math.inf < range[0] < range[1] < math.inf:
            wanted = "two finite numbers, the least first"
            raise bad(path, f"range {list(range)} of {name!r:.60}", wanted, f"correct {NAME}")
    return np.array([by_name.get(name) or (-1.0, 1.0) for name in inputs])


def _labels(labels: _Texts, table: Table, path: Path) -> tuple[Ints, tuple[str, ...]]:
    """(n,) and the names of the classes; () where they are numbers. Raises DataError."""
    texts, where = list(labels.numbers), f"{path}, column {table.label!r:.60}"
    whole = [text for text in texts if WHOLE.fullmatch(text)]
    names = checked_names(table.classes, where) if table.classes else ()
    if not names:
        other = [text for text in texts if text not in whole]
        if whole and other:
            got = f"the labels {whole[0]!r} and {other[0]!r:.60}"
            raise bad(where, got, "numbers alone or names alone", f"write classes in {NAME}")
        if numbers := [text for text in other if _is_number(text)]:
            step = "for 1.0 write 1"
            raise bad(where, f"the label {numbers[0]!r:.60}", "whole numbers or names", step)
        names = checked_names(sorted(texts), where) if other else ()
    distinct = np.array(texts) if names else np.array(list(map(int, texts)))
    numbered: Ints = task_of("classify").labels(distinct, names, where)
    return numbered[np.frombuffer(labels.seen, np.int64)], names


register_reader(
    FileSet(
        name="csv",
        read=read_csv,
        train=("train.csv",),
        test=("test.csv",),
        alone=("*.csv", "*.tsv"),
        title=lambda path: path.resolve().name if path.is_dir() else path.stem,
        rank=2,
    )
)
