"""Readers, checks, splits and partitions; files are written here in the true formats."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from edge_sdk.data import load, load_dataset, load_shard, save_shard
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.examples import Examples, check_examples
from edge_sdk.partition import (
    partition_by_subject,
    partition_dirichlet,
    partition_iid,
    stratified_split,
)

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
# Three images of 1 x 2 pixels: 0 -> -1, 255 -> 1, 51 -> 51 / 127.5 - 1 = -0.6
PIXELS = np.array([[[0, 255]], [[51, 0]], [[255, 255]]], dtype=np.uint8)
SCALED = np.array([[[[-1, 1]]], [[[-0.6, -1]]], [[[1, 1]]]], dtype=np.float32)
LABELS = np.array([1, 0, 2], dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim])
    return header + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.tobytes()


def write_idx(folder: Path, part: str, images: np.ndarray, labels: np.ndarray, ending="") -> Path:
    folder.mkdir(exist_ok=True)
    packed = gzip.compress if ending else bytes
    path = folder / f"{part}-images-idx3-ubyte{ending}"
    path.write_bytes(packed(idx_bytes(images)))
    (folder / f"{part}-labels-idx1-ubyte{ending}").write_bytes(packed(idx_bytes(labels)))
    return path


def write_npz(path: Path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def early_unimib(folder: Path) -> Path:
    """Two samples of window 4; rows are the axes in turn, values in quarters of 2 g."""
    data = 19.6133 / 4 * np.arange(-12, 12).reshape(6, 4)
    labels = np.repeat(np.array([[3, 30], [8, 1]], dtype=np.uint8), 3, axis=0)
    savemat(folder / "fall_data.mat", {"fall_data": data})
    savemat(folder / "fall_labels.mat", {"fall_labels": labels})
    return folder / "fall_data.mat"


def later_unimib(folder: Path) -> Path:
    """The same two samples in the later layout."""
    data = 19.6133 / 4 * np.arange(-12, 12).reshape(2, 12)
    labels = np.array([[3, 30, 1], [8, 1, 2]], dtype=np.float64)
    savemat(folder / "fall_data.mat", {"fall_data": data})
    savemat(folder / "fall_labels.mat", {"fall_labels": labels})
    return folder / "fall_data.mat"


def examples_of(y, shape=(1, 2, 2), num_classes=3, subject=None) -> Examples:
    y = np.array(y, dtype=np.int64)
    x = np.random.default_rng(0).normal(size=(len(y), *shape)).astype(np.float32)
    return Examples(x, y, num_classes, subject)


def assert_same(got: Examples, want: Examples) -> None:
    assert got.x.dtype == np.float32
    assert got.y.dtype == np.int64
    np.testing.assert_array_equal(got.x.view(np.uint32), want.x.view(np.uint32))
    np.testing.assert_array_equal(got.y, want.y)
    assert got.num_classes == want.num_classes
    assert (got.subject is None) == (want.subject is None)
    if want.subject is not None:
        np.testing.assert_array_equal(got.subject, want.subject)


def fails(call: Callable[[], object], *fragments: str, error: type[Exception] = DataError) -> None:
    """The call raises exactly `error`, in one line that holds every fragment."""
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


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


def test_npz_uint8_images_are_scaled_and_get_a_channel(tmp_path):
    examples = load_shard(write_npz(tmp_path / "a.npz", x=PIXELS, y=LABELS))
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
        fails(lambda size=size: load_dataset(path, 3, size), "1 to 80", error=ConfigError)


def test_dataset_keeps_an_official_test_part(tmp_path):
    write_npz(tmp_path / "train.npz", x=PIXELS, y=LABELS)
    write_npz(tmp_path / "test.npz", x=PIXELS[:1], y=LABELS[:1])
    data = load_dataset(str(tmp_path), seed=0)
    assert (len(data.train), len(data.test)) == (3, 1)


def test_train_and_test_must_have_one_shape(tmp_path):
    write_npz(tmp_path / "train.npz", x=PIXELS, y=LABELS)
    write_npz(tmp_path / "test.npz", x=np.zeros((1, 1, 3), dtype=np.uint8), y=LABELS[:1])
    fails(lambda: load(str(tmp_path)), "(1, 1, 3)", "(1, 1, 2)")


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


# Splits and partitions


def test_split_takes_the_fraction_of_each_class():
    y = np.array([0] * 10 + [1] * 20)
    train, test = stratified_split(y, 0.3, seed=1)
    assert np.bincount(y[test]).tolist() == [3, 6]
    assert sorted([*train, *test]) == list(range(30))


def test_split_gives_the_rest_to_the_largest_remainder():
    # size round(0.3 * 15) = 4; quotas 7 * 4/15 = 1.87, 5 * 4/15 = 1.33, 3 * 4/15 = 0.8;
    # floors 1 1 0; two more for remainders 0.87 and 0.8
    y = np.repeat([0, 1, 2], [7, 5, 3])
    assert np.bincount(y[stratified_split(y, 0.3, seed=0)[1]]).tolist() == [2, 1, 1]


def test_split_keeps_one_of_each_class_in_train():
    y = np.array([0, 1, 1])
    train, test = stratified_split(y, 0.9, seed=0)
    assert sorted(y[train]) == [0, 1]
    assert y[test].tolist() == [1]
    fails(lambda: stratified_split(np.array([0, 1]), 0.5, seed=0), "2 examples of 2 classes")
    for fraction in (0, 1, -0.1, float("nan")):
        fails(lambda f=fraction: stratified_split(y, f, 0), "test fraction", error=ConfigError)


def skewed_labels(n: int = 3000) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 10, n)


PARTITIONS = {
    "iid": lambda seed: partition_iid(3000, 7, seed),
    "dirichlet 0.05": lambda seed: partition_dirichlet(skewed_labels(), 50, 0.05, seed),
    "dirichlet 1": lambda seed: partition_dirichlet(skewed_labels(), 7, 1.0, seed),
    "dirichlet 1e308": lambda seed: partition_dirichlet(skewed_labels(), 7, 1e308, seed),
    "dirichlet 1e-300": lambda seed: partition_dirichlet(skewed_labels(), 300, 1e-300, seed),
    "subject": lambda seed: partition_by_subject(skewed_labels(), 7, seed),
}


@pytest.mark.parametrize("partition", PARTITIONS.values(), ids=PARTITIONS)
def test_partitions_are_disjoint_cover_all_and_follow_the_seed(partition):
    parts = partition(11)
    assert sorted(np.concatenate(parts)) == list(range(3000))
    assert min(len(part) for part in parts) >= 10
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in parts)
    again, other = partition(11), partition(12)
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(parts, other, strict=True))


def test_iid_parts_are_equal_to_one():
    assert [len(part) for part in partition_iid(11, 4, seed=0)] == [3, 3, 3, 2]
    assert not np.array_equal(partition_iid(100, 2, seed=0)[0], np.arange(50))


def test_dirichlet_with_large_alpha_is_nearly_even():
    y = np.repeat(np.arange(10), 1000)
    counts = [np.bincount(y[part]) for part in partition_dirichlet(y, 10, 1e4, seed=0)]
    # 100 of each class for each client; a share's standard deviation is
    # sqrt(0.1 * 0.9 / (10 * 1e4 + 1)) = 0.00095, so about one example
    assert np.abs(np.array(counts) - 100).max() <= 6


def test_dirichlet_with_small_alpha_ends_and_is_skewed():
    y = skewed_labels()
    parts = partition_dirichlet(y, 50, 0.05, seed=0)
    sizes = np.array([len(part) for part in parts])
    assert sizes.min() == 10  # reached by the repair
    assert sizes.max() > 2 * 60  # 3000 / 50 = 60 each if even
    share_of_top_class = [np.bincount(y[part]).max() / len(part) for part in parts]
    assert np.median(share_of_top_class) > 0.4  # 0.1 to 0.2 if even


def test_dirichlet_repair_moves_only_what_is_missing():
    # alpha 1e-9 gives all 25 of the one class to one client, in every draw
    parts = partition_dirichlet(np.zeros(25, dtype=np.int64), 2, 1e-9, seed=0, min_examples=10)
    assert sorted(len(part) for part in parts) == [10, 15]
    parts = partition_dirichlet(np.zeros(20, dtype=np.int64), 2, 1e-9, seed=0, min_examples=10)
    assert [len(part) for part in parts] == [10, 10]


def test_dirichlet_classes_are_shared_out_independently():
    y = np.repeat([0, 1], 500)
    parts = partition_dirichlet(y, 2, 0.3, seed=2, min_examples=1)
    counts = np.array([np.bincount(y[part], minlength=2) for part in parts])
    assert counts.sum(axis=0).tolist() == [500, 500]
    assert counts[0, 0] != counts[0, 1]


def test_subjects_stay_whole():
    subject = np.repeat([3, 9, 4, 7, 1], [2, 5, 1, 4, 3])
    parts = partition_by_subject(subject, 2, seed=0)
    held = [set(subject[part].tolist()) for part in parts]
    assert not held[0] & held[1]
    assert held[0] | held[1] == {1, 3, 4, 7, 9}
    assert [len(subjects) for subjects in held] == [3, 2]
    alone = partition_by_subject(subject, 5, seed=0)
    assert sorted(len(part) for part in alone) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("call", "fragment"),
    [
        (lambda: partition_dirichlet(np.zeros(99, int), 10, 1.0, 0), "at most 99"),
        (lambda: partition_dirichlet(np.zeros(99, int), 0, 1.0, 0), "0 clients"),
        (lambda: partition_dirichlet(np.zeros(99, int), 2, 1.0, 0, min_examples=0), "at least 0"),
        (lambda: partition_dirichlet(np.zeros(99, int), 2, 0.0, 0), "alpha is 0.0"),
        (lambda: partition_dirichlet(np.zeros(99, int), 2, -1.0, 0), "alpha is -1.0"),
        (lambda: partition_dirichlet(np.zeros(99, int), 2, float("inf"), 0), "alpha is inf"),
        (lambda: partition_dirichlet(np.zeros(99, int), 2, float("nan"), 0), "alpha is nan"),
        (lambda: partition_iid(3, 4, 0), "4 clients"),
        (lambda: partition_iid(3, 0, 0), "0 clients"),
        (lambda: partition_iid(3, 1, -1), "seed is -1"),
        (lambda: partition_by_subject(np.array([1, 1, 2]), 3, 0), "1 to 2"),
        (lambda: partition_by_subject(None, 3, 0), "no subjects"),
    ],
)
def test_impossible_partitions(call, fragment):
    fails(call, fragment, error=ConfigError)


# Bad input


@pytest.mark.parametrize("source", ["mnist", "", "no/such/file.npz", "\0", "x" * 5000])
def test_unknown_source_lists_the_known(source):
    fails(lambda: load(source), "no such file", "digits", "train.npz", "fall_data.mat")


def test_file_of_unknown_kind(tmp_path):
    for name in ("data.csv", "fall_labels.mat", "fall"):
        (tmp_path / name).write_text("1,2")
        fails(lambda name=name: load(str(tmp_path / name)), name, "unknown kind", "digits")
    fails(lambda: load(str(tmp_path)), str(tmp_path), "without data files", "train.npz")


def test_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    extra = 'pip install "edge-sdk[data]"'
    fails(lambda: load("digits"), "sklearn.datasets", extra, error=ConfigError)


def corrupt_idx(tmp_path: Path, change: Callable[[bytes], bytes], ending: str = "") -> str:
    path = write_idx(tmp_path, "train", PIXELS, LABELS, ending)
    path.write_bytes(change(path.read_bytes()))
    return str(path)


@pytest.mark.parametrize(
    ("change", "ending", "fragment"),
    [
        (lambda raw: raw[:-1], "", "21 bytes, expected 22"),
        (lambda raw: raw + b"\0", "", "23 bytes, expected 22"),
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


FLOATS = np.zeros((3, 1, 2), dtype=np.float32)
BAD_NPZ = {
    "no x": ({"y": LABELS}, "arrays ['y']"),
    "no y": ({"x": PIXELS}, "arrays ['x']"),
    "object x": ({"x": np.array([None, {}, ""]), "y": LABELS}, "Object arrays"),
    "text x": ({"x": np.array(["a", "b", "c"]), "y": LABELS}, "dtype <U1"),
    "int x": ({"x": PIXELS.astype(int), "y": LABELS}, "x of dtype int64, expected uint8 or float"),
    "flat x": ({"x": np.zeros((3, 4)), "y": LABELS}, "x of shape (3, 4)"),
    "scalar x": ({"x": 1.0, "y": LABELS}, "x of shape ()"),
    "5-d x": ({"x": np.zeros((3, 1, 1, 1, 1), np.uint8), "y": LABELS}, "(3, 1, 1, 1, 1)"),
    "float y": ({"x": PIXELS, "y": [0.5, 1, 2]}, "y of dtype float64, expected integers"),
    "bool y": ({"x": PIXELS, "y": LABELS > 1}, "y of dtype bool"),
    "one-hot y": ({"x": PIXELS, "y": np.eye(3, dtype=int)}, "y of shape (3, 3)"),
    "negative y": ({"x": PIXELS, "y": [0, -1, 2]}, "labels from -1 to 2, expected 0 to 2"),
    "huge y": ({"x": PIXELS, "y": [0, 1, 2**63 - 1]}, "9223372036854775808 classes"),
    "unsigned y": ({"x": PIXELS, "y": np.array([0, 1, 2**64 - 1], np.uint64)}, "labels from -1"),
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
        fails(lambda: load(str(path)), str(path), ".npz")
    with path.open("wb") as file:
        np.save(file, FLOATS)
    fails(lambda: load(str(path)), "single .npy array")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", b"raw")
        archive.writestr("y", b"raw")
    fails(lambda: load(str(path)), "dtype")


def broken_copies(raw: bytes, count: int) -> list[bytes]:
    """Copies cut short or with four bytes changed, at places drawn from a fixed seed."""
    rng = np.random.default_rng(0)
    copies = []
    for position in rng.integers(0, len(raw) - 4, count):
        copies.append(raw[:position])
        copies.append(raw[:position] + rng.bytes(4) + raw[position + 4 :])
    return copies


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
    for content in (b"", b"text" * 100, b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"):
        path.write_bytes(content)
        fails(lambda: load(str(path)), str(path), "version bytes", "MATLAB 5 file")


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


# The real files


def shared(*parts: str) -> str:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is not on this machine")
    return str(path)


def test_fashion_mnist():
    name, train, test = load(shared("fashion-mnist"))
    assert (name, train.num_classes, train.input_shape) == ("fashion-mnist", 10, (1, 28, 28))
    assert train.label_counts().tolist() == [6000] * 10
    assert test.label_counts().tolist() == [1000] * 10
    # 0.2860 of 255 is 0.2860 * 2 - 1 here; the standard deviation 0.3530 doubles
    assert train.x.mean(dtype=np.float64) == pytest.approx(2 * 0.2860 - 1, abs=1e-4)
    flat = train.x.ravel()
    deviation = np.sqrt(np.vdot(flat, flat) / flat.size - flat.mean(dtype=np.float64) ** 2)
    assert deviation == pytest.approx(2 * 0.3530, abs=2e-4)
    assert (train.x.min(), train.x.max()) == (-1.0, 1.0)


def test_fashion_mnist_single_file_and_subset():
    source = shared("fashion-mnist", "t10k-images-idx3-ubyte.gz")
    data = load_dataset(source, seed=1, examples=500, test_examples=100)
    assert data.name == "fashion-mnist"
    assert data.train.label_counts().tolist() == [50] * 10
    assert data.test.label_counts().tolist() == [10] * 10


def test_unimib_falls():
    name, falls, test = load(shared("unimib-shar"))
    assert (name, test, falls.num_classes) == ("unimib-shar-fall", None, 8)
    assert falls.x.shape == (1699, 3, 51)
    assert falls.label_counts().tolist() == [195, 221, 233, 242, 194, 206, 202, 206]
    per_subject = np.unique(falls.subject, return_counts=True)[1]
    assert (len(per_subject), per_subject.min(), per_subject.max()) == (30, 46, 81)
    assert np.abs(falls.x).max() == pytest.approx(19.581 / 19.6133, abs=1e-3)
    # the window is centred on the peak of the magnitude in 1,572 of the samples
    peak = np.square(falls.x.astype(np.float64)).sum(axis=1).argmax(axis=1)
    assert (peak == 25).sum() == 1572
    converted = load_shard(shared("unimib-shar", "fall.npz"))
    np.testing.assert_array_equal(converted.x / np.float32(19.6133), falls.x)
    np.testing.assert_array_equal(converted.y, falls.y)
    np.testing.assert_array_equal(converted.subject, falls.subject)
    parts = partition_by_subject(falls.subject, 30, seed=0)
    assert sorted(map(len, parts)) == sorted(per_subject)


def test_cifar_100_subset():
    name, train, test = load(shared("cifar-100-subset"))
    assert (name, train.num_classes, train.input_shape) == ("cifar-100-subset", 100, (3, 32, 32))
    assert train.label_counts().tolist() == [200] * 100
    assert test.label_counts().tolist() == [50] * 100
    means = (train.x.mean(axis=(0, 2, 3), dtype=np.float64) + 1) / 2
    assert means == pytest.approx([0.5073, 0.4871, 0.4416], abs=1e-4)
    parts = partition_dirichlet(train.y, 50, 0.1, seed=0)
    assert min(map(len, parts)) >= 10
    assert sum(map(len, parts)) == 20000


def test_messages_have_all_five_parts(tmp_path):
    path = write_npz(tmp_path / "bad.npz", x=PIXELS, y=LABELS[:2])
    with pytest.raises(DataError, match=r"bad\.npz: got y .*, expected \(3,\) .*; \w+") as caught:
        load(path)
    assert re.search(r"one for each example in x; correct the data$", str(caught.value))
