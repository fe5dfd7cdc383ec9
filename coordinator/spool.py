"""Updates on disk from their first part until their round is final, so that memory does not grow
with their number and a coordinator that is killed keeps those that had arrived.

Of each: ROUND-CLIENT.data, the stream as it comes in; ROUND-CLIENT.json, written when it is whole
and checked. Nothing is synced: a power cut may leave a stream that is not its digest's, which is
asked for again. Grows with what a round's participants send; deleted as rounds become final.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from edge_sdk.errors import StoreError
from edge_sdk.tensors import Tensors, views
from edge_sdk.wire import PART_BYTES, Struct, Update, digest_of, layout

log = logging.getLogger(__name__)
T = TypeVar("T")


class Arrived(Struct, frozen=True, kw_only=True):
    """What is kept beside the tensors of a whole update."""

    update: Update
    upload_s: float
    bytes_down: int
    bytes_up: int


class PartFile:
    """Storage of one transfer. Mapped when it is whole: pages come and go with use."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path, self._num_bytes = path, num_bytes
        _checked(path, lambda: _opened(path, os.O_CREAT | os.O_TRUNC, lambda file: None))

    def write(self, start: int, payload: memoryview | bytes) -> None:
        def put(file: int) -> None:
            written = 0
            while written < len(payload):  # a full disk takes some, then nothing
                written += os.pwrite(file, payload[written:], start + written)

        _checked(self._path, lambda: _opened(self._path, 0, put))

    def whole(self) -> Tensor:
        if not self._num_bytes:
            return torch.empty(0, dtype=torch.uint8)
        return _checked(self._path, lambda: _mapped(self._path, self._num_bytes))


class Spool:
    """The folder of a run's updates. Every failure to write is a StoreError that ends the run
    before anything is lost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _checked(folder, lambda: folder.mkdir(parents=True, exist_ok=True))

    def storage(self, round: int, client: str) -> Callable[[int], PartFile]:
        """For a Receiver: where this client's update of this round goes."""
        return lambda num_bytes: PartFile(self._path(round, client, "data"), num_bytes)

    def keep(self, round: int, client: str, arrived: Arrived) -> None:
        """The stream is whole and good: it need not be sent again."""
        path = self._path(round, client, "json")
        draft = path.with_suffix(".new")

        def put() -> None:
            draft.write_bytes(msgspec.json.encode(arrived))
            os.replace(draft, path)

        _checked(path, put)

    def take(self, round: int, client: str, job: str) -> tuple[Arrived, Tensors] | None:
        """A whole update of this very job from before the coordinator was killed."""
        path, data = self._path(round, client, "json"), self._path(round, client, "data")
        try:
            arrived = msgspec.json.decode(path.read_bytes(), type=Arrived)
            size = layout(arrived.update.tensors)[1]
            if arrived.update.job != job or data.stat().st_size != size:
                return None
            with data.open("rb") as file:
                digest = digest_of(iter(lambda: file.read(PART_BYTES), b""))
            if digest != arrived.update.digest:
                log.warning("%s is damaged; it is asked for again", data)
                return None
            stream = _mapped(data, size) if size else torch.empty(0, dtype=torch.uint8)
        except (OSError, msgspec.MsgspecError):
            return None
        return arrived, views(arrived.update.tensors, stream)

    def forget(self, round: int, client: str) -> None:
        """Nobody needs this one any more."""
        for ending in ("json", "new", "data"):  # the data last: without json it counts as nothing
            with suppress(OSError):
                self._path(round, client, ending).unlink()

    def forget_before(self, round: int, wanted: set[tuple[int, str]]) -> None:
        """Delete every update of rounds before this one, but for these, by round and client."""
        names = {self._path(*key, "data").stem for key in wanted}
        with suppress(OSError):
            for path in self.folder.iterdir():
                if path.stem not in names and path.name < f"{round:010d}":
                    path.unlink(missing_ok=True)

    def _path(self, round: int, client: str, ending: str) -> Path:
        return self.folder / f"{round:010d}-{client}.{ending}"


def _opened(path: Path, flags: int, act: Callable[[int], None]) -> None:
    """Open and close: a file descriptor for every upload under way would be too many."""
    file = os.open(path, os.O_WRONLY | flags, 0o600)
    try:
        act(file)
    finally:
        os.close(file)


def _mapped(path: Path, num_bytes: int) -> Tensor:
    return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)


def _checked(path: Path, act: Callable[[], T]) -> T:
    try:
        return act()
    except (OSError, RuntimeError) as error:
        raise StoreError(
            f"{path} cannot be written: {error}; free space or make it writable; go on with "
            "--resume"
        ) from error
