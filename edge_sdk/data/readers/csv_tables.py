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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edge_sdk.data.bounded import shown
from edge_sdk.data.contract import MOST_INPUT, bad
from edge_sdk.data.examples import Examples, Floats, Ints, check_examples, mapped
from edge_sdk.data.readers.csv_rows import EXPECTED, Row, rows_of
from edge_sdk.data.readers.description import NAME, Description, described_by
from edge_sdk.data.readers.labels import Words, class_labels, is_number, num_classes
from edge_sdk.data.readers.lines import check_memory, opened
from edge_sdk.data.readers.table import FileSet, register_reader

log = logging.getLogger(__name__)
Column: TypeAlias = Annotated[str, Meta(max_length=1000)]
Columns: TypeAlias = Annotated[tuple[Column, ...], Meta(min_length=1)]
Size: TypeAlias = Annotated[int, Meta(ge=1)]
Range: TypeAlias = tuple[float, float]
FAR = 1.5  # of a value, in halves of its range from the middle
CHECKED = 4096  # rows after which memory is looked at again
WORK_BYTES = 12  # of a number as float64, and as float32 that trains
MISSING = ("", "na", "n/a", "nan", "null", "none", "?")  # marks of a value that is not known
DECIMAL_COMMA = re.compile(r"[+-]?[0-9.]*,[0-9]+")


class Table(Description, frozen=True, kw_only=True):
    """label: the column that is it, of several values all of them. columns: the names, of a file
    without a line of them. ignore: columns that are no inputs. subject: the column that says who
    was measured. range: the least and the greatest value, of all inputs or of columns by name,
    which become -1 and 1. shape: of an example, filled row by row. missing: what becomes of rows
    that lack a value."""

    task: Literal["classify", "multilabel", "regress"] = "classify"
    label: Column | Columns = "label"
    columns: tuple[Column, ...] = ()
    ignore: tuple[Column, ...] = ()
    subject: Column | None = None
    range: Range | dict[str, Range] | None = None
    shape: Annotated[tuple[Size, ...], Meta(max_length=3)] = ()
    delimiter: Literal[",", ";", "\t"] | None = None
    missing: Literal["refuse", "leave out"] = "refuse"

    @property
    def labels(self) -> tuple[str, ...]:
        return (self.label,) if isinstance(self.label, str) else self.label


def read_csv(paths: Sequence[Path]) -> Examples:
    """Examples (n, F), or (n, *shape) as data.toml says. Raises DataError with line and column."""
    (path,) = paths
    table = described_by(path.parent, Table)
    with mapped(path, EXPECTED), opened(path, newline="") as file:
        rows = rows_of(file, path, table.delimiter)
        if table.columns:
            names = table.columns
        else:
            names = tuple(name.strip() for name in next(rows, (1, []))[1])
        held = _Held(path, _Places.of(names, table, path), table.missing == "leave out")
        for number, (line, row) in enumerate(rows, start=1):
            held.add(line, row)
            if number % CHECKED == 0:
                count = len(held.numbers)
                check_memory(file, path, WORK_BYTES * count, 8 * count)
        return _examples(held, table, path)


# -- columns ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Places:
    """names: of all columns. numbers: places of the inputs, and behind them of labels that are
    values, of which there are num_values. words: of the label that is a class, and the subject."""

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    num_values: int
    words: tuple[int, ...]

    @classmethod
    def of(cls, names: tuple[str, ...], table: Table, path: Path) -> _Places:
        there = f"columns {shown(names)}"
        if names and not table.columns and all(map(is_number, names)):
            step = f"write one, or columns = [...] in {NAME} beside the file"
            raise bad(path, f"a first line of numbers, {shown(names)}", "names of columns", step)
        if table.task == "classify" and len(table.labels) != 1:
            step = f'write one, or task = "regress" or "multilabel" in {NAME}'
            raise bad(path, f"labels {shown(table.labels)} to classify", "one column", step)
        if table.task != "classify" and table.classes:
            step = "leave classes out: the columns are the names"
            raise bad(path, f"classes beside task {table.task!r} in {NAME}", "none", step)
        if lacking := [name for name in table.labels if name not in names]:
            step = f'rename the one that is it, or write label = "NAME" in {NAME} beside the file'
            raise bad(path, there, f"one called {lacking[0]!r:.60}", step)
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise bad(path, f"the column {twice[0]!r:.60} twice", "a name for each", "rename one")
        if "" in names and "" not in table.ignore:
            got = f"column {names.index('') + 1} without a name"
            step = f'name it, or if it is an index write ignore = [""] in {NAME} beside the file'
            raise bad(path, got, "a name for each", step)
        subject = () if table.subject is None else (table.subject,)
        others = {*table.ignore, *subject, *table.labels}
        ranges = table.range if isinstance(table.range, dict) else {}
        if unknown := sorted({*others, *ranges} - set(names)):
            raise bad(path, there, f"{unknown[0]!r:.60} among them, as {NAME} says")
        inputs = [name for name in names if name not in others]
        if not inputs:
            raise bad(path, there, "inputs beside the label", "add some")
        words, values = (table.labels, ()) if table.task == "classify" else ((), table.labels)
        numbers = tuple(names.index(name) for name in (*inputs, *values))
        return cls(
            names, numbers, len(values), tuple(names.index(name) for name in (*words, *subject))
        )


# -- values ----------------------------------------------------------------------------------------


@dataclass
class _Held:
    """What was read: numbers one after another, and of each column of words its words."""

    path: Path
    places: _Places
    leaves_out: bool
    numbers: array[float] = field(default_factory=lambda: array("d"))
    words: list[Words] = field(default_factory=lambda: [Words(), Words()])
    num_rows: int = 0
    left_out: int = 0

    def add(self, line: int, row: Row) -> None:
        places, where = self.places, f"{self.path}, line {line}"
        if len(row) != len(places.names):
            step = "correct the line; a cell with a delimiter in it stands between quotes"
            wanted = f"{len(places.names)}, {', '.join(places.names)!r:.60}"
            raise bad(where, f"{len(row)} cells", wanted, step)
        values = _numbers([row[place] for place in places.numbers])
        words = [row[place].strip() for place in places.words]
        if values is None or not all(words):
            self._check_cells(where, row)
            self.left_out += 1
            return
        self.num_rows += 1
        self.numbers.extend(values)
        for held, word in zip(self.words, words, strict=False):
            held.add(word)

    def _check_cells(self, where: str, row: Row) -> None:
        """Raise DataError, unless all that is wrong with a row is that a value is missing, and such
        rows are left out."""
        is_missing, names = False, self.places.names
        for place in sorted((*self.places.numbers, *self.places.words)):
            cell, is_number = row[place].strip(), place in self.places.numbers
            if cell.lower() in MISSING if is_number else not cell:
                wanted, step = "a value", f'or write missing = "leave out" in {NAME}'
                if self.leaves_out:
                    is_missing = True
                    continue
            elif is_number and _numbers([cell]) is None:
                wanted, step = "a number", f'or write ignore = ["{names[place]}"] in {NAME}'
                if DECIMAL_COMMA.fullmatch(cell):
                    wanted, step = "a decimal point", "1.5 for 1,5, and nothing between thousands"
            else:
                continue
            column = f"{where}, column {names[place]!r:.60}"
            raise bad(column, f"{cell!r:.60}", wanted, f"correct the cell, {step}")
        if not is_missing:
            got = "numbers whose sum is infinite"
            raise bad(where, got, f"at most {MOST_INPUT:g} each", "scale them")


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
    places = held.places
    if held.left_out:
        log.warning("%s: %d rows that lack a value are left out", path, held.left_out)
    if not held.num_rows:
        raise bad(path, "no row", "an example in each line", "add some")
    columns = [places.names[place] for place in places.numbers]
    num_inputs = len(columns) - places.num_values
    inputs, shape = columns[:num_inputs], table.shape or (num_inputs,)
    if math.prod(shape) != num_inputs:
        got = f"{num_inputs} inputs, {shown(inputs)}"
        raise bad(path, got, f"{math.prod(shape)}, as shape of {NAME} says", "correct either")
    ranges = _ranges(columns, num_inputs, table, path)
    numbers = np.frombuffer(held.numbers, np.float64).reshape(held.num_rows, -1)  # (n, F + K)
    numbers -= ranges.sum(1) / 2
    numbers /= (ranges[:, 1] - ranges[:, 0]) / 2
    _tell_ranges(numbers, columns, num_inputs, ranges, path)
    with np.errstate(over="ignore"):  # what becomes infinite is refused below
        x = numbers[:, :num_inputs].astype(np.float32).reshape(-1, *shape)
        y: Floats | Ints = numbers[:, num_inputs:].astype(np.float32)  # (n, K), K = 0 of classes
    names = tuple(columns[num_inputs:])
    count = len(names)
    if table.task == "classify":
        where = f"{path}, column {table.label!r:.60}"
        labels, names = class_labels(held.words[0], table.classes, where)
        y, count = labels, num_classes(labels, names)
    subject = None
    if table.subject is not None:
        subject = np.frombuffer(held.words[len(places.words) - 1].seen, np.int64)
    told = json.dumps([columns, ranges.tolist()])  # order and scale mean the same everywhere
    examples = Examples(
        x,
        y,
        count,
        subject,
        class_names=names,
        task=table.task,
        made_of=f"{num_inputs} columns ({hashlib.sha256(told.encode()).hexdigest()[:8]})",
    )
    return check_examples(examples, str(path))


def _tell_ranges(
    numbers: npt.NDArray[np.float64],
    columns: Sequence[str],
    num_inputs: int,
    ranges: npt.NDArray[np.float64],
    path: Path,
) -> None:
    """numbers: (n, F + K), scaled: those far beyond their column's range are told, and in which
    unit answers are."""
    for place, (name, (low, high)) in enumerate(zip(columns, ranges.tolist(), strict=True)):
        if (low, high) == (-1.0, 1.0):
            continue
        if count := int((np.abs(numbers[:, place]) > FAR).sum()):
            said = (
                "%s: %d values of column %r lie far outside its range of %g to %g; correct them, "
            )
            log.warning(said + "or range in %s", path, count, name, low, high, NAME)
        if place >= num_inputs:
            middle, half = (low + high) / 2, (high - low) / 2
            said = "%s: answers and errors of %r are in the unit of its range: (%s - %g) / %g"
            log.warning(said, path, name, name, middle, half)


def _ranges(
    columns: Sequence[str], num_inputs: int, table: Table, path: Path
) -> npt.NDArray[np.float64]:
    """(F + K, 2), what becomes -1 and 1; of columns that stay as they are these themselves."""
    by_name = table.range
    if not isinstance(by_name, dict):
        by_name = {} if by_name is None else dict.fromkeys(columns[:num_inputs], by_name)
    for name, (low, high) in by_name.items():
        if not -math.inf < low < high < math.inf:
            wanted = "two finite numbers, the least first"
            raise bad(path, f"range {[low, high]} of {name!r:.60}", wanted, f"correct {NAME}")
    return np.array([by_name.get(name, (-1.0, 1.0)) for name in columns])


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
