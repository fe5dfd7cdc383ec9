"""SVHN, STL-10, CIFAR and UniMiB's later release, from small files in the true formats."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from scipy.io import savemat

from edge_sdk.data.loading import load, load_dataset, load_shard
from edge_sdk.data.readers.matlab import read_mat
from tests.support.data_files import fails
from tests.support.published import (
    LABELS,
    cifar_pickle,
    pixels,
    records,
    unscaled,
    write_cifar_10,
    write_cifar_10_python,
    write_cifar_100,
    write_cifar_100_python,
    write_stl,
    write_svhn,
)

# SVHN


@pytest.mark.parametrize("compressed", [True, False])
def test_svhn(tmp_path, compressed):
    write_svhn(tmp_path / "train_32x32.mat", compressed=compressed)
    write_svhn(tmp_path / "test_32x32.mat", 2, shift=9, compressed=compressed)
    (tmp_path / "extra_32x32.mat").write_bytes(b"not read unless named")
    name, train, test = load(str(tmp_path))
    assert (name, train.num_classes, train.input_shape) == ("svhn", 10, (3, 32, 32))
    # image 2, blue, row 5, column 11: 200 + 100 + 10 + 77 = 387, 387 - 256 = 131
    assert train.x[2, 2, 5, 11] == pytest.approx(131 / 127.5 - 1, abs=1e-6)
    np.testing.assert_array_equal(unscaled(train.x), pixels(4, 32))
    np.testing.assert_array_equal(unscaled(test.x), pixels(2, 32, 9))
    assert train.y.tolist() == [3, 0, 1, 9]  # label 10 is the digit 0
    assert test.y.tolist() == [3, 0]


def test_svhn_single_files_and_train_without_test(tmp_path):
    write_svhn(tmp_path / "train_32x32.mat")
    assert load(str(tmp_path))[2] is None
    path = write_svhn(tmp_path / "extra_32x32.mat", 3, shift=1)
    name, extra, test = load(str(path))
    assert (name, test, extra.y.tolist()) == ("svhn", None, [3, 0, 1])
    np.testing.assert_array_equal(unscaled(extra.x), pixels(3, 32, 1))


def test_svhn_labels_may_be_doubles(tmp_path):
    path = write_svhn(tmp_path / "train_32x32.mat", y=LABELS[:, None].astype(np.float64))
    assert load_shard(str(path)).y.tolist() == [3, 0, 1, 9]


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"y": None}, "variables ['X'] without ['y']"),
        ({"X": None}, "without ['X']"),
        ({"X": pixels(4, 32)}, "X (4, 3, 32, 32) of uint8"),
        ({"X": np.zeros((32, 32, 3, 4))}, "X (32, 32, 3, 4) of float64"),
        ({"X": np.zeros((32, 32, 3), np.uint8)}, "X (32, 32, 3) of uint8"),
        ({"y": LABELS[:3, None]}, "with y (3, 1)"),
        ({"y": LABELS[None]}, "with y (1, 4)"),
        ({"y": LABELS[:, None] - 1}, "labels from 0 to 9, expected 1 to 10"),
        ({"y": LABELS[:, None] + 1}, "labels from 2 to 11"),
        ({"y": LABELS[:, None] / 2}, "fractional"),
        ({"X": np.zeros((32, 32, 3, 0), np.uint8), "y": np.zeros((0, 1))}, "expected"),
    ],
    ids=str,
)
def test_bad_svhn(tmp_path, changes, fragment):
    path = str(write_svhn(tmp_path / "train_32x32.mat", **changes))
    fails(lambda: load(path), path, fragment, "expected", ";")


def test_mat_arrays_of_any_number_of_axes(tmp_path):
    a, b = np.arange(24.0).reshape(2, 3, 4), np.arange(120, dtype=np.int16).reshape(2, 3, 4, 5)
    for compressed in (True, False):
        savemat(tmp_path / "m.mat", {"a": a, "b": b, "c": [[7]]}, do_compression=compressed)
        got = read_mat(tmp_path / "m.mat", "b", "a")
        np.testing.assert_array_equal(got[0], b)
        np.testing.assert_array_equal(got[1], a)
        assert got[0].dtype == np.int16


# UniMiB SHAR, later release


def test_unimib_later_release_in_its_true_size(tmp_path):
    data = np.random.default_rng(0).uniform(-19, 19, (4192, 453))
    number = np.arange(4192)
    labels = np.stack([number % 8 + 1, number % 30 + 1, number % 6 + 1], axis=1)
    savemat(tmp_path / "fall_data.mat", {"fall_data": data})
    savemat(tmp_path / "fall_labels.mat", {"fall_labels": labels.astype(np.float64)})
    _, falls, test = load(str(tmp_path))
    assert (falls.x.shape, falls.num_classes, test) == ((4192, 3, 151), 8, None)
    # the y axis is columns 151..301 of a row; its value 5 is column 156
    assert falls.x[4000, 1, 5] == pytest.approx(data[4000, 156] / 19.6133)
    assert falls.x[7, 2, 150] == pytest.approx(data[7, 452] / 19.6133)
    assert (falls.y == number % 8).all()
    assert (falls.subject == number % 30 + 1).all()
    parts = load_dataset(str(tmp_path), seed=0)
    assert (len(parts.train), len(parts.test)) == (3354, 838)  # 20 % of 4192 is 838.4


# STL-10


def test_stl_10(tmp_path):
    write_stl(tmp_path, "train")
    write_stl(tmp_path, "test", 3, shift=2)
    name, train, test = load(str(tmp_path))
    assert (name, train.num_classes, train.input_shape) == ("stl-10", 10, (3, 96, 96))
    # image 1, green, row 90, column 3 is byte 27648 + 9216 + 3 * 96 + 90 of the file:
    # 100 + 50 + 180 + 21 = 351, 351 - 256 = 95
    assert (tmp_path / "train_X.bin").read_bytes()[27648 + 9216 + 3 * 96 + 90] == 95
    assert train.x[1, 1, 90, 3] == pytest.approx(95 / 127.5 - 1, abs=1e-6)
    np.testing.assert_array_equal(unscaled(train.x), pixels(4, 96))
    np.testing.assert_array_equal(unscaled(test.x), pixels(3, 96, 2))
    assert train.y.tolist() == [2, 9, 0, 8]
    assert len(load_shard(str(tmp_path / "test_X.bin"))) == 3


def test_bad_stl_10(tmp_path):
    path = write_stl(tmp_path, "train")
    whole, labels = path.read_bytes(), tmp_path / "train_y.bin"
    for content in (whole[:-1], whole + b"\0", b""):
        path.write_bytes(content)
        got = f"got {len(content)} bytes, expected images of 27648 bytes each"
        fails(lambda: load(str(tmp_path)), str(path), got, "copy the file again")
    path.write_bytes(whole)
    labels.write_bytes(LABELS[:3].tobytes())
    fails(lambda: load(str(tmp_path)), str(labels), "3 labels, expected 4")
    labels.write_bytes(bytes([0, 1, 2, 11]))
    fails(lambda: load(str(tmp_path)), str(labels), "labels from 0 to 11, expected 1 to 10")
    labels.write_bytes(b"")
    fails(lambda: load(str(tmp_path)), str(labels), "got 0 bytes")
    labels.unlink()
    fails(lambda: load(str(tmp_path)), str(labels), "FileNotFoundError")


# CIFAR


@pytest.mark.parametrize("write", [write_cifar_10, write_cifar_10_python])
def test_cifar_10(tmp_path, write):
    first = write(tmp_path)
    name, train, test = load(str(tmp_path))
    assert (name, train.num_classes, train.input_shape) == ("cifar-10", 10, (3, 32, 32))
    want = np.concatenate([pixels(1, 32, number) for number in range(1, 6)])
    np.testing.assert_array_equal(unscaled(train.x), want)
    # batch 3, blue, row 30, column 1: 0 + 100 + 60 + 7 + 3 = 170
    assert train.x[2, 2, 30, 1] == pytest.approx(170 / 127.5 - 1, abs=1e-6)
    assert train.y.tolist() == [5, 6, 7, 8, 9]
    np.testing.assert_array_equal(unscaled(test.x), pixels(2, 32))
    assert test.y.tolist() == [0, 9]
    name, shard, test = load(str(first))
    assert (name, shard.y.tolist(), test) == ("cifar-10", [5], None)
    first.unlink()
    fails(lambda: load(str(tmp_path)), str(first), "FileNotFoundError")


@pytest.mark.parametrize("write", [write_cifar_100, write_cifar_100_python])
def test_cifar_100(tmp_path, write):
    path = write(tmp_path)
    name, train, test = load(str(tmp_path))
    assert (name, train.num_classes, train.input_shape) == ("cifar-100", 100, (3, 32, 32))
    np.testing.assert_array_equal(unscaled(train.x), pixels(3, 32))
    # image 2, green, row 4, column 20: 200 + 50 + 8 + 140 = 398, 398 - 256 = 142
    assert train.x[2, 1, 4, 20] == pytest.approx(142 / 127.5 - 1, abs=1e-6)
    assert train.y.tolist() == [99, 4, 42]  # the class, not the superclass
    np.testing.assert_array_equal(unscaled(test.x), pixels(1, 32, 5))
    assert test.y.tolist() == [17]
    assert load(str(path))[1].y.tolist() == [99, 4, 42]


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("data_batch_1.bin", b"", "got 0 bytes"),
        ("data_batch_1.bin", records([[1]])[:-1], "3072 bytes, expected CIFAR-10 records of 3073"),
        ("data_batch_1.bin", records([[1, 1]]), "got 3074 bytes"),
        ("data_batch_1.bin", records([[10]]), "labels from 10 to 10, expected 0 to 9"),
        ("train.bin", records([[1]]), "3073 bytes, expected CIFAR-100 records of 3074"),
        ("train.bin", records([[20, 1]]), "superclasses up to 20, expected 0 to 19"),
        ("train.bin", records([[19, 100]]), "labels from 100 to 100, expected 0 to 99"),
    ],
)
def test_bad_cifar_binary(tmp_path, name, content, fragment):
    path = tmp_path / name
    path.write_bytes(content)
    fails(lambda: load(str(path)), str(path), fragment, ";")


# All of them


def test_two_data_sets_in_one_folder(tmp_path):
    write_stl(tmp_path, "train")
    write_cifar_100(tmp_path)
    got = "got train_X.bin, train.bin, expected one of them; give the path"
    fails(lambda: load(str(tmp_path)), str(tmp_path), got)


@pytest.mark.parametrize("write", [write_cifar_10, write_cifar_10_python])
def test_memory_stays_within_two_copies_and_the_result(tmp_path, write):
    """1,000 records more in the first batch: 3.1 MB raw, 12.3 MB as float32."""
    path = write(tmp_path)
    many = [[number % 10] for number in range(1000)]
    is_binary = path.suffix == ".bin"
    images, labels = pixels(1000, 32), [label for (label,) in many]
    path.write_bytes(records(many) if is_binary else cifar_pickle(images, labels))
    load_shard(str(path))
    tracemalloc.start()
    try:
        load_shard(str(path))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    raw = 1000 * 3072
    # the check of finite values holds one byte per number beside the result
    assert peak < 2.2 * raw + 4 * raw + raw * 0.3
