"""The input contract: layout, scaling and labels mean one thing wherever data come in."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.data.contract import (
    described,
    laid_out,
    mismatch,
    scaling_of,
)
from edge_sdk.data.examples import Examples
from edge_sdk.data.in_memory import About, checked_source, shard_of
from edge_sdk.data.loading import load, load_shard, load_test, save_shard
from edge_sdk.data.readers import table
from edge_sdk.data.readers.scaling import image_examples
from tests.support.data_files import Items, fails, write_npz

# -- layout ----------------------------------------------------------------------------------------

LAST = "(n, H, W, C), expected (n, C, H, W); give x.transpose(0, 3, 1, 2)"
THREE = "for images give x[:, None], for (n, window, C) x.transpose(0, 2, 1), else say layout"


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((600, 16, 16, 3), LAST),
        ((600, 28, 28, 1), LAST),
        ((600, 32, 32, 4), LAST),
        ((600, 64, 64, 10), LAST),  # square with ten channels
        ((600, 48, 64, 3), LAST),
        ((600, 3, 3, 1), LAST),
        ((600, 28, 28), THREE),
        ((600, 20, 30), THREE),
        ((600, 64, 48), THREE),
        ((600, 128, 9), THREE),  # a series with its channels last
        ((600,), "expected (n, F), (n, C, window), (n, C, H, W)"),
        ((600, 1, 2, 3, 4), "expected (n, F), (n, C, window), (n, C, H, W)"),
    ],
)
def test_what_could_mean_two_things_is_refused_with_its_shape_and_a_way(shape, said):
    line = fails(lambda: laid_out(shape, None, "a.npz"), said)
    assert line.startswith(f"a.npz: got x of shape {shape}")


@pytest.mark.parametrize(
    "shape",
    [
        (600, 3, 32, 32),
        (600, 1, 28, 28),
        (600, 3, 4, 4),
        (600, 4, 5, 3),
        (600, 64, 8, 8),  # features of another network
        (600, 3, 51),
        (600, 9, 128),
        (600, 22, 1000),
        (600, 1, 1),
        (600, 30),
        (600, 784),
    ],
)
def test_what_means_one_thing_stays(shape):
    assert laid_out(shape, None, "x") == shape


@pytest.mark.parametrize(
    ("shape", "layout", "read"),
    [
        ((600, 28, 28), "images", (600, 1, 28, 28)),
        ((600, 28, 28), "series", (600, 28, 28)),
        ((600, 16, 16, 3), "images", (600, 16, 16, 3)),
        ((600, 128), "series", (600, 1, 128)),
        ((600, 30), "features", (600, 30)),
    ],
)
def test_a_layout_says_which(shape, layout, read):
    assert laid_out(shape, layout, "x") == read


def test_a_layout_that_does_not_fit_is_refused():
    fails(lambda: laid_out((5, 3, 4), "features", "x"), "layout 'features', expected (n, F)")
    fails(lambda: laid_out((5,), "features", "x"), "layout 'features'")
    fails(lambda: laid_out((5, 3, 4), "NHWC", "x"), "one of features, series, images")


@pytest.mark.parametrize("dtype", ["uint8", "float16", "float32", "float64"])
def test_the_rule_does_not_depend_on_the_type_nor_on_the_way_in(tmp_path, dtype):
    y = np.arange(4) % 2
    for shape, said in (((4, 28, 28), THREE), ((4, 16, 16, 3), LAST)):
        x = np.ones(shape, dtype)
        file = write_npz(tmp_path / "a.npz", x=x, y=y)
        fails(lambda file=file: load_shard(file), said)
        fails(lambda x=x: checked_source((x, y)), said)
        items = list(zip(x, y.tolist(), strict=True))
        fails(lambda items=items: shard_of(Items(items)).__enter__(), said)
    file = write_npz(tmp_path / "b.npz", x=np.ones((4, 28, 28), dtype), y=y, layout="images")
    assert load_shard(file).input_shape == (1, 28, 28)
    about = About(layout="series")
    assert checked_source((np.ones((4, 28, 28), dtype), y), about).input_shape == (28, 28)


def test_a_reader_of_pixels_keeps_to_it_too():
    x = np.zeros((3, 16, 16, 3), np.uint8)
    fails(lambda: image_examples(x, np.arange(3), 3, "own"), LAST)


def test_what_an_own_reader_gives_is_checked(monkeypatch):
    wrong = Examples(np.zeros((3, 1, 2, 2), np.float32), np.arange(3), 2)
    row = table.FileSet(name="own", read=lambda paths: wrong)
    monkeypatch.setattr(table, "FILE_SETS", [row])
    fails(lambda: load_shard("own"), "labels from 0 to 2, expected 0 to 1")
    fails(lambda: load_test("own"), "labels from 0 to 2")


@pytest.mark.parametrize("shape", [(7,), (28, 28), (16, 16, 3), (3, 4, 4)])
def test_a_shard_is_read_as_it_was_written(tmp_path, shape):
    x = np.random.default_rng(0).normal(size=(4, *shape)).astype(np.float32)
    save_shard(tmp_path / "a.npz", Examples(x, np.arange(4), 4, class_names=tuple("abcd")))
    found = load_shard(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(found.x, x)
    assert found.class_names == ("a", "b", "c", "d")


# -- scaling ---------------------------------------------------------------------------------------

PIXELS = scaling_of(-1.0, 1.0, (127.5, 1.0))


def floats(low: float, high: float):
    return scaling_of(low, high, None)


@pytest.mark.parametrize(
    ("reference", "other", "verdict"),
    [
        (PIXELS, scaling_of(-1.0, -0.5, (127.5, 1.0)), None),  # dark pictures, one rule
        (PIXELS, scaling_of(-1.0, 1.0, (8.0, 1.0)), True),
        (PIXELS, floats(0, 1), True),  # 1 of 2 is shared: at most half
        (PIXELS, floats(0, 255), True),
        (floats(0, 1), PIXELS, True),
        (PIXELS, floats(0.2, 0.9), True),
        (PIXELS, floats(-1, -0.5), False),  # perhaps dark pictures by that rule
        (PIXELS, floats(-3, -2), True),
        (PIXELS, floats(-0.98, 0.9), False),  # perhaps by that rule: 1.88 of 2
        (floats(0, 1), floats(0, 0.8), None),
        (floats(-1, 1), floats(-1.6, 1.2), None),  # 2 of 2.8
        (floats(0, 1), floats(-1, 1), False),
        (floats(0, 1), floats(0, 255), True),  # 255 times as wide
        (floats(0, 255), floats(0, 1), False),  # a narrower range may be a client's own
        (floats(-2, 2), floats(-0.01, 0.01), False),
        (floats(-2, 2), floats(0.5, 0.5), None),  # constant: tells nothing
        (None, PIXELS, None),
        (PIXELS, None, None),
    ],
)
def test_scalings_are_compared_by_rule_and_by_range(reference, other, verdict):
    found = mismatch(reference, other, ("train", "test"))
    assert (found and found.is_certain) is verdict


def test_a_mismatch_names_both_and_the_way_out():
    found = mismatch(PIXELS, floats(0, 1), ("the run", "this device"))
    assert found is not None
    assert found.text == (
        "the inputs of the run are integers / 127.5 - 1, those of this device floats as given, 0 "
        "to 1; give the same integers on both sides, or `scaling` with floats made by that rule"
    )
    assert described(floats(-0.42421, 2.8214)) == "floats as given, -0.424 to 2.82"


@pytest.fixture
def pair(tmp_path):
    """Writes a source of 8-bit pixels with a test part made of them by a function."""
    x = np.arange(48, dtype=np.uint8).reshape(3, 1, 4, 4) * 5  # 0 to 235

    def write(of_test) -> str:
        write_npz(tmp_path / "train.npz", x=x, y=np.arange(3))
        write_npz(tmp_path / "test.npz", **of_test(x), y=np.arange(3))
        return str(tmp_path)

    return write


def test_train_and_test_of_one_source_are_scaled_alike(pair, caplog):
    assert load(pair(lambda x: {"x": x}))[2] is not None
    assert not caplog.records
    for wrong in (lambda x: {"x": x / 255}, lambda x: {"x": x.astype(np.float32)}):
        fails(lambda wrong=wrong: load(pair(wrong)), "integers / 127.5 - 1", "floats as given, 0")
    caplog.clear()
    load(pair(lambda x: {"x": x / 127.5 - 1}))
    assert "those of its test part floats as given, -1 to 0.843" in caplog.text
    caplog.clear()
    load(pair(lambda x: {"x": x / 127.5 - 1, "scaling": [127.5, 1.0]}))
    assert not caplog.records


def test_a_scaling_that_is_claimed_must_be_possible(pair):
    """v / 255 under the rule of pixels would be halves: (0.5 / 255 + 1) * 127.5."""
    claim = {"scaling": [127.5, 1.0]}
    fails(lambda: load(pair(lambda x: {"x": x / 255} | claim)), "no integers / 127.5 - 1")


def test_floats_that_nobody_scaled_are_told(tmp_path, caplog):
    x = np.linspace(0, 255, 3 * 64).reshape(3, 1, 8, 8)
    load_shard(write_npz(tmp_path / "a.npz", x=x / 255, y=np.arange(3)))
    load_shard(write_npz(tmp_path / "b.npz", x=x.astype(np.uint8), y=np.arange(3)))
    assert not caplog.records
    load_shard(write_npz(tmp_path / "c.npz", x=x, y=np.arange(3)))
    assert "the inputs are floats as given, 0 to 255, and training wants about -1" in caplog.text
