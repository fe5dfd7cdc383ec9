"""What every reader in the table keeps to, on small files in its true format.

A new reader fails here until SAMPLES has a writer of such files and docs/data.md names it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edge_sdk.data.contract import laid_out
from edge_sdk.data.examples import check_examples
from edge_sdk.data.loading import load, load_shard, load_test, save_shard
from edge_sdk.data.readers.table import FILE_SETS, FileSet, known
from edge_sdk.errors import DataError
from tests.support.data_files import (
    LABELS,
    PIXELS,
    broken_copies,
    fails,
    later_unimib,
    write_idx,
    write_npz,
)
from tests.support.own_files import (
    write_csv,
    write_images,
    write_jsonl,
    write_sounds,
    write_text,
    write_texts,
)
from tests.support.processes import ROOT
from tests.support.published import (
    write_cifar_10,
    write_cifar_10_python,
    write_cifar_100,
    write_cifar_100_python,
    write_stl,
    write_svhn,
)

# By a row's first file: writes its train part into a folder and gives the path of that file.
SAMPLES: dict[str, Callable[[Path], Path]] = {
    "train-images-idx3-ubyte": lambda folder: write_idx(folder, "train", PIXELS, LABELS),
    "train.npz": lambda folder: Path(write_npz(folder / "train.npz", x=PIXELS, y=LABELS)),
    "fall_data.mat": lambda folder: later_unimib(folder, "fall"),
    "adl_data.mat": lambda folder: later_unimib(folder, "adl"),
    "acc_data.mat": lambda folder: later_unimib(folder, "acc"),
    "train_32x32.mat": lambda folder: write_svhn(folder / "train_32x32.mat"),
    "train_X.bin": lambda folder: write_stl(folder, "train"),
    "data_batch_1.bin": write_cifar_10,
    "data_batch_1": write_cifar_10_python,
    "train.bin": write_cifar_100,
    "train": write_cifar_100_python,
    "train.csv": lambda folder: write_csv(folder / "train.csv"),
    "train.txt": lambda folder: write_text(folder / "train.txt", "the cat sat . " * 9),
    "train.jsonl": lambda folder: write_jsonl(folder / "train.jsonl"),
}
# By the first ending of a row's files in folders by class: writes them there, and gives one.
BY_CLASS: dict[str, Callable[[Path], Path]] = {
    ".png": write_images,
    ".wav": write_sounds,
    ".txt": write_texts,
}
OF_FILES = [row for row in FILE_SETS if row.train]
OF_CLASSES = [row for row in FILE_SETS if row.by_class]


def of_each_row(rows: list[FileSet]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=key)


def key(row: FileSet) -> str:
    return (row.train or row.by_class or (row.name,))[0]


@of_each_row(OF_FILES + OF_CLASSES)
def test_there_is_a_sample(row):
    where = "SAMPLES" if row.train else "BY_CLASS"
    assert key(row) in SAMPLES | BY_CLASS, f"write a small {key(row)} for {where} of this file"


@of_each_row(FILE_SETS)
def test_the_documents_name_it(row):
    page = ROOT / "docs" / "data.md"
    text = page.read_text().lower() if page.exists() else row.name
    assert any(name.lower() in text for name in (row.name, *row.train)), f"name it in {page}"


@of_each_row(FILE_SETS)
def test_an_unknown_source_is_answered_with_its_name(row):
    fails(lambda: load("no such source"), key(row))
    assert row.name in known()


def test_no_file_belongs_to_two():
    names = [name for row in FILE_SETS for name in (*row.train, *row.test, *row.alone)]
    assert len(names) == len(set(names))


@of_each_row(OF_FILES)
def test_a_folder_and_its_first_file_give_the_same_examples(tmp_path, row):
    path = SAMPLES[row.train[0]](tmp_path)
    name, examples, _ = load(str(tmp_path))
    assert name == (tmp_path.name if row.title else row.name)
    check_examples(examples, "here")
    assert laid_out(examples.x.shape, None, "here") == examples.x.shape  # means one thing
    save_shard(tmp_path / "shard.npz", examples)
    again = load_shard(str(tmp_path / "shard.npz"))
    np.testing.assert_array_equal(again.x, examples.x)
    assert again.trained_on == examples.trained_on
    alone = load_shard(str(path))  # scaled by constants, never by what else there is
    np.testing.assert_array_equal(alone.x, examples.x[: len(alone)])
    np.testing.assert_array_equal(load_test(str(path)).y, alone.y)


@of_each_row(OF_FILES)
def test_corrupt_bytes_raise_nothing_but_data_errors(tmp_path, row):
    corrupt(SAMPLES[row.train[0]](tmp_path), read=None)


@of_each_row(OF_CLASSES)
def test_a_corrupt_file_of_a_class_raises_nothing_but_data_errors(tmp_path, row):
    corrupt(BY_CLASS[row.by_class[0]](tmp_path), read=tmp_path)


@of_each_row(OF_CLASSES)
def test_a_folder_of_classes_comes_back_from_a_shard(tmp_path, row):
    BY_CLASS[row.by_class[0]](tmp_path / "all")
    name, examples, test = load(str(tmp_path / "all"))
    assert (name, test, examples.class_names) == ("all", None, ("cat", "dog"))
    save_shard(tmp_path / "shard.npz", examples)
    again = load_shard(str(tmp_path / "shard.npz"))
    np.testing.assert_array_equal(again.x, examples.x)
    assert again.trained_on == examples.trained_on
    for part in ("train", "test"):
        BY_CLASS[row.by_class[0]](tmp_path / "parts" / part)
    _, train, test = load(str(tmp_path / "parts"))
    np.testing.assert_array_equal(train.x, test.x)
    np.testing.assert_array_equal(train.x, examples.x)


def corrupt(path: Path, read: Path | None) -> None:
    """Spoil the file in many ways and read it, or the folder that holds it."""
    raw = path.read_bytes()
    cut = [raw[: len(raw) * part // 8] for part in range(8)]
    head = [
        raw[:at] + bytes([value]) + raw[at + 1 :]
        for at in range(min(200, len(raw)))
        for value in (0, 255)
    ]
    messages = []
    for changed in [*cut, *broken_copies(raw, 40), *head]:
        path.write_bytes(changed)
        try:
            load_shard(str(read or path))  # a changed pixel is not noticed, and need not be
        except DataError as error:
            messages.append(str(error))
    assert len(messages) >= 39  # all that were cut short; one cut may fall between two records
    assert not any("\n" in message for message in messages)


@of_each_row(OF_FILES)
def test_a_missing_file_is_named(tmp_path, row):
    path = SAMPLES[row.train[0]](tmp_path)
    path.unlink()
    fails(lambda: load(str(path)), str(path), "no such file")
