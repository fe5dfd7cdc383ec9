"""Tables in CSV files: what is read, and what is asked back in one line."""

from __future__ import annotations

import os

import numpy as np
import pytest

from edge_sdk.data import bounded
from edge_sdk.data.loading import load, load_dataset, load_shard
from tests.support.data_files import fails
from tests.support.own_files import TABLE, write_csv

VALUES = "a,up,b,on\n1,0.5,2,0\n3,-0.5,4,1\n5,0,6,1\n"
X = np.array([[1, 0.5], [2, -0.5], [3, 0.1]], np.float32)


def test_a_table_of_names_and_numbers(tmp_path):
    path = write_csv(tmp_path / "pets.csv")
    name, examples, test = load(str(path))
    assert (name, test, examples.class_names) == ("pets", None, ("cat", "dog"))
    np.testing.assert_array_equal(examples.x, X)
    assert examples.y.tolist() == [0, 1, 0]
    assert examples.made_of.startswith("2 columns (")
    assert examples.scaling is None


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + TABLE,
        TABLE.replace("\n", "\r\n"),
        TABLE.replace("\n", "\r"),
        TABLE.replace(",", ";"),
        TABLE.replace(",", "\t"),
        TABLE.replace("size,", '" size",').replace("cat", '"cat"'),
        TABLE.replace("\n2", "\n\n2") + ",,\n\n",
        TABLE.removesuffix("\n"),
        ("\ufeff" + TABLE).encode("utf-16-le"),
    ],
    ids=lambda text: repr(text[:12]),
)
def test_one_table_in_many_spellings(tmp_path, text):
    examples = load_shard(str(write_csv(tmp_path / "pets.csv", text)))
    np.testing.assert_array_equal(examples.x, X)
    assert (examples.y.tolist(), examples.class_names) == ([0, 1, 0], ("cat", "dog"))


def test_names_of_classes_that_this_device_lacks_and_quoted_ones(tmp_path):
    text = 'a,kind\n1,"sea, blue"\n2,"two\nlines"\n'
    path = write_csv(tmp_path / "a.csv", text, 'label = "kind"\n')
    fails(lambda: load(str(path)), "'kind'", r"class_names with 'two\nlines'", "text on one line")
    about = 'label = "kind"\nclasses = ["red", "sea, blue", "green"]'
    path = write_csv(tmp_path / "a.csv", text.replace("two\nlines", "green"), about)
    examples = load_shard(str(path))
    assert (examples.y.tolist(), examples.num_classes) == ([1, 2], 3)
    write_csv(path, text, about)
    fails(lambda: load(str(path)), r"the label 'two\nlines'", "one of classes of data.toml")


def test_what_data_toml_says_is_done(tmp_path):
    text = "7,10,50,-10,a\n8,20,0,30,b\n9,nan,1,2,b\n"
    about = (
        'columns = ["id", "t", "h", "c", "y"]\nlabel = "y"\nignore = ["id"]\n'
        'missing = "leave out"\n'
        "range = {t = [0, 20], h = [0, 100]}\nshape = [1, 3]\n"
    )
    path = write_csv(tmp_path / "a.csv", text, about)
    examples = load_shard(str(path))
    # t: (10 - 10) / 10, h: (50 - 50) / 50; c as it is
    np.testing.assert_allclose(examples.x, [[[0, 0, -10]], [[1, -1, 30]]])
    assert examples.y.tolist() == [0, 1]
    write_csv(path, "a,b,who,label\n0,255,x,0\n51,0,y,1\n", 'range = [0, 255]\nsubject = "who"')
    examples = load_shard(str(path))
    np.testing.assert_allclose(examples.x, [[-1, 1], [-0.6, -1]], atol=1e-7)
    assert examples.subject is not None
    assert (examples.subject.tolist(), examples.class_names) == ([0, 1], ())


def test_several_columns_of_values_or_of_answers(tmp_path):
    about = 'task = "regress"\nlabel = ["on", "up"]\nrange = {on = [0, 4], a = [1, 5]}\n'
    path = write_csv(tmp_path / "a.csv", VALUES, about)
    examples = load_shard(str(path))
    assert (examples.task, examples.num_classes) == ("regress", 2)
    assert examples.class_names == ("on", "up")
    np.testing.assert_array_equal(examples.x, [[-1, 2], [0, 4], [1, 6]])
    np.testing.assert_array_equal(examples.y, [[-1, 0.5], [-0.5, -0.5], [-0.5, 0]])
    assert examples.y.dtype == np.float32
    write_csv(
        path,
        VALUES.replace("0.5", "1").replace("-1", "1"),
        'task = "multilabel"\nlabel = ["up", "on"]',
    )
    examples = load_shard(str(path))
    assert (examples.task, examples.class_names) == ("multilabel", ("up", "on"))
    assert examples.y.tolist() == [[1, 0], [1, 1], [0, 1]]
    write_csv(path, "a,y\n1,2.5\n2,3\n", 'task = "regress"\nlabel = "y"')
    examples = load_shard(str(path))
    assert (examples.x.tolist(), examples.y.tolist()) == ([[1], [2]], [[2.5], [3]])


def test_rows_that_are_left_out_are_counted(tmp_path, caplog):
    path = write_csv(
        tmp_path / "a.csv", TABLE + "NA,1,dog\n1,,dog\n1,2,\n", 'missing = "leave out"'
    )
    assert len(load_shard(str(path))) == 3
    assert "3 rows that lack a value are left out" in caplog.text


@pytest.mark.parametrize(
    ("text", "about", "fragments"),
    [
        (TABLE + "4,5\n", "", ("line 5", "2 cells", "expected 3")),
        (TABLE + "4,5,6,cat\n", "", ("line 5", "4 cells", "stands between quotes")),
        (
            TABLE + "x,5,cat\n",
            "",
            ("line 5, column 'size'", "got 'x'", "a number", 'ignore = ["size"]'),
        ),
        (TABLE + "1,,cat\n", "", ("line 5, column 'weight'", "got ''", 'missing = "leave out"')),
        (TABLE + "1,NaN,cat\n", "", ("'weight'", "got 'NaN'", "a value")),
        (TABLE + "1,inf,cat\n", "", ("'weight'", "got 'inf'", "a number")),
        (TABLE + "1,1_000,cat\n", "", ("'weight'", "got '1_000'", "a number")),
        (TABLE + "1,2,\n", "", ("line 5, column 'label'", "got ''", "a value")),
        (TABLE + "1e308,1e308,cat\n", "", ("line 5", "scale them")),
        (TABLE + "1e20,1,cat\n", "", ("1e+20 among the inputs",)),
        (TABLE.replace(",", ";") + "1,5;2;cat\n", "", ("line 5", "'1,5'", "1.5 for 1,5")),
        (TABLE + '1,"1,5",cat\n', "", ("'weight'", "a decimal point")),
        (TABLE + '1,"2,cat\n', "", ("line 5", "unexpected end of data", "between")),
        (TABLE.replace("cat", "1", 1), "", ("'label'", "the labels '1' and 'dog'", "classes")),
        ("a,label\n1,0.5\n", "", ("the label '0.5'", "whole numbers or names")),
        ("a,label\n1,-1\n", "", ("labels from -1",)),
        ("a,label\n1,1234567890123\n", "", ("labels up to 1234567890123",)),
        ("1,2,0\n3,4,1\n", "", ("a first line of numbers", "columns = [...]")),
        ("a,b,kind\n1,2,x\n", "", ("['a', 'b', 'kind']", "one called 'label'", 'label = "NAME"')),
        ("a,a,label\n1,2,x\n", "", ("the column 'a' twice",)),
        (",a,label\n0,2,x\n", "", ("column 1 without a name", 'ignore = [""]')),
        ("a;b,label\n0;2,x\n", "", ("comma and semicolon", "delimiter =")),
        ("label\nx\n", "", ("no delimiter",)),
        ("label,id\nx,1\n", 'ignore = ["id"]', ("inputs beside the label",)),
        ("a,label\n", "", ("no row",)),
        ("", "", ("no delimiter",)),
        (TABLE.encode() + b"\xff,1,cat\n", "", ("UnicodeDecodeError", "a CSV file in UTF-8")),
        (b"a,label\n" + bytes(100), "", ("null bytes",)),
        (TABLE, 'ignore = ["x"]', ("'x' among them, as data.toml says",)),
        (TABLE, "range = {width = [0, 1]}", ("'width' among them",)),
        (TABLE, "range = [1, 1]", ("range [1.0, 1.0]", "the least first")),
        (TABLE, "range = [0, inf]", ("two finite numbers",)),
        (TABLE, "shape = [3]", ("2 inputs", "3, as shape of data.toml says")),
        (TABLE, "size = [3]", ("data.toml", "unknown field", "size", "label")),
        (TABLE, "label = 3", ("data.toml", "$.label", "expected")),
        (TABLE, "label =", ("data.toml", "TOML")),
        (TABLE, 'label = ["size", "weight"]', ("['size', 'weight']", "one column", "regress")),
        (TABLE, 'task = "regress"\nlabel = ["size", "cat"]', ("one called 'cat'",)),
        (TABLE, 'task = "regress"\nlabel = "size"', ("column 'label'", "'cat'", "a number")),
        (TABLE, 'task = "regress"\nclasses = ["a"]', ("classes beside task 'regress'",)),
        (TABLE, 'task = "tokens"', ("data.toml", "'tokens'")),
        (
            VALUES,
            'task = "multilabel"\nlabel = ["up", "on"]',
            ("y[0, 0] 0.5, and 1 more", "0 or 1"),
        ),
        (TABLE, 'classes = ["dog", "dog"]', ("'dog' more than once",)),
        (TABLE, 'classes = ["dog"]', ("the label 'cat'", "one of classes of data.toml")),
    ],
    ids=lambda value: repr(value)[-30:] if isinstance(value, tuple) else "",
)
def test_bad_tables(tmp_path, text, about, fragments):
    path = write_csv(tmp_path / "a.csv", text, about)
    fails(lambda: load(str(path)), str(tmp_path), *fragments)


def test_a_sparse_file_and_a_line_without_an_end_are_not_held(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    with path.open("wb") as file:
        file.write(TABLE.encode())
        os.truncate(file.fileno(), 2 * 1024**3)
    fails(lambda: load(str(path)), "null bytes")
    path.write_bytes(b"a,label\n" + b"1" * (4 * 1024**2 + 1))
    fails(lambda: load(str(path)), "a line of more than 4194304 characters")
    path.write_text("a,label\n" + "1,0\n" * 10_000)
    monkeypatch.setattr(bounded, "free_bytes", lambda: 40_000.0)
    fails(lambda: load(str(path)), "MiB of numbers", "take fewer")


def test_other_columns_of_a_test_part_or_a_device_are_refused(tmp_path):
    write_csv(tmp_path / "train.csv")
    write_csv(tmp_path / "test.csv", TABLE.replace("size,weight", "weight,size"))
    fails(lambda: load(str(tmp_path)), "2 columns (", "make both alike")
    write_csv(tmp_path / "test.csv", TABLE.replace("dog", "emu"))
    fails(lambda: load(str(tmp_path)), "other class_names in test")
    write_csv(tmp_path / "test.csv", TABLE)
    assert load(str(tmp_path))[2] is not None


def test_a_class_of_one_example_stays_in_the_train_part(tmp_path):
    text = "a,label\n" + "".join(f"{n},{n % 2}\n" for n in range(10)) + "3,2\n"
    found = load_dataset(str(write_csv(tmp_path / "a.csv", text)), seed=0)
    assert 2 in found.train.y
    assert 2 not in found.test.y
    assert len(found.test) == 2  # a fifth of 11
