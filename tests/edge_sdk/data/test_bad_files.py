"""Data that cannot be read or used: every error is one line with the file and what to do."""

from __future__ import annotations

import gzip
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from edge_sdk.data.examples import check_examples
from edge_sdk.data.loading import load, load_shard
from edge_sdk.errors import DataError, LackError
from edge_sdk.helpers.imports import install
from tests.support.data_files import (
    FLOATS,
    LABELS,
    PIXELS,
    broken_copies,
    early_unimib,
    examples_of,
    fails,
    later_unimib,
    write_idx,
    write_npz,
)
from tests.support.other_user import closed


@pytest.mark.parametrize("source", ["mnist", "", "no/such/file.npz", "\0", "x" * 5000])
def test_unknown_source_lists_the_known(source):
    fails(lambda: load(source), "no such file", "digits", "train.npz", "fall_data.mat")


def test_file_of_unknown_kind(tmp_path):
    for name in ("data.xls", "fall_labels.mat", "fall"):
        (tmp_path / name).write_text("1,2")
        fails(lambda name=name: load(str(tmp_path / name)), name, "unknown kind", "digits")
    fails(lambda: load(str(tmp_path)), str(tmp_path), "without data files", "train.npz")
    (tmp_path / "prices.csv").write_text("1,2")
    fails(
        lambda: load(str(tmp_path)), "without data files", f"name the file, {tmp_path}/prices.csv"
    )


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    extra = install("data")
    fails(lambda: load("digits"), "sklearn.datasets", extra, error=LackError)


def corrupt_idx(tmp_path: Path, change: Callable[[bytes], bytes], ending: str = "") -> str:
    path = write_idx(tmp_path, "train", PIXELS, LABELS, ending)
    path.write_bytes(change(path.read_bytes()))
    return str(path)


@pytest.mark.parametrize(
    ("change", "ending", "fragment"),
    [
        (lambda raw: raw[:-1], "", "5 bytes, expected 6, as its header says"),
        (lambda raw: raw + b"\0", "", "more than 6 bytes, expected 6, as its header says"),
        (lambda raw: raw[:10], "", "10 bytes"),
        (lambda raw: b"", "", "0 bytes"),
        (lambda raw: b"\0\0\x08\x01" + raw[4:], "", "00000801, expected 00000803"),
        (lambda raw: raw[:4] + b"\xff" * 12, "", "16 bytes"),
        (lambda raw: raw[:4] + b"\0\0\0\0" + b"\xff" * 8, "", "empty"),
        (gzip.compress, "", "1f8b0800, expected 00000803 (IDX, gzip if named .gz)"),
        (gzip.decompress, ".gz", "BadGzipFile"),
        (lambda raw: raw[:-9], ".gz", "EOFError"),
        (lambda raw: raw[:20] + b"\xff\xff" + raw[22:], ".gz", "train-images-idx3-ubyte.gz"),
    ],
)
def test_corrupt_idx(tmp_path, change, ending, fragment):
    path = corrupt_idx(tmp_path, change, ending)
    fails(lambda: load(path), path, fragment)
    fails(lambda: load(str(tmp_path)), fragment)


def test_idx_labels_missing_or_of_other_count(tmp_path):
    path = write_idx(tmp_path, "train", PIXELS, LABELS[:2])
    fails(lambda: load(str(path)), "(2,)", "(3,)", "train-labels-idx1-ubyte")
    path.with_name("train-labels-idx1-ubyte").unlink()
    fails(lambda: load(str(path)), "no labels", "train-labels-idx1-ubyte.gz")


BAD_NPZ = {
    "no x": ({"y": LABELS}, "arrays ['y']"),
    "no y": ({"x": PIXELS}, "arrays ['x']"),
    "object x": ({"x": np.array([None, {}, ""]), "y": LABELS}, "bad.npz, x: got Python objects"),
    "text x": ({"x": np.array(["a", "b", "c"]), "y": LABELS}, "dtype <U1"),
    "int x": ({"x": PIXELS.astype(int), "y": LABELS}, "x of dtype int64, expected uint8 or float"),
    "flat x": ({"x": np.zeros(3), "y": LABELS}, "x of shape (3,)"),
    "scalar x": ({"x": 1.0, "y": LABELS}, "x of shape ()"),
    "5-d x": ({"x": np.zeros((3, 1, 1, 1, 1), np.uint8), "y": LABELS}, "(3, 1, 1, 1, 1)"),
    "float y": ({"x": PIXELS, "y": [0.5, 1, 2]}, "y of dtype float64, expected integers"),
    "bool y": ({"x": PIXELS, "y": LABELS > 1}, "y of dtype bool"),
    "one-hot y": ({"x": PIXELS, "y": np.eye(3, dtype=int)}, "y of shape (3, 3)"),
    "negative y": ({"x": PIXELS, "y": [0, -1, 2]}, "labels from -1 to 2, expected 0 to 2"),
    "huge y": ({"x": PIXELS, "y": [0, 1, 2**63 - 1]}, "labels up to 9223372036854775807"),
    "unsigned y": (
        {"x": PIXELS, "y": np.array([0, 1, 2**64 - 1], np.uint64)},
        "labels up to 18446744073709551615",
    ),
    "short y": ({"x": PIXELS, "y": LABELS[:2]}, "y of shape (2,), int64, expected (3,)"),
    "high y": ({"x": PIXELS, "y": LABELS, "num_classes": 2}, "labels from 0 to 2, expected 0 to 1"),
    "no classes": ({"x": PIXELS, "y": LABELS, "num_classes": 0}, "0 classes"),
    "two counts": ({"x": PIXELS, "y": LABELS, "num_classes": [3, 3]}, "num_classes of shape (2,)"),
    "float count": ({"x": PIXELS, "y": LABELS, "num_classes": 3.0}, "num_classes of dtype"),
    "text subject": ({"x": PIXELS, "y": LABELS, "subject": list("abc")}, "subject of dtype <U1"),
    "short subject": ({"x": PIXELS, "y": LABELS, "subject": [1]}, "subject of shape (1,)"),
    "nan": ({"x": [[[0.0]], [[np.nan]], [[0]]], "y": LABELS}, "in 1 examples, first at 1"),
    "inf": ({"x": FLOATS - np.inf, "y": LABELS}, "in 3 examples, first at 0"),
    "beyond float32": ({"x": FLOATS + np.float64(1e39), "y": LABELS}, "NaN or infinite"),
    "three scalings": ({"x": FLOATS, "y": LABELS, "scaling": [1.0] * 3}, "scaling (3,) of float64"),
    "nan scaling": ({"x": FLOATS, "y": LABELS, "scaling": [np.nan, 0]}, "two finite numbers"),
    "scaling by 0": ({"x": FLOATS, "y": LABELS, "scaling": [0.0, 1.0]}, "a divisor above 0"),
    "empty": ({"x": PIXELS[:0], "y": LABELS[:0]}, "empty data"),
    "no pixels": ({"x": np.zeros((3, 1, 0)), "y": LABELS}, "empty data"),
}


@pytest.mark.parametrize(("arrays", "fragment"), BAD_NPZ.values(), ids=BAD_NPZ)
def test_bad_npz(tmp_path, arrays, fragment):
    path = write_npz(tmp_path / "bad.npz", **arrays)
    fails(lambda: load(path), path, fragment)


def test_npz_that_is_no_npz(tmp_path):
    path = tmp_path / "bad.npz"
    fails(lambda: load(str(path)), "no such file")
    for content in (b"", b"PK\x03\x04 cut", b"some text", b"\x80\x04N."):
        path.write_bytes(content)
        said = fails(lambda: load(str(path)), str(path), "expected an .npz file")
        assert "pickle" not in said, "numpy's advice"
    with path.open("wb") as file:
        np.save(file, FLOATS)
    fails(lambda: load(str(path)), "single .npy array")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"raw")
        archive.writestr("y", b"raw")
    fails(lambda: load(str(path)), "expected an .npz file with numeric arrays x and y")


def test_a_file_that_may_not_be_read_is_not_said_to_be_broken(tmp_path):
    path = Path(write_npz(tmp_path / "mine.npz", x=PIXELS, y=LABELS))
    with closed(path):
        said = fails(lambda: load(str(path)), str(path), "Permission denied", "may not read it")
    assert "copy" not in said


@pytest.mark.parametrize("write", [early_unimib, later_unimib, "npz", "compressed npz", "idx"])
def test_corrupt_bytes_raise_nothing_but_data_errors(tmp_path, write):
    if callable(write):
        path = write(tmp_path)
    elif write == "idx":
        path = write_idx(tmp_path, "train", PIXELS, LABELS, ".gz")
    else:
        path = tmp_path / "a.npz"
        (np.savez if write == "npz" else np.savez_compressed)(path, x=PIXELS, y=LABELS)
    messages = []
    for raw in broken_copies(path.read_bytes(), 150):
        path.write_bytes(raw)
        try:
            load_shard(str(path))  # a changed pixel is not noticed, and need not be
        except DataError as error:
            messages.append(str(error))
    assert len(messages) >= 150  # all that were cut short, at least
    assert not any("\n" in message for message in messages)


def write_mat(folder: Path, data, labels, name: str = "fall_data") -> str:
    savemat(folder / "fall_data.mat", {name: data})
    savemat(folder / "fall_labels.mat", {"fall_labels": labels})
    return str(folder / "fall_data.mat")


ONES = np.ones((6, 4))
BAD_MAT = {
    "variable": ((ONES, np.ones((6, 2)), "other"), "['other']"),
    "three axes": ((np.ones((2, 3, 4)), np.ones((2, 3))), "(2, 3, 4)"),
    "text": (("words", np.ones((2, 3))), "of shape (1, 5), class 4"),
    "complex": ((np.ones((2, 3)) * 1j, np.ones((2, 3))), "flags 8"),
    "cell": ((np.array([[{}, "a"]], dtype=object), np.ones((2, 3))), "class 1"),
    "rows": ((ONES, np.ones((5, 2))), "(6, 4) with labels (5, 2)"),
    "not by three": ((ONES[:5], np.ones((5, 2))), "(5, 4) with labels (5, 2)"),
    "window not by three": ((ONES, np.ones((6, 3))), "(6, 4) with labels (6, 3)"),
    "one label column": ((ONES, np.ones((6, 1))), "(6, 4) with labels (6, 1)"),
    "empty": ((np.zeros((0, 51)), np.zeros((0, 2))), "with labels"),
    "no window": ((np.zeros((6, 0)), np.ones((6, 2))), "with labels"),
    "mixed triple": ((ONES, [[1, 1], [1, 1], [2, 1]] * 2), "differ within a sample"),
    "fractional": ((ONES, np.full((6, 2), 1.5)), "fractional"),
    "nan label": ((ONES, np.full((6, 2), np.nan)), "fractional"),
    "class 0": ((ONES, np.zeros((6, 2))), "labels from -1 to -1, expected 0 to 7"),
    "class 9": ((ONES, np.full((6, 2), 9)), "labels from 8 to 8, expected 0 to 7"),
    "nan": ((ONES * np.nan, np.ones((6, 2))), "NaN or infinite"),
}


@pytest.mark.parametrize(("content", "fragment"), BAD_MAT.values(), ids=BAD_MAT)
def test_bad_mat(tmp_path, content, fragment):
    path = write_mat(tmp_path, *content)
    fails(lambda: load(path), path, fragment)


def test_mat_missing_labels_wrong_format_or_ambiguous(tmp_path):
    path = early_unimib(tmp_path)
    (tmp_path / "acc_data.mat").touch()
    fails(lambda: load(str(tmp_path)), "fall_data.mat, acc_data.mat", "expected one")
    (tmp_path / "fall_labels.mat").unlink()
    fails(lambda: load(str(path)), "fall_labels.mat", "FileNotFoundError")
    for content in (b"", b"text" * 100, b"MATLAB 5.0 MAT-file".ljust(124) + b"\x01\x00MI"):
        path.write_bytes(content)
        fails(lambda: load(str(path)), str(path), "version bytes", "MATLAB 5 file")
    for content in (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", b"\x89HDF\r\n\x1a\n" * 20):
        path.write_bytes(content)
        said = "a MATLAB 7.3 file, which is HDF5", "in MATLAB save it with -v7"
        fails(lambda: load(str(path)), str(path), *said)


def test_check_examples():
    good = examples_of([0, 2, 2])
    assert check_examples(good, "here") is good
    assert check_examples(examples_of([1, 1]), "single class").label_counts().tolist() == [0, 2, 0]
    for bad, fragment in [
        (replace(good, x=good.x.astype(np.float64)), "float64"),
        (replace(good, y=good.y.astype(np.int32)), "int32"),
        (replace(good, subject=np.array([1.0, 2, 3])), "subject of shape (3,), float64"),
        (replace(good, num_classes=2), "labels from 0 to 2"),
        (replace(good, num_classes=10**6 + 1), "1000001 classes"),
    ]:
        fails(lambda bad=bad: check_examples(bad, "here"), "here: got", fragment, "expected", ";")


def test_messages_have_all_five_parts(tmp_path):
    path = write_npz(tmp_path / "bad.npz", x=PIXELS, y=LABELS[:2])
    with pytest.raises(DataError, match=r"bad\.npz: got y .*, expected \(3,\) .*; \w+") as caught:
        load(path)
    assert re.search(r"one for each example in x; correct the data$", str(caught.value))
