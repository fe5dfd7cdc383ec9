"""Arrays of whatever kind as plain numpy ones, with nothing lost: what numpy would drop in silence,
a mask, or cannot hold, is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.data.contract import bad
from edge_sdk.data.examples import mapped

MASK_STEP = "leave these examples out, or fill the values on purpose with .filled(...)"
SHOWN = 5  # examples that a message names
# By the kind of a dtype, what to do about it where it is not taken.
INPUT_STEPS = {
    "b": 'give x.astype("float32")',
    "i": 'give pixels of 0 to 255 as x.astype("uint8"), others as floats, scaled by constants; '
    "of token ids say the vocabulary",
    "c": "give real and imaginary parts as two channels",
    "M": "give numbers, e.g. seconds since a fixed time",
    "O": "give one array of numbers, no list of arrays of several shapes",
    "V": "give one array of numbers, fields as channels",
} | dict.fromkeys("US", "give numbers")
INPUT_STEPS |= {"u": INPUT_STEPS["i"], "m": INPUT_STEPS["M"]}


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


def checked_inputs(
    x: npt.NDArray[Any], where: str, name: str = "x", vocabulary: int = 0
) -> npt.NDArray[Any]:
    """The same, of uint8 or floats; with a vocabulary of integers. Raises DataError, which tells
    how to get there."""
    if vocabulary:
        if x.dtype.kind not in "iu":
            raise bad(where, f"{name} of dtype {x.dtype}", "token ids, which are integers")
        return x
    if x.dtype != np.uint8 and x.dtype.kind != "f":
        step = INPUT_STEPS.get(x.dtype.kind, "give numbers")
        raise bad(where, f"{name} of dtype {x.dtype}", "uint8 or float", step)
    return x


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
