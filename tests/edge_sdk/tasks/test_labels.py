"""What data must be for a task, as arrays and in a file: bad input is one line."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.data.in_memory import About, checked_source, shard_of
from edge_sdk.data.loading import as_asked, load_dataset, load_shard
from edge_sdk.data.readers.arrays import checked_arrays
from edge_sdk.errors import ConfigError, DataError, UsageError
from tests.support.task_problems import problem

X = np.zeros((4, 3), np.float32)
IDS = np.zeros((4, 3), np.int64)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"y": [0.5, 1.0, 2.0, 3.0]}, 'or say the task "regress"'),
        ({"y": np.eye(4)}, "of one-hot rows give y.argmax(1), or say the task"),
        ({"task": "sort", "y": [0] * 4}, "got task 'sort', expected one of classify, multilabel"),
        ({"task": "multilabel", "y": [0, 1, 0, 1]}, "expected (n, K) of 0 and 1, a column for"),
        ({"task": "multilabel", "y": [[0, 2]] * 4}, "got y from 0 to 2, expected (n, K) of 0 and"),
        ({"task": "regress", "y": ["a"] * 4}, "expected numbers (n,), or (n, K) of K values"),
        ({"task": "regress", "y": [[0.0], [np.nan], [1], [2]]}, "1 examples, first at 1, expected"),
        ({"task": "regress", "y": [0.0, 1e20, 1, 2]}, "y that is no number below 1e+15"),
        ({"task": "regress", "y": []}, "empty data, no label"),
        ({"task": "tokens", "y": [0] * 4, "x": IDS, "vocabulary": 5}, "expected integers (n, T)"),
        ({"task": "tokens", "y": IDS[:, :2], "x": IDS, "vocabulary": 5}, "expected (4, 3) of int"),
        ({"task": "tokens", "y": IDS - 100, "x": IDS, "vocabulary": 5}, "got y of -100 alone"),
        ({"task": "tokens", "y": IDS - 3, "x": IDS, "vocabulary": 5}, "labels from -3 to -3"),
        ({"y": [0] * 4, "x": IDS}, "of token ids say the vocabulary"),
        ({"y": [0] * 4, "x": IDS + 7, "vocabulary": 5}, "got token ids from 7 to 7, expected 0 to"),
        ({"y": [0] * 4, "x": IDS - 1, "vocabulary": 5}, "token ids from -1 to -1"),
        ({"y": [0] * 4, "x": X, "vocabulary": 5}, "expected token ids, which are integers"),
        ({"y": [0] * 4, "x": IDS[:, :, None], "vocabulary": 5}, "expected token ids (n, T)"),
        ({"y": [0] * 4, "vocabulary": -1, "x": IDS}, "got vocabulary -1, expected at least 0"),
    ],
)
def test_labels_that_are_none_of_the_task(arrays, said):
    given = {"x": X} | arrays
    with pytest.raises(DataError) as refused:
        checked_arrays({name: np.array(value) for name, value in given.items()}, "here")
    assert said in str(refused.value)
    assert str(refused.value).startswith("here: got ")
    assert "\n" not in str(refused.value)


def test_labels_become_what_the_task_has():
    values = checked_arrays({"x": X, "y": [1, 2, 3, 4], "task": np.array("regress")}, "")
    assert (values.y.tolist(), values.y.dtype) == ([[1.0], [2.0], [3.0], [4.0]], np.float32)
    assert values.num_classes == 1
    labels = checked_arrays(
        {"x": X, "y": np.eye(4, dtype=bool), "task": np.array("multilabel")}, ""
    )
    assert (labels.num_classes, labels.y.dtype) == (4, np.float32)
    text = {"x": IDS.astype(np.uint8), "y": IDS, "task": np.array("tokens"), "vocabulary": 9}
    tokens = checked_arrays(text, "")
    assert (tokens.x.dtype, tokens.scaling) == (np.int64, None)
    told = tokens.input_scaling  # of ids those that may be: 0 to the vocabulary, less one
    assert (told.low, told.high, told.divisor) == (0, tokens.vocabulary - 1, None)
    assert (tokens.num_classes, tokens.vocabulary) == (1, 9)


@pytest.mark.parametrize("task", ["multilabel", "regress", "tokens"])
def test_a_dataset_of_a_task_is_read_as_its_arrays(task):
    data = problem(task, 9)
    about = About(task=task, vocabulary=data.vocabulary)
    pairs = [(data.x[i], data.y[i]) for i in range(9)]
    for source in ((data.x, data.y), pairs):
        with shard_of(checked_source(source, about), about) as path:
            found = load_shard(path)
        assert np.array_equal(found.x, data.x)
        assert np.array_equal(found.y, data.y)
        assert found.task == task


def test_labels_of_several_shapes_are_told_with_their_place():
    pairs = [(X[0], X[0]), (X[1], X[1]), (X[2], X[2, :2])]
    about = About(task="regress")
    wanted = r"data\[2\]: got a label of shape \(2,\), expected \(3,\) as data\[0\]"
    with pytest.raises(DataError, match=wanted), shard_of(checked_source(pairs, about), about):
        pass


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"task": "classify"}, "--task classify, but the labels of here are for regress"),
        ({"num_classes": 3}, "--classes 3, but here has 2 columns of y"),
        ({"vocabulary": 9}, "--vocabulary 9, but here has numbers"),
    ],
)
def test_what_is_asked_must_be_what_the_data_are(asked, said):
    with pytest.raises(UsageError) as refused:
        as_asked(problem("regress", 5), "here", None, asked.pop("num_classes", None), **asked)
    assert said in str(refused.value)


def test_more_tokens_than_the_data_hold_may_be_asked_for():
    asked = as_asked(problem("tokens", 5), "here", None, None, "tokens", 9)
    assert asked.vocabulary == 9
    with pytest.raises(UsageError, match="here has token ids below 6"):
        as_asked(problem("tokens", 5), "here", None, None, None, 5)


def test_data_without_classes_are_divided_at_random(tmp_path):
    data = problem("regress", 50)
    np.savez(tmp_path / "a.npz", x=data.x, y=data.y, task="regress")
    found = load_dataset(str(tmp_path / "a.npz"), 0)
    assert (len(found.train), len(found.test)) == (40, 10)
    assert found.train.task == found.test.task == "regress"
    assert not any((found.train.x == row).all(1).any() for row in found.test.x)


def test_a_client_names_a_task_that_exists():
    from edge_sdk import Client

    with pytest.raises(ConfigError, match="task 'sort', vocabulary 0, expected one of classify"):
        Client("tcp://127.0.0.1:1", data=(X, [0] * 4), task="sort", insecure=True, id="a")
