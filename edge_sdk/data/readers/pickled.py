"""The Python versions of CIFAR-10 and CIFAR-100: pickles, read without executing anything.

The published files were written by Python 2 in protocol 2: a dict of strings, lists of integers
and strings, and one numpy array of uint8. `pickletools` parses the opcodes; the table below says
what the few that these files need mean here. Names of classes and functions are compared with four
known ones and never looked up in a module. Every other opcode, name or call is refused.
The alternative, an Unpickler with a restricted find_class, still runs what it finds."""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from edge_sdk.data.examples import Examples, bad, mapped
from edge_sdk.data.readers.binary import BATCHES, CIFAR_PIXELS, CIFAR_SHAPE, joined
from edge_sdk.data.readers.scaling import image_examples
from edge_sdk.data.readers.table import FileSet, register_reader

EXPECTED = "a CIFAR pickle of protocol 2: a dict with one uint8 array, lists, strings and integers"
STEP = "copy the file again, or use the binary version"


@dataclass(frozen=True)
class _Name:
    """A class or function that the pickle names."""

    name: str


@dataclass(eq=False)
class _Pixels:
    """The numpy array: empty when made, filled by BUILD."""

    array: npt.NDArray[np.uint8] | None = None


NDARRAY, DTYPE, MAKE = _Name("numpy ndarray"), _Name("numpy dtype"), _Name("_reconstruct")
NAMES = {
    "numpy ndarray": NDARRAY,
    "numpy dtype": DTYPE,
    "numpy.core.multiarray _reconstruct": MAKE,
    "numpy._core.multiarray _reconstruct": MAKE,  # numpy 2
}
BYTE = _Name("uint8")  # what numpy dtype("u1") makes


@dataclass
class _Machine:
    """pickle's stack machine, as far as it is needed."""

    stack: list[Any] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def pop(self, count: int) -> list[Any]:
        """The last `count` values, none of them from below the last mark."""
        at = len(self.stack) - count
        if at < (self.marks[-1] if self.marks else 0):
            raise ValueError("an opcode without its values")
        values, self.stack[at:] = self.stack[at:], []
        return values

    def pop_to_mark(self) -> list[Any]:
        at = self.marks.pop()
        values, self.stack[at:] = self.stack[at:], []
        return values

    def top(self, kind: type) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise ValueError(f"an opcode that needs a {kind.__name__}")
        return self.stack[-1]


Action: TypeAlias = Callable[[_Machine, Any], object]


def _protocol(machine: _Machine, version: Any) -> None:
    if version != 2:
        raise ValueError(f"protocol {version}")


def _set_items(machine: _Machine, items: list[Any]) -> None:
    held = machine.top(dict)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) is not str:
            raise ValueError("a dict key that is no string")
        held[key] = value


def _extend(machine: _Machine, items: list[Any]) -> None:
    machine.top(list).extend(items)


def _global(machine: _Machine, name: Any) -> None:
    if name not in NAMES:
        raise ValueError(f"the name {name[:80]!r}")
    machine.stack.append(NAMES[name])


def _reduce(machine: _Machine, _: Any) -> None:
    """A call: an empty array, or the dtype of bytes; nothing else."""
    function, arguments = machine.pop(2)
    if function is MAKE and arguments == (NDARRAY, (0,), "b"):
        machine.stack.append(_Pixels())
    elif function is DTYPE and arguments == ("u1", 0, 1):
        machine.stack.append(BYTE)
    else:
        raise ValueError("a call other than numpy's for a uint8 array")


def _build(machine: _Machine, _: Any) -> None:
    """Sets the state of the value below: (1, shape, dtype, is in Fortran order, bytes) of the
    array; that of the dtype is of no consequence for bytes."""
    (state,) = machine.pop(1)
    if machine.stack and machine.stack[-1] is BYTE:
        return
    pixels: _Pixels = machine.top(_Pixels)
    version, shape, dtype, is_fortran, text = state
    if version != 1 or dtype is not BYTE or type(text) is not str or pixels.array is not None:
        raise ValueError("a state other than that of one uint8 array")
    if not 1 <= len(shape) <= 2 or min(shape) < 0:
        raise ValueError(f"an array of {len(shape)} axes")
    flat = np.frombuffer(text.encode("latin-1"), dtype=np.uint8)
    pixels.array = flat.reshape(shape, order="F" if is_fortran else "C")


def _pushed(make: Callable[[Any], Any]) -> Action:
    return lambda machine, argument: machine.stack.append(make(argument))


def _memoise(machine: _Machine, key: Any) -> None:
    machine.memo[key] = machine.stack[-1]


def _tuple(count: int) -> Action:
    return lambda machine, _: machine.stack.append(tuple(machine.pop(count)))


_TEXT_OR_NUMBER = _pushed(lambda argument: argument)
ACTIONS: dict[str, Action] = {
    "PROTO": _protocol,
    "MARK": lambda machine, _: machine.marks.append(len(machine.stack)),
    "EMPTY_DICT": _pushed(lambda _: {}),
    "EMPTY_LIST": _pushed(lambda _: []),
    "BINPUT": _memoise,
    "LONG_BINPUT": _memoise,
    "BINGET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "LONG_BINGET": lambda machine, key: machine.stack.append(machine.memo[key]),
    "SHORT_BINSTRING": _TEXT_OR_NUMBER,
    "BINSTRING": _TEXT_OR_NUMBER,
    "BININT": _TEXT_OR_NUMBER,
    "BININT1": _TEXT_OR_NUMBER,
    "BININT2": _TEXT_OR_NUMBER,
    "LONG1": _TEXT_OR_NUMBER,
    "NONE": _pushed(lambda _: None),
    "NEWFALSE": _pushed(lambda _: False),
    "NEWTRUE": _pushed(lambda _: True),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "APPEND": lambda machine, _: _extend(machine, machine.pop(1)),
    "APPENDS": lambda machine, _: _extend(machine, machine.pop_to_mark()),
    "SETITEM": lambda machine, _: _set_items(machine, machine.pop(2)),
    "SETITEMS": lambda machine, _: _set_items(machine, machine.pop_to_mark()),
    "GLOBAL": _global,
    "REDUCE": _reduce,
    "BUILD": _build,
}


def _read_cifar(paths: Sequence[Path], key: str, num_classes: int) -> Examples:
    """data (n, 3072): the planes red, green, blue, each row by row; all files joined."""
    batches = [_read_batch(path, key) for path in paths]
    x = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, *CIFAR_SHAPE)
    y = np.concatenate([labels for _, labels in batches])
    del batches  # before the float32 copy is made
    return image_examples(x, y, num_classes, joined(paths))


def _read_batch(path: Path, key: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    with mapped(path, EXPECTED, STEP):
        content = _read_dict(path)
        data, labels = content.get("data"), content.get(key)
        pixels = data.array if type(data) is _Pixels else None
        if pixels is None or type(labels) is not list:
            raise bad(path, f"keys {sorted(content)}", f"an array data and a list {key}", STEP)
        if pixels.shape != (len(labels), CIFAR_PIXELS) or not labels:
            got = f"data {pixels.shape} with {len(labels)} {key}"
            raise bad(path, got, f"(n, {CIFAR_PIXELS}) with n, at least 1", STEP)
        if any(type(label) is not int for label in labels):
            raise bad(path, f"{key} that are no integers", "integers", STEP)
        return pixels, np.array(labels, dtype=np.int64)


def _read_dict(path: Path) -> dict[str, Any]:
    """What the pickle builds. Raises whatever a wrong one leads to; the caller maps it."""
    machine = _Machine()
    with path.open("rb") as file:
        for opcode, argument, position in pickletools.genops(file):
            if opcode.name == "STOP":
                break
            if opcode.name not in ACTIONS:
                raise ValueError(f"the opcode {opcode.name} at byte {position}")
            ACTIONS[opcode.name](machine, argument)
    if len(machine.stack) != 1 or machine.marks:
        raise ValueError("an end with values left over")
    content: dict[str, Any] = machine.top(dict)
    return content


read_cifar_10 = partial(_read_cifar, key="labels", num_classes=10)
read_cifar_100 = partial(_read_cifar, key="fine_labels", num_classes=100)
register_reader(
    FileSet(name="cifar-10", read=read_cifar_10, train=BATCHES, test=("test_batch",)),
    FileSet(name="cifar-100", read=read_cifar_100, train=("train",), test=("test",)),
)
