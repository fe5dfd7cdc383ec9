"""The input contract: what labels and their names mean, and arrays that are no plain ones."""

from __future__ import annotations

import hashlib
import logging

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from edge_sdk.data.contract import (
    checked_names,
    from_one,
    names_digest,
)
from edge_sdk.data.examples import check_examples
from edge_sdk.data.in_memory import About, checked_source, shard_of
from edge_sdk.data.loading import load, load_shard
from edge_sdk.errors import DataError
from tests.support.data_files import Items, fails, write_npz

# -- labels ----------------------------------------------------------------------------------------

X = np.random.default_rng(0).normal(size=(12, 1, 8, 8)).astype(np.float32)
Y = np.arange(12) % 3


def test_labels_from_one_are_told(tmp_path, caplog):
    load_shard(write_npz(tmp_path / "a.npz", x=X, y=Y + 1))
    assert "labels run from 1 to 3 and none is 0" in caplog.text
    assert "give y - 1" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    caplog.clear()
    load_shard(write_npz(tmp_path / "b.npz", x=X, y=Y))
    load_shard(
        write_npz(tmp_path / "c.npz", x=X, y=Y + 1, num_classes=10)
    )  # a client's own classes
    assert not caplog.records
    fails(
        lambda: load_shard(write_npz(tmp_path / "d.npz", x=X, y=Y + 1, num_classes=3)),
        "labels from 1 to 3, expected 0 to 2; labels count from 0, so give y - 1",
    )
    assert from_one(1, 9, 10)
    assert not from_one(0, 9, 10)
    assert not from_one(3, 9, 10)


NAMES = ("cat", "dog", "owl")


def test_text_labels_have_the_place_of_their_name(tmp_path):
    texts = np.array(NAMES)[Y]
    file = write_npz(tmp_path / "a.npz", x=X, y=texts, class_names=NAMES)
    about = About(class_names=NAMES)
    pairs = Items(list(zip(X, texts, strict=True)))
    with shard_of(checked_source(pairs, about), about) as shard:
        for found in (
            load_shard(file),
            checked_source((X, texts.tolist()), about),
            load_shard(shard),
        ):
            assert found.y.tolist() == Y.tolist()
            assert (found.num_classes, found.class_names) == (3, NAMES)
    few = checked_source((X, np.where(Y == 2, "dog", texts)), about)
    assert (few.num_classes, few.label_counts().tolist()) == (3, [4, 8, 0])


def test_text_labels_without_names_are_refused_with_the_way(tmp_path):
    texts = np.array(NAMES)[Y]
    file = write_npz(tmp_path / "a.npz", x=X, y=texts)
    fails(lambda: load_shard(file), "y of dtype text, expected integers; give class_names")
    fails(lambda: checked_source((X, texts.astype(object))), "give class_names")
    pairs = Items(list(zip(X, texts, strict=True)))
    fails(lambda: shard_of(pairs).__enter__(), "data[0]: got the label np.str_('cat')")
    fails(lambda: checked_source((X, texts.astype("S"))), "give y.astype(str)")
    about = About(class_names=("cat", "dog", "eel"))
    fails(lambda: checked_source((X, texts), about), "the label 'owl', expected a name of class")
    fails(lambda: shard_of(pairs, about).__enter__(), "data[2]: got the label", "cat, dog, eel")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("a", "b", "a"), "'a' more than once"),
        (("a", "", "c"), "class_names with ''"),
        (("a", "b\n", "c"), "class_names with 'b\\n'"),
        (("a", 2, "c"), "class_names with 2"),
        (("a", "x" * 201, "c"), "class_names with 'xxx"),
        ("abc", "class_names 'abc' of type str, expected a list of names"),
        (("a", "b"), "labels from 0 to 2, expected 0 to 1"),
    ],
)
def test_class_names_are_checked(names, said):
    fails(lambda: checked_source((X, Y), About(class_names=names)), said)


def test_names_and_number_of_classes_agree(tmp_path):
    wrong = write_npz(tmp_path / "a.npz", x=X, y=Y, class_names=NAMES, num_classes=4)
    fails(lambda: load_shard(wrong), "3 class_names for 4 classes")
    write_npz(tmp_path / "train.npz", x=X, y=Y, class_names=NAMES)
    write_npz(tmp_path / "test.npz", x=X, y=Y)
    _, train, test = load(str(tmp_path))
    assert train.class_names == test.class_names == NAMES
    write_npz(tmp_path / "test.npz", x=X, y=Y, class_names=NAMES[::-1])
    fails(lambda: load(str(tmp_path)), "other class_names in test than in train")


def test_the_digest_of_names_is_of_one_a_line():
    assert names_digest(()) is None
    assert names_digest(("cat", "dog")) == hashlib.sha256(b"cat\ndog\n").hexdigest()[:32]
    assert checked_names(["kæt"], "x") == ("kæt",)


# -- what numpy would lose, or does not hold -------------------------------------------------------


def masked(array: np.ndarray, *rows: int) -> np.ma.MaskedArray:
    mask = np.zeros(array.shape, bool)
    mask[list(rows)] = True
    fill = 999 if array.dtype.kind == "i" else 9.97e36
    return np.ma.masked_array(np.where(mask, fill, array).astype(array.dtype), mask=mask)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((masked(X, 3), Y), "masked values of x in 1 examples (3), expected no masked value"),
        ((masked(X, *range(7)), Y), "masked values of x in 7 examples (0, 1, 2, 3, 4 and 2 more)"),
        ((X, masked(Y, 5)), "masked values of y in 1 examples (5)"),
        ((list(masked(X, 3)), Y), "masked values of x in 1 examples (3)"),
        ((X, [0, np.ma.masked, 2]), "masked values of y in 1 examples (1)"),
        ((csr_matrix(X[:, 0, 0]), Y), "x of type csr_matrix, sparse"),
        ((torch.from_numpy(X[:, 0, 0]).to_sparse(), Y), "x of type Tensor, sparse"),
        ((X.astype(bool), Y), 'x of dtype bool, expected uint8 or float; give x.astype("float32")'),
        ((X.astype(complex), Y), "x of dtype complex128, expected uint8 or float; give real"),
        ((X.astype("int64").astype("datetime64[s]"), Y), "x of dtype datetime64[s]"),
        ((X.astype(object), Y), "x of dtype object"),
        ((X.astype(str), Y), "give numbers"),
        ((np.zeros(12, [("a", "f4"), ("b", "f4")]), Y), "fields as channels"),
        ((X, Y.astype(bool)), "y of dtype bool, expected integers; give y.astype(int)"),
        ((X, np.eye(3)[Y]), "y of shape (12, 3), expected (12,)"),
        ((X, Y[:, None]), "give y[:, 0]"),
        ((X, np.full(12, 2**63 + 5, np.uint64)), "labels up to 9223372036854775813, expected at"),
        (([], []), "empty data"),
        ((torch.from_numpy(X).requires_grad_(), Y), "Use tensor.detach().numpy()"),
        ((torch.from_numpy(X).bfloat16(), Y), "BFloat16"),
        ((np.where(X > 2, 1e20, X), Y), "1e+20 among the inputs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_plain_array_is_refused_in_one_line(data, said):
    fails(lambda: checked_source(data), said)


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ((masked(X, 3)[3], 0), "data[2]: got a masked input"),
        ((X[0], np.ma.masked), "data[2]: got a masked label"),
        ((X[0], np.ma.masked_array(1, mask=True)), "data[2]: got a masked label"),
        ((X[0], True), "data[2]: got the label True, expected an integer"),
        ((X[0], None), "data[2]: got a label of type NoneType"),
        ((X[0], 2**70), "data[2]: got OverflowError"),
    ],
)
def test_the_items_of_a_dataset_are_looked_at_likewise(item, said):
    pairs = Items([(X[0], 0), (X[1], 1), item])
    fails(lambda: shard_of(pairs).__enter__(), said)


def test_a_mask_that_hides_nothing_is_no_reason_to_refuse():
    found = checked_source((np.ma.masked_array(X), np.ma.masked_array(Y)))
    assert type(found.x) is np.ndarray
    np.testing.assert_array_equal(found.x, X)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_torch_masks_are_seen():
    x = torch.masked.masked_tensor(torch.from_numpy(X), torch.from_numpy(X) < 9)
    hidden = torch.masked.masked_tensor(torch.from_numpy(X), torch.ones(X.shape) < 1)
    np.testing.assert_array_equal(checked_source((x, Y)).x, X)
    fails(lambda: checked_source((hidden, Y)), "masked values of x in 12 examples")


def test_a_file_whose_mask_was_lost_shows_its_fill_value(tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, x=masked(X, 3).filled(), y=Y)  # numpy's own for float32 is 1e20
    fails(lambda: load_shard(str(file)), "1e+20 among the inputs", "a mark for missing values")


def test_features_are_examples_too():
    found = checked_source((X[:, 0, 0], Y))
    assert found.input_shape == (8,)
    assert check_examples(found, "x") is found


def test_data_errors_name_where_the_data_are():
    with pytest.raises(DataError, match=r"^data: got x of shape"):
        checked_source((np.zeros((5, 9, 9)), np.arange(5)))
