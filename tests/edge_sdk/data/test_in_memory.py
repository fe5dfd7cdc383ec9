"""Data and other arguments of an `edge_sdk.Client`: checked before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from edge_sdk.data import in_memory
from edge_sdk.data.in_memory import checked_source, shard_of
from edge_sdk.data.loading import load_shard
from edge_sdk.errors import ConfigError, DataError, EdgeError
from tests.support.client_program import NOWHERE, X, Y, client, one_line
from tests.support.processes import PATIENCE_S, ROOT, environment

pytestmark = pytest.mark.usefixtures("shards_folder")


# -- data -----------------------------------------------------------------------------------------


class Items:
    """A Dataset of what it is given."""

    def __init__(self, *items: object) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> object:
        return self._items[index]


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


def test_dataset_and_arrays_make_the_same_shard():
    arrays, items = (X, Y), Items(*zip(torch.from_numpy(X), Y.tolist(), strict=True))
    for source in (arrays, items):
        with shard_of(checked_source(source)) as path:
            found = load_shard(path)
            assert [file.name for file in Path(path).parent.iterdir()] == ["shard.npz"]
        np.testing.assert_array_equal(found.x, X)
        np.testing.assert_array_equal(found.y, Y)
        assert found.num_classes == 3


def test_bytes_are_scaled_as_in_a_file():
    x = np.full((3, 1, 4, 4), 255, np.uint8)  # 255 / 127.5 - 1 = 1
    for source in ((x, np.arange(3)), Items(*zip(x, range(3), strict=True))):
        with shard_of(checked_source(source)) as path:
            found = load_shard(path)
        assert found.x.shape == (3, 1, 4, 4)
        assert (found.x == 1).all()


def spoilt(value: float) -> np.ndarray:
    x = X.copy()
    x[5, 0, 1, 1] = value
    return x


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ((X, Y, Y), "a tuple of 3"),
        (X, "got ndarray, expected a path, (x, y) arrays, or a Dataset"),
        (None, "got NoneType"),
        ({"x": X, "y": Y}, "got dict"),
        (Endless(), "got Endless, expected"),
        ((X[:, 0, 0, 0], Y), "x of shape (12,), expected (n, F), (n, C, window), (n, C, H, W)"),
        ((X.astype(int), Y), "x of dtype int64"),
        ((X, Y.astype(float)), "y of dtype float64, expected integers"),
        ((X, Y - 1), "labels from -1 to 1"),
        ((X, Y[:-1]), "y of shape (11,)"),
        ((spoilt(np.nan), Y), "first at 5"),
        ((spoilt(1.0).astype(float) * 1e300, Y), "NaN or infinite values in 12"),
        ((X[:0], Y[:0]), "empty data"),
        ((X.transpose(0, 2, 3, 1), Y), "give x.transpose(0, 3, 1, 2)"),
        ((X[:2], Y[:2]), "2 examples, at least 3"),
        (([[1.0], [1.0, 2.0]], [0, 0]), "got ValueError (setting an array element"),
        (Items(), "a length of 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_data_are_checked_before_anything_runs(data, said):
    with pytest.raises(DataError) as caught:
        client(data)
    assert said in one_line(caught.value)


@pytest.mark.parametrize(
    ("items", "said"),
    [
        ([(X[0], 0), (X[1], 1), (X[2, :, :4], 2)], "data[2]: got (1, 4, 8) of float32"),
        ([(X[0], 0), (X[1], 1), X[2]], "data[2]: got ValueError"),
        ([(X[0], 0), (X[1], 0.5), (X[2], 1)], "data[1]: got a label of type float"),
        ([(X[0], 0), (X[1], -1), (X[2], 1)], "labels from -1 to 1"),
        (
            [(X[0, 0, 0, 0], 0)] * 3,
            "x of shape (3,), expected (n, F), (n, C, window), (n, C, H, W)",
        ),
        ([(spoilt(np.inf)[5], 0)] * 3, "infinite values in 3 examples"),
        ([(X[0].astype(int), 0)] * 3, "data[0]: got an input of dtype int64"),
        ([(X[0, :0], 0)] * 3, "data[0]: got an empty input"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_items_are_checked_before_anything_runs(items, said):
    with pytest.raises(DataError) as caught:
        client(Items(*items)).run()
    assert said in one_line(caught.value)


class Noisy(Items):
    def __getitem__(self, index: int) -> object:
        x, y = self._items[index]
        return x + np.random.default_rng().normal(size=x.shape).astype(np.float32), y


def test_a_dataset_that_draws_at_random_is_told_of(caplog):
    pairs = [*zip(X, Y, strict=True)]
    with shard_of(checked_source(Items(*pairs))):
        assert not caplog.records
    with shard_of(checked_source(Noisy(*pairs))):
        assert "data[0] is another each time that it is read" in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize("names", [["a", "b", "c"], np.array(["a", "b", "c"]), ("a", "b", "c")])
def test_class_names_may_be_any_list(names):
    made = client((X, np.array(["a", "b", "c"])[Y]), class_names=names)
    assert made._data.y.tolist() == Y.tolist()
    with pytest.raises(DataError, match="class_names 'abc' of type str, expected a list of names"):
        client((X, Y), class_names="abc")
    with pytest.raises(ConfigError, match="put them into the file"):
        client("digits", class_names=names)


def test_a_full_disk_is_one_line():
    """Not SIGBUS, as it would be through a map of the file that is written."""
    items = checked_source(Items(*zip(X, Y, strict=True)))
    with pytest.raises(DataError, match=r"No space left on device.*free space, or set TMPDIR"):
        in_memory._gathered(items, Path("/dev/full"))


# -- the other arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"coordinator": "localhost:5555"},
            'coordinator: got "localhost:5555", expected the coordin',
        ),
        ({"coordinator": None}, "coordinator: got"),
        ({"id": "a b"}, 'id: got "a b", expected a name'),
        ({"memory_cap": "much"}, 'memory_cap: got "much"'),
        ({"threads": -1}, "threads: got -1, expected a number from 0"),
        ({"device": "meta"}, 'device: got "meta"'),
        ({"ignore_conditions": 1}, "ns: got 1, expected"),
        ({"imports": "my_models"}, 'imports: got "my_models", expected a list'),
        ({"imports": ["__main__"]}, "put the model family or function into a module of its own"),
        ({"augment": "flip"}, 'augment: got "flip", expected a function as MODULE:FUNCTION'),
        ({"augment": "a:b.c"}, "augment: got"),
        ({"augment": "no_such_module:flip"}, "augment: there is no module 'no_such_module'"),
        ({"augment": "__main__:flip"}, "augment: got '__main__', this program itself"),
        ({"data": "digits", "layout": "images"}, "put them into the file"),
        ({"imports": ["no_such_module_anywhere"]}, "no module 'no_such_module_anywhere'"),
        ({"imports": ["no_such_module.anywhere"]}, "no module 'no_such_module.anywhere'"),
        ({"insecure": False, "keys": "nowhere"}, "device.public cannot be read"),
    ],
    ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "",
)
def test_arguments_are_checked(options, said):
    with pytest.raises(ConfigError) as caught:
        client(**options)
    assert said in one_line(caught.value)


def test_an_augment_that_is_no_function_is_told_when_the_trainer_starts():
    with pytest.raises(EdgeError, match="augment 'tests.support.own:nothing': got nothing of that"):
        client(augment="tests.support.own:nothing").run()


def test_a_program_that_imports_itself_does_not_start_itself_for_ever(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import numpy as np\nfrom edge_sdk import Client\nx = np.zeros((3, 1, 4))\n"
        f"Client('{NOWHERE}', data=(x, np.arange(3)), insecure=True, imports=['program']).run()\n"
    )
    ended = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment("self") | {"PYTHONPATH": str(ROOT)},
        timeout=PATIENCE_S,
    )
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("edge_sdk.errors.TrainerError: a module of")
