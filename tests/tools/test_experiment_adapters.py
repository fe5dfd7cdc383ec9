"""Data and figures of tools/experiments for pre-trained weights and adapters."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.data.examples import Examples
from edge_sdk.data.loading import load, save_shard
from edge_sdk.errors import ConfigError, DataError
from tools.experiments import corpus
from tools.experiments.__main__ import main

PROGRAM = '''"""About the module."""
import os  # and why


def first():
    """About first."""


class Second:
    """About second."""

    name = """no docstring"""
'''


def test_prose_and_programs_have_nothing_in_common(tmp_path: Path):
    (tmp_path / "module.py").write_text(PROGRAM)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_module.py").write_text('"""Left out."""')
    assert list(corpus.docstrings(tmp_path)) == [
        "About the module.\n\nAbout first.\n\nAbout second."
    ]
    assert list(corpus.programs(tmp_path)) == [
        "import os\n\ndef first():\n    pass\n\nclass Second:\n    name = 'no docstring'"
    ]


def test_every_fifth_file_is_for_testing_and_of_few_the_last():
    assert corpus.split_files(iter("abcdefghij")) == (list("abcdfghi"), ["e", "j"])
    assert corpus.split_files(iter("abc")) == (["a", "b"], ["c"])
    assert corpus.split_files(iter("a")) == (["a"], [])


def test_each_byte_is_followed_by_the_next_one():
    found = corpus.next_bytes(["abcd", "efg"], 3)
    assert [bytes(row.tolist()) for row in found.x] == [b"abc", b"d\n\n"]
    assert [bytes(row.tolist()) for row in found.y] == [b"bcd", b"\n\ne"]
    spread = corpus.next_bytes(["abcdefghi"], 2, most=2)  # of four: the first and the third
    assert [bytes(row.tolist()) for row in spread.x] == [b"ab", b"ef"]
    with pytest.raises(DataError, match="9 bytes of text, 5 examples of 2 are wanted"):
        corpus.next_bytes(["abcdefghi"], 2, most=5)


def test_texts_are_divided_among_people_the_same_every_time(tmp_path: Path, monkeypatch, capsys):
    library = tmp_path / "lib"
    for topic in ("one", "two"):
        (library / topic).mkdir(parents=True)
        for number in range(5):
            (library / topic / f"{number}.py").write_text(PROGRAM * 4)
    monkeypatch.setattr(corpus, "TOPICS", ("one", "two", "three"))
    monkeypatch.setattr(corpus, "PROSE", ())
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    texts = ["texts", "--length", "8", "--examples", "20", "--test-examples", "5", "--people", "3"]
    for name in ("first", "second"):
        assert main([*texts, "--out", str(tmp_path / name)]) == 0
    assert "this Python has no three" in capsys.readouterr().out
    _, train, test = load(str(tmp_path / "first" / "code"))
    assert test is not None
    assert (train.x.shape, test.x.shape) == ((40, 8), (10, 8))
    assert (train.task, train.vocabulary, train.num_classes) == ("tokens", 256, 256)
    assert train.subject is not None
    assert set(train.subject.tolist()) == {0, 1, 2}
    again = load(str(tmp_path / "second" / "code"))[1].subject
    np.testing.assert_array_equal(train.subject, again)


def test_some_classes_become_a_data_set_of_their_own(tmp_path: Path, capsys):
    y = np.arange(12) % 4
    names = ("ant", "bee", "cat", "dog")
    examples = Examples(y[:, None].astype(np.float32) / 4, y, 4, class_names=names)
    for part in ("train", "test"):
        save_shard(tmp_path / f"{part}.npz", examples)
    chosen = ["classes", "--data", str(tmp_path), "--out", str(tmp_path / "chosen")]
    assert main([*chosen, "--from", "1", "--to", "2"]) == 0
    _, train, test = load(str(tmp_path / "chosen"))
    assert test is not None
    assert (train.num_classes, train.class_names) == (2, ("bee", "cat"))
    assert train.y.tolist() == [0, 1] * 3
    assert train.x.ravel().tolist() == [0.25, 0.5] * 3
    assert main([*chosen, "--from", "2", "--to", "4"]) == 1
    assert "--from 2 --to 4, expected two of the classes 0 to 3" in capsys.readouterr().err
    tokens = Examples(np.zeros((3, 2), np.int64), np.zeros((3, 2), np.int64), 4, task="tokens")
    with pytest.raises(ConfigError, match="the data are for tokens; give data of classes"):
        corpus.of_classes(tokens, 0, 1)


def test_a_row_names_files_by_what_data_gives(tmp_path: Path, capsys):
    grid = ["run", "--grid", "adapt-texts", "--only", "small-full", "--dry-run"]
    grid += ["--out", str(tmp_path), "--data", "code=digits"]
    assert main([*grid, "--data", f"runs={tmp_path}"]) == 0
    assert f"--init {tmp_path}/small/model.safetensors " in capsys.readouterr().out
    assert main(grid) == 1
    said = "a row has @runs/small/model.safetensors; give --data runs=FOLDER"
    assert said in capsys.readouterr().err


def test_a_device_is_measured_by_a_job_of_its_own(tmp_path: Path, capsys):
    """It moves what the run's clients moved, but for a few bytes between tensors."""
    cell = ["run", "--grid", "digits", "--regimes", "even", "--only", "fedavg-l", "--rounds", "1"]
    cell += ["--extra", "--examples 500 --test-examples 50 --epochs 1 --option channels=2,3,4"]
    assert main([*cell, "--out", str(tmp_path)]) == 0
    assert main(["peaks", "--out", str(tmp_path), "--only", "lora"]) == 1
    assert "there is no row lora; known: fedavg-l" in capsys.readouterr().err
    assert main(["peaks", "--out", str(tmp_path)]) == 0
    head, line = (tmp_path / "peaks.csv").read_text().splitlines()[1:]
    row = dict(zip(head.split(","), line.split(","), strict=True))
    result = json.loads((tmp_path / "digits-even-0.5-fedavg-l-s0.json").read_text())
    moved = result["rounds"][0]["bytes_up"] / result["rounds"][0]["returned"]
    assert row["label"] == "fedavg-l"
    assert float(row["up"]) * 1e6 == pytest.approx(moved, rel=0.01)
    assert float(row["measured"]) > 0


def test_rows_are_compared_seed_by_seed(tmp_path: Path):
    """lora is 1 and 3 better than full: 2 with half an interval of t(1) * sd / sqrt(2) = 12.7."""
    places = {"data": "code", "regime": "two", "alpha": "subject"}
    last = {"round": 2, "returned": 4, "bytes_up": 8e6, "bytes_down": 4e6, "seconds": {"train": 3}}
    for label, perplexities in {"full": (9.0, 7.0), "lora": (8.0, 4.0)}.items():
        for seed, perplexity in enumerate(perplexities):
            cell = {"grid": "g", "label": label, **places, "seed": seed}
            record = {"cell": cell, "command": "", "commit": "c", "machine": "m"}
            name = f"code-two-subject-{label}-s{seed}"
            (tmp_path / f"{name}.record.json").write_text(json.dumps(record))
            figures = {"small.perplexity": perplexity, "personal_accuracy": 0.5}
            content = {"rounds": [last | {"perplexity": [1.0], "figures": figures}]}
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert main(["compare", "--out", str(tmp_path), "--base", "full"]) == 0
    head, full, lora = (tmp_path / "compare.csv").read_text().splitlines()[1:]
    rows = [dict(zip(head.split(","), line.split(","), strict=True)) for line in (full, lora)]
    assert [row["small ppl"] for row in rows] == ["8.0", "6.0"]
    assert [row["small ppl_minus_base"] for row in rows] == ["", "-2.0"]
    assert float(rows[1]["small ppl_minus_base_95"]) == pytest.approx(12.7062, rel=1e-4)
    assert [rows[1][name] for name in ("own", "MB up", "MB down", "s")] == [
        "50.0",
        "2.0",
        "1.0",
        "3.0",
    ]
    text = (tmp_path / "compare.md").read_text()
    assert "| lora | 2     | 6.00 ±25.41 | -2.00 ±12.71" in text
