"""What data seem not to mean is told, or refused, in one line that says what was given."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from edge_sdk.data.contract import checked_names, mismatch, scaling_of
from edge_sdk.data.in_memory import checked_source, shard_of
from edge_sdk.data.loading import load, load_shard, load_test
from tests.support.client_program import client
from tests.support.data_files import fails, write_npz

Y = np.arange(4) % 2
RULE = (127.5, 1.0)


def numbers(low: float, high: float, dtype=np.float32) -> np.ndarray:
    """(4, 1, 4, 4) from low to high."""
    return np.linspace(low, high, 64).reshape(4, 1, 4, 4).astype(dtype)


@pytest.mark.parametrize(
    ("x", "said"),
    [
        # 16 / 127.5 - 1 = -0.8745
        (numbers(0, 16, np.uint8), "uint8 of 0 to 16, scaled as pixels of 0 to 255 to -1 to -0.87"),
        (numbers(0, 16, np.uint8), "e.g. x / 8 - 1"),
        (numbers(0, 1.01, np.uint8), "e.g. x / 0.5 - 1"),
        (numbers(0, 1e-6), "the inputs are floats as given, 0 to 1e-06, and training wants about"),
        (numbers(0, 64, np.uint8), ""),
        (numbers(0, 0, np.uint8), ""),
        (numbers(0, 0.02), ""),
        (numbers(-1, 1), ""),
    ],
)
def test_inputs_that_training_does_not_want_are_told(tmp_path, caplog, x, said):
    path = write_npz(tmp_path / "a.npz", x=x, y=Y)
    for read in (load_shard, load_test):
        caplog.clear()
        read(path)
        assert said in caplog.text
        assert bool(caplog.records) == bool(said)
    with shard_of(checked_source((x, Y))) as shard:  # a program's own arrays
        caplog.clear()
        load_shard(shard)
        assert said in caplog.text
        assert bool(caplog.records) == bool(said)


def test_integers_of_one_rule_and_of_other_kinds_are_told(tmp_path, caplog):
    for name, high in (("train", 16), ("test", 254)):
        write_npz(tmp_path / f"{name}.npz", x=numbers(0, high, np.uint8), y=Y)
    load(str(tmp_path))
    assert "(train) are 0 to 16, those of its test part 0 to 254; are they of one" in caplog.text
    whole = scaling_of(-1, 1, RULE)
    for other, is_told in ((-0.75, True), (-0.74, False), (-1, False)):  # an eighth of 2 is 0.25
        for pair in ((whole, scaling_of(-1, other, RULE)), (scaling_of(-1, other, RULE), whole)):
            found = mismatch(*pair, ("a", "b"))
            assert (found is not None) is is_told
            assert found is None or not found.is_certain


def test_labels_that_are_ids_are_told(tmp_path, caplog):
    y = np.array([900_000, 900_001, 900_002, 900_000])
    load_shard(write_npz(tmp_path / "a.npz", x=numbers(-1, 1), y=y))
    assert (
        "labels from 900000 to 900002 are of 3 classes only, and the model gets 90" in caplog.text
    )
    caplog.clear()
    load_shard(write_npz(tmp_path / "b.npz", x=numbers(-1, 1), y=Y, num_classes=1000))
    assert not caplog.records


@pytest.mark.parametrize(
    ("names", "shown"),
    [(("X", "Y"), "['X', 'Y']"), (("images", "labels"), "['images', 'labels']"), ((), "[]")],
)
def test_the_arrays_of_a_file_are_named(tmp_path, names, shown):
    path = write_npz(tmp_path / "a.npz", **dict.fromkeys(names, Y))
    step = "save them under these names: np.savez(PATH, x=..., y=...)"
    fails(lambda: load(path), f"a.npz: got arrays {shown}, expected arrays x and y; {step}")


def test_arrays_that_are_not_read_are_told(tmp_path, caplog):
    arrays = {"n_classes": 5, "Layout": "images"} | {f"\n{number}": 0 for number in range(8)}
    load_shard(write_npz(tmp_path / "a.npz", x=numbers(-1, 1), y=Y, **arrays))
    (told,) = caplog.records
    assert r"arrays ['\n0', '\n1'," in told.message
    assert "and 2 more are not read; known: x, y, num_classes, subject" in told.message
    caplog.clear()
    load_shard(write_npz(tmp_path / "b.npz", x=numbers(-1, 1), y=Y, classnames=["a", "b"]))
    assert "arrays ['classnames'] are not read" in caplog.text


@pytest.mark.parametrize("names", [{"a", "b"}, {"a": 0, "b": 1}, 5, None, b"ab", np.array("a")])
def test_names_without_an_order_are_refused(names):
    said = "expected a list of names; give a list, in the order of the labels"
    fails(lambda: checked_names(names, "class_names"), f"of type {type(names).__name__}", said)
    fails(lambda: client((numbers(-1, 1), Y), class_names=names), said)


class Rows(list):
    """A Dataset of dicts, as Hugging Face's."""


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            [numbers(-1, 1), Y],
            "data: got a list of 2, expected a path, (x, y) arrays, or a Dataset",
        ),
        ({"x": Y, "y": Y}, "got dict of ['x', 'y'], expected"),
        (Rows([{"image": Y, "label": 0}] * 3), "data[0]: got a dict of ['image', 'label'], exp"),
        (
            TensorDataset(torch.zeros(3, 4), torch.zeros(3)),
            "data[0]: got a label of type Tensor of torch.float32, expected an integer, or one of "
            "class_names; give labels.long()",
        ),
    ],
    ids=["list", "dict", "rows", "labels"],
)
def test_what_a_program_gives_is_named(data, said):
    fails(lambda: client(data).run(), said)


def test_an_open_npz_is_no_dataset(tmp_path):
    with np.load(write_npz(tmp_path / "a.npz", x=numbers(-1, 1), y=Y)) as opened:
        fails(lambda: checked_source(opened), "got NpzFile of ['x', 'y']", 'give the tuple (data["')
