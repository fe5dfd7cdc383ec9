"""A reader of your own: pixels as text, each line a label and 784 numbers from 0 to 255.

    PYTHONPATH=examples edge-sdk run --import own_reader --data FOLDER ...

FOLDER holds pixels.csv, and pixels-test.csv if there is a test part.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from edge_sdk.data.examples import Examples, bad, mapped
from edge_sdk.data.readers.scaling import image_examples
from edge_sdk.data.readers.table import FileSet, register_reader

SIDE = 28


def read_pixels(paths: Sequence[Path]) -> Examples:
    """Images (n, 1, 28, 28) and their labels, which stand first in a line."""
    (path,) = paths
    expected = f"lines of a label and {SIDE * SIDE} numbers from 0 to 255"
    with mapped(path, expected):
        table = np.loadtxt(path, dtype=np.uint8, delimiter=",", ndmin=2)  # (n, 785)
    if table.shape[1] != 1 + SIDE * SIDE:
        raise bad(path, f"lines of {table.shape[1]} numbers", expected)
    images = table[:, 1:].reshape(-1, 1, SIDE, SIDE)
    return image_examples(images, table[:, 0], 10, str(path))


register_reader(
    FileSet(name="pixels", read=read_pixels, train=("pixels.csv",), test=("pixels-test.csv",))
)
