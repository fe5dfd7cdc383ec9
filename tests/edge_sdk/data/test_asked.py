"""What --input and --classes say beside data that says it too."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.data.examples import Examples
from edge_sdk.data.loading import as_asked
from edge_sdk.errors import UsageError

DATA = Examples(np.zeros((4, 1, 8, 8), np.float32), np.array([0, 1, 2, 8]), 9)


def test_classes_may_be_more_than_the_data_holds():
    assert as_asked(DATA, "t.npz", None, None).num_classes == 9
    assert as_asked(DATA, "t.npz", None, 9).num_classes == 9
    assert as_asked(DATA, "t.npz", (1, 8, 8), 10).num_classes == 10


@pytest.mark.parametrize(
    ("shape", "classes", "said"),
    [
        (None, 8, "--classes 8, but t.npz has 9; leave --classes out, or raise it"),
        ((1, 9, 8), None, "--input 1x9x8, but t.npz has 1x8x8; leave --input out"),
        ((64,), 10, "--input 64, but t.npz has 1x8x8; leave --input out"),
    ],
)
def test_fewer_classes_and_other_inputs_are_refused(shape, classes, said):
    with pytest.raises(UsageError, match=said):
        as_asked(DATA, "t.npz", shape, classes)
