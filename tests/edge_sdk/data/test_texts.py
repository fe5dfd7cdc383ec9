"""Texts by a tokenizer file: next tokens, and texts with a label."""

from __future__ import annotations

import os

import pytest

from edge_sdk.data.contract import mismatch
from edge_sdk.data.loading import load, load_dataset, load_shard, save_shard
from tests.support.data_files import fails
from tests.support.own_files import WORDS, write_jsonl, write_text, write_texts, write_tokenizer

pytest.importorskip("tokenizers", reason="tokenizers is not installed")
PAD = 'pad = "[PAD]"'


def test_a_text_is_cut_into_windows_of_which_each_next_token_is_learned(tmp_path):
    path = write_text(tmp_path / "story.txt", "the cat sat .\nthe dog ran")
    name, examples, test = load(str(path))
    assert (name, test, examples.task) == ("story", None, "tokens")
    assert (examples.vocabulary, examples.num_classes, examples.input_shape) == (8, 8, (4,))
    # the cat sat . the dog ran is 2 3 5 7 2 4 6
    assert examples.x.tolist() == [[2, 3, 5, 7], [2, 4, 6, 0]]
    assert examples.y.tolist() == [[3, 5, 7, 2], [4, 6, -100, -100]]
    assert examples.made_of.startswith("tokens of 8 (")


@pytest.mark.parametrize(
    ("text", "x", "y"),
    [
        ("the cat sat . dog", [[2, 3, 5, 7]], [[3, 5, 7, 4]]),  # the last only follows
        ("the cat sat .", [[2, 3, 5, 7]], [[3, 5, 7, -100]]),
        ("the cat", [[2, 3, 0, 0]], [[3, -100, -100, -100]]),
        ("the unicorn", [[2, 1, 0, 0]], [[1, -100, -100, -100]]),
        ("\ufeffthe\r\n\r\ncat", [[2, 3, 0, 0]], [[3, -100, -100, -100]]),
    ],
)
def test_where_a_text_ends(tmp_path, text, x, y):
    path = write_text(tmp_path / "a.txt", "")
    path.write_bytes(text.encode())
    examples = load_shard(str(path))
    assert (examples.x.tolist(), examples.y.tolist()) == (x, y)


def test_a_long_text_is_read_in_blocks_like_a_short_one(tmp_path):
    lines = "the cat sat .\n" * 100_000  # over 1 MiB
    examples = load_shard(str(write_text(tmp_path / "a.txt", lines)))
    assert examples.x.shape == (100_000, 4)
    assert (examples.x == [2, 3, 5, 7]).all()
    assert (examples.y[:-1] == [3, 5, 7, 2]).all()
    assert examples.y[-1].tolist() == [3, 5, 7, -100]


def test_each_line_of_a_jsonl_is_a_text_of_its_own(tmp_path, caplog):
    lines = '{"text": "the cat sat . dog", "id": 1}\n\n{"text": "ran"}\n{"text": "dog ran"}\n'
    examples = load_shard(str(write_text(tmp_path / "a.jsonl", lines)))
    assert examples.x.tolist() == [[2, 3, 5, 7], [4, 6, 0, 0]]
    assert examples.y.tolist() == [[3, 5, 7, 4], [6, -100, -100, -100]]
    assert "1 texts of less than 2 tokens are left out" in caplog.text
    assert "keys ['id'] are not read" in caplog.text


def test_texts_with_a_label_are_cut_off_and_filled(tmp_path, caplog):
    lines = '{"text": "the cat sat . .", "label": "b"}\n{"text": "dog", "label": "a"}'
    examples = load_shard(str(write_text(tmp_path / "a.jsonl", lines, PAD)))
    assert (examples.task, examples.vocabulary, examples.num_classes) == ("classify", 8, 2)
    assert examples.x.tolist() == [[2, 3, 5, 7], [4, 0, 0, 0]]
    assert (examples.y.tolist(), examples.class_names) == ([1, 0], ("a", "b"))
    assert "1 of 2 texts are cut off at 4 tokens" in caplog.text
    assert examples.made_of.endswith("), padded with 0")
    numbers = lines.replace('"b"', "2").replace('"a"', "0")
    examples = load_shard(str(write_text(tmp_path / "a.jsonl", numbers, PAD)))
    assert (examples.y.tolist(), examples.num_classes) == ([2, 0], 3)


def test_a_folder_of_texts_by_class(tmp_path):
    write_texts(tmp_path)
    name, examples, _ = load(str(tmp_path))
    assert (name, examples.class_names) == (tmp_path.name, ("cat", "dog"))
    assert examples.x.tolist() == [[2, 3, 5, 0], [2, 3, 5, 7], [2, 4, 5, 0], [2, 4, 5, 7]]
    assert examples.y.tolist() == [0, 0, 1, 1]


def test_another_tokenizer_is_refused_and_a_shard_remembers_its_own(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    mine = load_shard(str(path))
    save_shard(tmp_path / "shard.npz", mine)
    again = load_shard(str(tmp_path / "shard.npz"))
    assert again.trained_on == mine.trained_on
    assert (again.x.tolist(), again.vocabulary) == (mine.x.tolist(), 8)
    words = (*WORDS[:3], "dog", "cat", *WORDS[5:])
    write_tokenizer(tmp_path / "tokenizer.json", words)
    other = load_shard(str(path))
    found = mismatch(mine.input_scaling, other.input_scaling, ("this run", "pi-1"))
    assert found is not None
    assert found.is_certain
    assert "tokens of 8 (" in found.text


GOOD = '{"text": "the cat", "label": 0}\n'


@pytest.mark.parametrize(
    ("text", "about", "fragments"),
    [
        (GOOD + '{"text": "dog"}', PAD, ("line 2", "no label", "one in each line")),
        ('{"text": "dog"}\n' + GOOD, PAD, ("line 2", "a label", "or in none")),
        (GOOD + '{"text": 3, "label": 0}', PAD, ("line 2", '"text": 3', "expected {")),
        (GOOD + "[1]", PAD, ("line 2", "'[1]'")),
        (GOOD + '{"text": "a"', PAD, ("line 2", "JSONDecodeError")),
        (GOOD + "[" * 100_000, PAD, ("line 2", "RecursionError")),
        (GOOD + '{"text": "a", "label": true}', PAD, ("line 2", "the label True")),
        (GOOD + '{"text": "a", "label": null}', PAD, ("line 2", "the label None")),
        (GOOD + '{"text": "a", "label": 0.5}', PAD, ("the labels '0' and '0.5'",)),
        (GOOD + '{"text": "\\ud800", "label": 0}', PAD, ("line 2", "tokenizer.json can take")),
        (GOOD, "", ("tokenizer.json", "no padding", 'write pad = "TOKEN" in data.toml')),
        (GOOD, 'pad = "<pad>"', ("no token '<pad>'",)),
        (GOOD, PAD + '\nclasses = ["a"]', ("the label '0'", "one of classes")),
        (GOOD, "colour = 1", ("data.toml", "colour", "tokenizer, length, pad")),
        ("", PAD, ("no line",)),
        ('{"text": "cat"}', PAD, ("no text of 2 tokens or more",)),
    ],
)
def test_bad_lines(tmp_path, text, about, fragments):
    path = write_text(tmp_path / "a.jsonl", text, about)
    fails(lambda: load(str(path)), str(tmp_path), *fragments)


def test_bad_texts_and_tokenizers(tmp_path):
    path = write_text(tmp_path / "a.txt", "cat")
    fails(lambda: load(str(path)), "a.txt", "no text of 2 tokens or more")
    path.write_bytes(b"the cat \xff")
    fails(lambda: load(str(path)), "a.txt", "UnicodeDecodeError")
    with path.open("wb") as file:
        file.write(b"the cat\n")
        os.truncate(file.fileno(), 2 * 1024**3)
    fails(lambda: load(str(path)), "a.txt", "null bytes")
    path.write_text("the cat")
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    fails(lambda: load(str(path)), "tokenizer.json", "as the package tokenizers saves it")
    (tmp_path / "tokenizer.json").unlink()
    fails(lambda: load(str(path)), "tokenizer.json", "No such file", "correct tokenizer in")
    (tmp_path / "data.toml").write_text("length = 4")
    fails(lambda: load(str(path)), "text without tokenizer", 'tokenizer = "tokenizer.json"')
    (tmp_path / "data.toml").unlink()
    fails(lambda: load(str(path)), "text without tokenizer", "and length = 128")


def test_a_text_is_split_for_an_emulation(tmp_path):
    path = write_text(tmp_path / "a.txt", "the cat sat .\n" * 20)
    found = load_dataset(str(path), seed=0)
    assert (len(found.train), len(found.test)) == (16, 4)
