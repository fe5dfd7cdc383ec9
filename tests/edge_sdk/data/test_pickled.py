"""CIFAR's pickles: what is read, what is refused, and that nothing ever runs."""

from __future__ import annotations

import numpy as np
import pytest

from edge_sdk.data.loading import load, load_shard
from tests.support.data_files import fails
from tests.support.published import Pickled, cifar_pickle, pixels, unscaled


def test_the_pickles_here_are_what_python_reads(tmp_path):
    """numpy's own unpickling of the bytes that these tests assemble."""
    path = tmp_path / "data_batch_1"
    path.write_bytes(cifar_pickle(pixels(3, 32), [1, 2, 3]))
    content = np.load(path, allow_pickle=True, encoding="latin1")
    assert set(content) == {"batch_label", "labels", "data", "filenames"}
    np.testing.assert_array_equal(content["data"], pixels(3, 32).reshape(3, -1))
    assert content["labels"] == [1, 2, 3]
    assert content["filenames"] == ["image_0.png", "image_1.png", "image_2.png"]


def test_cifar_pickle_of_many_records_and_in_fortran_order(tmp_path):
    """1,100 records: more than one APPENDS, memo keys beyond one byte."""
    path = tmp_path / "train"
    labels = [number % 100 for number in range(1100)]
    for fortran in (False, True):
        content = cifar_pickle(pixels(1100, 32), labels, b"fine_labels", fortran=fortran)
        path.write_bytes(content)
        train = load_shard(str(path))
        np.testing.assert_array_equal(unscaled(train.x), pixels(1100, 32))
        assert train.y.tolist() == labels


ONE = pixels(1, 32)
GOOD = cifar_pickle(ONE, [1])
NONE = Pickled().put(b"}(").text(b"labels").sequence([])
NONE.text(b"data").array(np.zeros((0, 3072), np.uint8)).put(b"u.")
TWICE = Pickled().put(b"}(").text(b"data").array(ONE.reshape(1, -1))
TWICE.put(b"h%cbu." % TWICE.num_memos)  # BUILD with the same state again
BAD_PICKLES = {
    "array built twice": (TWICE.raw, "a state other than"),
    "empty": (b"", "exhausted"),
    "text": (b"some text", "opcode"),
    "cut": (GOOD[:-1], "exhausted"),
    "cut in the array": (GOOD[:2000], "remain"),
    "no dict": (b"\x80\x02K\x01.", "needs a dict"),
    "protocol 3": (b"\x80\x03" + GOOD[2:], "protocol 3"),
    "protocol 4": (b"\x80\x04\x95\0\0\0\0\0\0\0\0}.", "protocol 4"),
    "no array": (Pickled().put(b"}(").text(b"labels").sequence([1]).put(b"u.").raw, "['labels']"),
    "other key": (cifar_pickle(ONE, [1], b"fine_labels"), "a list labels"),
    "label count": (cifar_pickle(ONE, [1, 2]), "data (1, 3072) with 2 labels"),
    "label range": (cifar_pickle(ONE, [10]), "labels from 10 to 10, expected 0 to 9"),
    "text labels": (cifar_pickle(ONE, [b"cat"]), "no integers"),
    "row size": (cifar_pickle(np.zeros((1, 3071), np.uint8), [1]), "(1, 3071)"),
    "one axis": (GOOD.replace(b"K\x01M\x00\x0c\x86", b"M\x00\x0c\x85"), "(3072,)"),
    "no records": (NONE.raw, "with 0 labels"),
    "array size": (GOOD.replace(b"K\x01M\x00\x0c\x86", b"K\x02M\x00\x0c\x86"), "cannot reshape"),
    "dtype": (cifar_pickle(ONE, [1], dtype=b"i1"), "a call other than"),
    "object dtype": (cifar_pickle(ONE, [1], dtype=b"O8"), "a call other than"),
    "key without a value": (GOOD[:-2] + b"N" + GOOD[-2:], "shorter"),
    "stack underflow": (b"\x80\x02}\x86.", "without its values"),
    "below the mark": (b"\x80\x02}K\x01(\x86.", "without its values"),
    "set on a list": (b"\x80\x02](K\x01K\x02u.", "needs a dict"),
    "append to a dict": (b"\x80\x02}K\x01a.", "needs a list"),
    "number as key": (b"\x80\x02}K\x01K\x02s.", "no string"),
    "values left": (b"\x80\x02}}.", "left over"),
    "persistent id": (b"\x80\x02K\x01Q.", "the opcode BINPERSID"),
    "object": (b"\x80\x02cnumpy\nndarray\n)\x81.", "the opcode EMPTY_TUPLE"),
    "memo": (b"\x80\x02h\x09.", "KeyError"),
}


@pytest.mark.parametrize(("content", "fragment"), BAD_PICKLES.values(), ids=BAD_PICKLES)
def test_bad_pickle(tmp_path, content, fragment):
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    fails(lambda: load(str(path)), str(path), fragment, "expected", ";")


HOSTILE = {  # each makes a file `ran` when unpickled
    "REDUCE": b"\x80\x02cposix\nsystem\nU\x09touch ran\x85R.",
    "eval": b"\x80\x02cbuiltins\neval\nU\x17open('ran','w').close()\x85R.",
    "INST": b"\x80\x02(U\x09touch ranios\nsystem\n.",
    "OBJ": b"\x80\x02(cos\nsystem\nU\x09touch rano.",
    "STACK_GLOBAL": b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x09touch ran\x85R.",
    "in a CIFAR dict": GOOD[:-2] + b"U\x01xcposix\nsystem\nU\x09touch ran\x85R" + GOOD[-2:],
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "data_batch_1"
    path.write_bytes(content)
    fails(lambda: load(str(path)), str(path), "ValueError", "expected a CIFAR pickle")
    assert not (tmp_path / "ran").exists()
    np.load(path, allow_pickle=True, encoding="latin1")
    assert (tmp_path / "ran").exists(), "else the refusal proves nothing"
