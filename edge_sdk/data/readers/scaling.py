"""From what files hold to what models take: float32 by constants, never by the shard's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from edge_sdk.data.contract import laid_out
from edge_sdk.data.examples import Examples, Floats, Scaling, check_examples

PIXELS: Scaling = (127.5, 1.0)  # 0..255 to -1..1


@np.errstate(all="ignore")  # what is beyond float32 becomes infinite and is refused as such
def scaled(x: npt.NDArray[Any], divisor: float, offset: float) -> Floats:
    """x / divisor - offset in float32, whatever its memory order in C order."""
    result = x.astype(np.float32, order="C")
    result /= np.float32(divisor)  # in place: images are the largest arrays of a device
    result -= np.float32(offset)
    return result


def image_examples(
    x: npt.NDArray[np.uint8], y: npt.NDArray[Any], num_classes: int, where: str
) -> Examples:
    """Checked examples from pixels (n, C, H, W) and integer labels (n,) from 0."""
    laid_out(x.shape, None, where)
    examples = Examples(scaled(x, *PIXELS), y.astype(np.int64), num_classes, scaling=PIXELS)
    return check_examples(examples, where)
