"""The real files, where this machine has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_sdk.data.loading import load, load_dataset, load_shard
from edge_sdk.data.partition import partition_by_subject, partition_dirichlet

SHARED = Path(__file__).resolve().parents[4] / "shared" / "data"


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
