"""Readers, data sets and shards; files are written here in the true formats."""

from __future__ import annotations

import gzip
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.io import savemat

from edge_sdk.data.loading import load, load_dataset, load_shard, save_shard
from edge_sdk.errors import ConfigError, UsageError
from tests.support.data_files import (
    FLOATS,
    LABELS,
    PIXELS,
    SCALED,
    assert_same,
    early_unimib,
    examples_of,
    fails,
    idx_bytes,
    later_unimib,
    write_idx,
    write_npz,
)

# Examples


def test_importing_data_loads_no_heavy_package():
    code = "import sys, edge_sdk.data; print(sorted({'torch','scipy','sklearn'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_examples_take_and_count():
    examples = examples_of([0, 2, 2, 0, 2], num_classes=4, subject=np.array([7, 7, 8, 8, 9]))
    assert len(examples) == 5
    assert examples.input_shape == (1, 2, 2)
    assert examples.label_counts().tolist() == [2, 0, 3, 0]
    taken = examples.take(np.array([4, 0]))
    assert taken.y.tolist() == [2, 0]
    assert taken.subject.tolist() == [9, 7]
    np.testing.assert_array_equal(taken.x, examples.x[[4, 0]])
    assert taken.num_classes == 4


# Sources


def test_digits_are_scaled_to_one():
    name, digits, test = load("digits")
    assert (name, test, len(digits), digits.num_classes) == ("digits", None, 1797, 10)
    assert digits.input_shape == (1, 8, 8)
    assert (digits.x.min(), digits.x.max()) == (-1.0, 1.0)
    # the first row of the first digit is 0 0 5 13 9 1 0 0; 5 / 8 - 1 = -0.375
    assert digits.x[0, 0, 0].tolist() == [-1, -1, -0.375, 0.625, 0.125, -0.875, -1, -1]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_idx_directory(tmp_path, ending):
    folder = tmp_path / "tiny-mnist"
    write_idx(folder, "train", PIXELS, LABELS, ending)
    write_idx(folder, "t10k", PIXELS[:1], np.array([3], dtype=np.uint8), ending)
    name, train, test = load(str(folder))
    assert name == "tiny-mnist"
    np.testing.assert_allclose(train.x, SCALED, atol=1e-7)
    assert train.y.tolist() == [1, 0, 2]
    assert len(test) == 1
    assert (train.num_classes, test.num_classes) == (4, 4)  # the largest label of both parts + 1


def test_single_idx_file_and_mixed_compression(tmp_path):
    path = write_idx(tmp_path / "d", "t10k", PIXELS, LABELS)
    labels = path.with_name("t10k-labels-idx1-ubyte")
    labels.with_name(labels.name + ".gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    name, examples, test = load(str(path))
    assert (name, test, examples.y.tolist()) == ("d", None, [1, 0, 2])
    (path.parent / "train-images.idx3-ubyte").write_bytes(idx_bytes(PIXELS))
    (path.parent / "train-labels.idx1-ubyte").write_bytes(idx_bytes(LABELS))
    name, train, test = load(str(path.parent))
    assert (len(train), len(test)) == (3, 3)


def test_npz_uint8_images_are_scaled_and_get_a_channel_that_layout_names(tmp_path):
    path = write_npz(tmp_path / "a.npz", x=PIXELS, y=LABELS, layout="images")
    examples = load_shard(path)
    np.testing.assert_allclose(examples.x, SCALED, atol=1e-7)
    assert (examples.num_classes, examples.subject) == (3, None)
    colour = np.zeros((3, 3, 4, 5), dtype=np.uint8)
    assert load_shard(write_npz(tmp_path / "b.npz", x=colour, y=LABELS)).input_shape == (3, 4, 5)


def test_npz_floats_stay_as_they_are(tmp_path):
    x = np.linspace(-7, 9, 24).reshape(2, 3, 4)
    path = write_npz(tmp_path / "a.npz", x=x, y=np.array([0, 1]), num_classes=8, subject=[5, 6])
    name, examples, test = load(path)
    assert (name, test, examples.num_classes, examples.input_shape) == ("a", None, 8, (3, 4))
    np.testing.assert_array_equal(examples.x, x.astype(np.float32))
    assert examples.subject.tolist() == [5, 6]


def test_how_integers_were_scaled_is_known_and_survives_a_shard(tmp_path):
    pixels = load_shard(write_npz(tmp_path / "a.npz", x=PIXELS, y=LABELS))
    assert pixels.scaling == (127.5, 1.0)
    save_shard(tmp_path / "b.npz", pixels.take(np.array([0, 2])))
    assert load_shard(str(tmp_path / "b.npz")).scaling == (127.5, 1.0)
    assert load_shard(write_npz(tmp_path / "c.npz", x=FLOATS, y=LABELS)).scaling is None


def test_npz_directory(tmp_path):
    write_npz(tmp_path / "train.npz", x=PIXELS, y=LABELS)
    assert load(str(tmp_path))[2] is None
    write_npz(tmp_path / "test.npz", x=PIXELS[:2], y=np.array([0, 5]))
    name, train, test = load(str(tmp_path))
    assert name == tmp_path.name
    assert (len(train), len(test), train.num_classes, test.num_classes) == (3, 2, 6, 6)


@pytest.mark.parametrize("write", [early_unimib, later_unimib])
def test_both_unimib_layouts_give_the_same_examples(tmp_path, write):
    path = write(tmp_path)
    for source in (path, tmp_path):
        name, examples, test = load(str(source))
        assert (name, test, examples.num_classes) == ("unimib-shar-fall", None, 8)
        want = np.arange(-12, 12).reshape(2, 3, 4) / 4  # in 2 g
        np.testing.assert_allclose(examples.x, want, rtol=1e-6)
        assert examples.x.dtype == np.float32
        assert examples.x.flags.c_contiguous
        assert examples.y.tolist() == [2, 7]  # class 1..8 becomes 0..7
        assert examples.subject.tolist() == [30, 1]


@pytest.mark.parametrize("is_compressed", [False, True])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_mat_of_every_number_type_among_other_variables(tmp_path, dtype, is_compressed):
    data = np.arange(24).reshape(2, 12).astype(dtype)
    before = {"note": "text", "empty": [], "cell": np.array([{"a": 1.0}, "b"], dtype=object)}
    variables = {**before, "acc_data": data, "x": 1}
    savemat(tmp_path / "acc_data.mat", variables, do_compression=is_compressed)
    savemat(tmp_path / "acc_labels.mat", {"acc_labels": np.array([[1, 1, 1], [17, 2, 1]], dtype)})
    examples = load_shard(str(tmp_path / "acc_data.mat"))
    np.testing.assert_allclose(examples.x.ravel(), np.arange(24) / 19.6133, rtol=1e-6)
    assert examples.y.tolist() == [0, 16]
    assert examples.num_classes == 17


def test_unimib_adl_has_nine_classes(tmp_path):
    savemat(tmp_path / "adl_data.mat", {"adl_data": np.ones((2, 453))})
    savemat(tmp_path / "adl_labels.mat", {"adl_labels": [[1, 1, 1], [9, 2, 1]]})
    name, examples, _ = load(str(tmp_path))
    assert (name, examples.num_classes) == ("unimib-shar-adl", 9)
    assert examples.input_shape == (3, 151)


def test_shard_ignores_the_test_part(tmp_path):
    write_npz(tmp_path / "train.npz", x=PIXELS, y=LABELS)
    (tmp_path / "test.npz").write_bytes(b"not read")
    assert len(load_shard(str(tmp_path))) == 3
    fails(lambda: load(str(tmp_path)), "test.npz")


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_npz(tmp_path / "a.npz", x=PIXELS, y=LABELS)
    assert len(load_shard("~/a.npz")) == 3


# Data sets


def test_dataset_draws_a_stratified_test_part(tmp_path):
    y = np.repeat([0, 1, 2], [50, 30, 20])
    path = write_npz(tmp_path / "a.npz", x=np.arange(100.0).reshape(100, 1, 1), y=y)
    data = load_dataset(path, seed=3)
    assert data.train.label_counts().tolist() == [40, 24, 16]
    assert data.test.label_counts().tolist() == [10, 6, 4]  # 20 % of each class
    both = np.concatenate([data.train.x, data.test.x]).ravel()
    assert sorted(both) == list(range(100))
    again, other = load_dataset(path, seed=3), load_dataset(path, seed=4)
    assert_same(again.test, data.test)
    assert not np.array_equal(other.test.x, data.test.x)


def test_dataset_subsets_are_stratified_and_drawn_apart(tmp_path):
    y = np.repeat([0, 1], [60, 40])
    path = write_npz(tmp_path / "a.npz", x=np.arange(100.0).reshape(100, 1, 1), y=y)
    whole = load_dataset(path, seed=3)
    part = load_dataset(path, seed=3, examples=20, test_examples=10)
    assert part.train.label_counts().tolist() == [12, 8]
    assert part.test.label_counts().tolist() == [6, 4]
    assert np.isin(part.test.x, whole.test.x).all()
    assert np.isin(part.train.x, whole.train.x).all()
    assert_same(load_dataset(path, seed=3, test_examples=10).test, part.test)
    for size in (0, -1, 81):
        fails(lambda size=size: load_dataset(path, 3, size), "1 to 80", error=UsageError)


def test_dataset_keeps_an_official_test_part(tmp_path):
    write_npz(tmp_path / "train.npz", x=PIXELS, y=LABELS)
    write_npz(tmp_path / "test.npz", x=PIXELS[:1], y=LABELS[:1])
    data = load_dataset(str(tmp_path), seed=0)
    assert (len(data.train), len(data.test)) == (3, 1)


def test_train_and_test_must_have_one_shape(tmp_path):
    write_npz(tmp_path / "train.npz", x=PIXELS, y=LABELS)
    write_npz(tmp_path / "test.npz", x=np.zeros((1, 1, 3), dtype=np.uint8), y=LABELS[:1])
    fails(lambda: load(str(tmp_path)), "(1, 3)", "(1, 2)")


# Shards


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 51)])
@pytest.mark.parametrize("has_subject", [False, True])
def test_shard_round_trip_is_bit_identical(tmp_path, shape, has_subject):
    subject = np.array([4, 4, 9, 1]) if has_subject else None
    shard = examples_of([1, 1, 0, 1], shape, num_classes=7, subject=subject)
    shard.x[0, 0, 0] = -0.0
    shard.x[1, 0, 0] = 1e-42  # subnormal
    path = tmp_path / "shard.npz"
    save_shard(path, shard)
    assert_same(load_shard(str(path)), shard)
    save_shard(path, load_shard(str(path)))  # replaces
    assert_same(load_shard(str(path)), shard)
    assert [found.name for found in tmp_path.iterdir()] == ["shard.npz"]


def test_shard_that_cannot_be_written_leaves_nothing(tmp_path):
    shard = examples_of([0, 1])
    fails(lambda: save_shard(tmp_path / "a.bin", shard), ".npz", error=ConfigError)
    fails(lambda: save_shard(tmp_path / "no" / "a.npz", shard), "FileNotFoundError", "a.npz")
    (tmp_path / "file").touch()
    fails(lambda: save_shard(tmp_path / "file" / "a.npz", shard), "NotADirectoryError")
    (tmp_path / "a.npz").mkdir()
    fails(lambda: save_shard(tmp_path / "a.npz", shard), "IsADirectoryError")
    bad = replace(shard, y=np.array([0, 3]))
    fails(lambda: save_shard(tmp_path / "b.npz", bad), "labels from 0 to 3")
    assert sorted(found.name for found in tmp_path.iterdir()) == ["a.npz", "file"]
