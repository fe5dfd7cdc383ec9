"""Arrays of whatever kind as plain numpy ones, with nothing lost: what numpy would drop in silence,
a mask, or cannot hold, is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.data.contract import NAMES_STEP, bad
from edge_sdk.data.examples import MAX_CLASSES, mapped

MASK_STEP = "leave these examples out, or fill the values on purpose with .filled(...)"
SHOWN = 5  # examples that a message names
# By the kind of a dtype, what to do about it where it is not taken.
INPUT_STEPS = {
    "b": 'give x.astype("float32")',
    "i": 'give pixels of 0 to 255 as x.astype("uint8"), others as floats, scaled by constants',
    "c": "give real and imaginary parts as two channels",
    "M": "give numbers, e.g. seconds since a fixed time",
    "O": "give one array of numbers, no list of arrays of several shapes",
    "V": "give one array of numbers, fields as channels",
} | dict.fromkeys("US", "give numbers")
INPUT_STEPS |= {"u": INPUT_STEPS["i"], "m": INPUT_STEPS["M"]}
LABEL_STEPS = {"f": "give y.astype(int), if all are whole numbers", "b": "give y.astype(int)"}
LABEL_STEPS |= {"S": "give y.astype(str) with class_names"} | dict.fromkeys("OUT", NAMES_STEP)


def plain(value: object, name: str, where: str) -> npt.NDArray[Any]:
    """The value as an array. Raises DataError for one that is masked, sparse or no array."""
    if rows := masked(value):
        more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
        which = f"{', '.join(map(str, rows[:SHOWN]))}{more}"
        got = f"masked values of {name} in {len(rows)} examples ({which})"
        raise bad(where, got, "no masked value", MASK_STEP)
    kind = type(value).__name__
    is_torch = str(getattr(value, "layout", "torch.strided")) != "torch.strided"
    if is_torch or hasattr(value, "tocsr"):
        raise bad(where, f"{name} of type {kind}, sparse", "a dense array", "give it .toarray()")
    with mapped(where, f"{name} as one array of numbers", "correct the data"):
        return np.asarray(value.get_data() if hasattr(value, "get_data") else value)


def checked_inputs(x: npt.NDArray[Any], where: str, name: str = "x") -> npt.NDArray[Any]:
    """The same, of uint8 or floats. Raises DataError, which tells how to get there."""
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        step = INPUT_STEPS.get(x.dtype.kind, "give numbers")
        raise bad(where, f"{name} of dtype {x.dtype}", "uint8 or float", step)
    return x


def checked_labels(y: npt.NDArray[Any], names: tuple[str, ...], where: str) -> npt.NDArray[Any]:
    """Labels (n,) as int64, those of text by their place in names. Raises DataError."""
    if not y.size:
        raise bad(where, "empty data, no label", "at least one example")
    if y.ndim == 2:
        step = "give y[:, 0]" if y.shape[1] == 1 else "of one-hot rows give y.argmax(1)"
        raise bad(where, f"y of shape {y.shape}", f"({len(y)},), a label for each example", step)
    is_text = y.dtype.kind in "UT" or (
        y.dtype.kind == "O" and all(isinstance(label, str) for label in y.flat)
    )
    if is_text and names:
        numbers = {label: number for number, label in enumerate(names)}
        unknown = sorted({str(label) for label in y.flat} - numbers.keys())
        if unknown:
            step = "add it there on every device, or correct the data"
            raise bad(where, f"the label {unknown[0]!r:.60}", "a name of class_names", step)
        return np.array([numbers[str(label)] for label in y.flat], np.int64).reshape(y.shape)
    if y.dtype.kind not in "iu":
        step = LABEL_STEPS.get(y.dtype.kind, "correct the data")
        raise bad(where, f"y of dtype {'text' if is_text else y.dtype}", "integers", step)
    if y.max() > MAX_CLASSES:  # before it becomes another number
        step = "number the classes from 0, e.g. by np.unique(y, return_inverse=True)[1]"
        raise bad(where, f"labels up to {y.max()}", f"at most {MAX_CLASSES}", step)
    return y.astype(np.int64)


def _has_mask(value: object) -> bool:
    """Of numpy, of an array like numpy's, or of torch."""
    is_like_numpy = isinstance(value, np.ndarray) and hasattr(value, "mask")
    return is_like_numpy or hasattr(value, "get_mask")


def masked(value: Any) -> list[int]:
    """The places along the first axis that a mask hides something of; 0 of a single number."""
    if isinstance(value, list | tuple):
        return [place for place, item in enumerate(value) if _has_mask(item) and masked(item)]
    if not _has_mask(value):
        return []
    # torch's mask is True where a value counts, numpy's where it does not.
    mask = ~np.asarray(value.get_mask()) if hasattr(value, "get_mask") else np.asarray(value.mask)
    hidden = np.broadcast_to(mask, value.shape)
    rows: list[int] = np.flatnonzero(hidden.reshape(*hidden.shape[:1], -1).any(-1)).tolist()
    return rows
