"""Splits of data and partitions among clients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.data.partition import (
    partition_by_subject,
    partition_dirichlet,
    partition_iid,
    split_holdout,
    stratified_split,
)
from edge_sdk.errors import ConfigError
from tests.support.data_files import fails
from tests.support.examples import examples


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


def test_holdout_is_stratified_and_a_function_of_labels_and_seed():
    data = examples(30)  # ten of each of three classes
    kept, held = split_holdout(data, 0.2)
    assert (kept.label_counts().tolist(), held.label_counts().tolist()) == ([8] * 3, [2] * 3)
    assert np.array_equal(split_holdout(replace(data, x=data.x + 1), 0.2)[1].x, held.x + 1)
    assert not np.array_equal(split_holdout(data, 0.2, seed=2)[1].x, held.x)


def test_holdout_where_no_class_can_be_shared_or_too_few_would_be_left():
    fours = replace(examples(4), y=np.arange(4), num_classes=4)  # each alone in its class
    assert [len(part) for part in split_holdout(fours, 0.2)] == [3, 1]
    lonely = replace(examples(4), y=np.zeros(4, dtype=np.int64))  # one class only
    assert [len(part) for part in split_holdout(lonely, 0.25)] == [3, 1]
    assert [len(part) for part in split_holdout(lonely, 0.5)] == [4, 0], "2 cannot train"
    assert [len(part) for part in split_holdout(examples(1), 0.2)] == [1, 0]
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split_holdout(examples(9), 1.0)


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
