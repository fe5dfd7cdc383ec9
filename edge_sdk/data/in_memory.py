"""A program's own arrays or Dataset, handed to the trainer as a private file.

The trainer is another process, and may be started again after it died for memory, so it reads
a shard from the disk, as `--data` gives it one. A Dataset is read item by item to a file, not
into an array: the program never holds it as a whole."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import numpy.typing as npt

from edge_sdk.data.bounded import shown
from edge_sdk.data.contract import bad, checked_names, label_of, laid_out
from edge_sdk.data.examples import MIN_BATCH, Examples, check_enough, mapped
from edge_sdk.data.loading import save_shard
from edge_sdk.data.plain_arrays import MASK_STEP, checked_inputs, masked, plain
from edge_sdk.data.readers.arrays import checked_arrays
from edge_sdk.protocol.fields import Task

log = logging.getLogger(__name__)
LOOKED_AT = 8  # items read twice; a flip of every second one escapes once in 256 times
EXPECTED = "a path, (x, y) arrays, or a Dataset with a length, of pairs of a tensor and an int"


@runtime_checkable
class Dataset(Protocol):
    """As torch's map-style ones: pairs of an input and its label, by index."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


Source: TypeAlias = Examples | Dataset


@dataclass(frozen=True)
class About:
    """What arrays or a Dataset do not say themselves. layout: one of contract.LAYOUTS, where the
    axes could mean two things; class_names: in the order of the labels; vocabulary: of token ids,
    0: x are numbers."""

    layout: str | None = None
    class_names: Sequence[str] = ()
    task: Task = "classify"
    vocabulary: int = 0

    def given(self) -> dict[str, object]:
        """By the names of arrays in a file."""
        names = checked_names(self.class_names, "class_names")
        layout = {} if self.layout is None else {"layout": np.array(self.layout)}
        said = {"task": np.array(self.task), "vocabulary": np.array(self.vocabulary)}
        return layout | said | ({"class_names": np.array(names)} if names else {})


NOTHING = About()


def checked_source(data: object, about: About = NOTHING) -> Source:
    """Arrays checked whole; of a Dataset its length, the rest when it is read. Raises DataError."""
    if isinstance(data, tuple):
        if len(data) != 2:
            raise bad("data", f"a tuple of {len(data)}", "(x, y)", "give inputs and labels")
        given = {"x": data[0], "y": data[1], **about.given()}
        return check_enough(checked_arrays(given, "data"), "data")
    if isinstance(data, Mapping):  # also np.load of an .npz
        step = 'give the tuple (data["x"], data["y"]), or the path of an .npz'
        raise bad("data", f"{type(data).__name__} of {shown(map(str, data))}", EXPECTED, step)
    if isinstance(data, np.ndarray | str | bytes) or not isinstance(data, Dataset):
        raise bad("data", type(data).__name__, EXPECTED, "give one of them")
    if isinstance(data, list) and len(data) == 2:
        got, step = "a list of 2", "give inputs and labels as the tuple (x, y)"
        raise bad("data", got, EXPECTED, step)
    with mapped("data", EXPECTED, "give one of them"):
        length = len(data)
    if length < MIN_BATCH:
        raise bad("data", f"a length of {length}", f"at least {MIN_BATCH} examples", "add data")
    return data


@contextmanager
def shard_of(source: Source, about: About | None = None) -> Iterator[str]:
    """The path of the shard, mode 0600 in a folder of mode 0700 under tempfile.gettempdir(); gone
    afterwards. Raises DataError."""
    with mapped(tempfile.gettempdir(), "a folder to write to", "set TMPDIR to another", to="write"):
        folder = tempfile.TemporaryDirectory(prefix="edge-sdk-")
    with folder as name:
        path = Path(name) / "shard.npz"
        if isinstance(source, Examples):
            save_shard(path, source)
        else:
            items = Path(name) / "items"
            save_shard(path, _gathered(source, items, about or NOTHING))
            items.unlink()
        path.chmod(0o600)
        yield str(path)


def _gathered(dataset: Dataset, file: Path, about: About = NOTHING) -> Examples:
    """The Dataset's items, their inputs one after another in `file`."""
    labels = _empty_labels(dataset, about)
    first = _item(dataset, 0, labels, about)
    if not about.vocabulary:  # before all of it is read
        laid_out((len(labels), *first.shape), about.layout, "data")
    _tell_random(dataset, labels, about)
    advice = "free space, or set TMPDIR"
    with mapped(file, "to write the data", advice, to="write"), file.open("wb") as stream:
        for index in range(len(labels)):
            x = _item(dataset, index, labels, about)
            if (x.shape, x.dtype) != (first.shape, first.dtype):
                wanted = f"{first.shape} of {first.dtype} as data[0]"
                raise bad(f"data[{index}]", f"{x.shape} of {x.dtype}", wanted)
            stream.write(x.tobytes())
    x = np.memmap(file, first.dtype, "r", shape=(len(labels), *first.shape))
    return checked_arrays({"x": x, "y": labels, **about.given()}, "data")


def _empty_labels(dataset: Dataset, about: About) -> npt.NDArray[Any]:
    """For the labels of all items, shaped as the first one."""
    if about.task == "classify":
        return np.empty(len(dataset), np.int64)
    with mapped("data[0]", EXPECTED, "correct the Dataset"):
        label = plain(dataset[0][1], "a label", "data[0]")
    return np.empty((len(dataset), *label.shape), label.dtype)


def _tell_random(dataset: Dataset, labels: npt.NDArray[Any], about: About) -> None:
    """Warn of items that differ from one reading to the next: each is read once, so what they draw
    at random stays."""
    for index in range(min(LOOKED_AT, len(dataset))):
        once, again = (_item(dataset, index, labels, about) for _ in range(2))
        if once.shape == again.shape and not np.array_equal(once, again, equal_nan=True):
            log.warning(
                "data[%d] is another each time that it is read, and it is read once, before "
                "training: what it draws at random stays; draw in training by augment=",
                index,
            )
            return


@np.errstate(all="ignore")  # what becomes infinite is found by checked_arrays
def _item(dataset: Dataset, index: int, labels: npt.NDArray[Any], about: About) -> npt.NDArray[Any]:
    """One input, floats as float32; its label is written to `labels`."""
    where = f"data[{index}]"
    with mapped(where, "a pair of a tensor and an int", "correct the Dataset"):
        item = dataset[index]
        if isinstance(item, Mapping):
            step = "give the pair of its input and its label from __getitem__"
            got = f"a {type(item).__name__} of {shown(map(str, item))}"
            raise bad(where, got, "a pair of a tensor and an int", step)
        value, label = item
    for name, part in (("input", value), ("label", label)):
        if masked(part):
            raise bad(where, f"a masked {name}", "no masked value", MASK_STEP)
    x = checked_inputs(plain(value, "an input", where), where, "an input", about.vocabulary)
    if not x.size:
        raise bad(where, f"an empty input of shape {x.shape}", "(C, H, W), (C, window) or (F,)")
    if about.task == "classify":
        with mapped(where, "a label of 64 bits"):
            labels[index] = label_of(label, about.class_names, where)
    else:
        one = plain(label, "a label", where)
        if one.shape != labels.shape[1:]:
            raise bad(where, f"a label of shape {one.shape}", f"{labels.shape[1:]} as data[0]")
        labels[index] = one
    if about.vocabulary:
        return x.astype(np.int64)
    return x if x.dtype == np.uint8 else x.astype(np.float32)
