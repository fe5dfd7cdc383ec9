"""Updates on disk from their first part until their round is final, so that memory does not grow
with their number and a coordinator that is killed keeps those that had arrived.

Of each: ROUND-CLIENT.data, the stream as it comes in; ROUND-CLIENT.json, written when it is whole
and checked. Nothing is synced: a power cut may leave a stream that is not its digest's, which is
asked for again. Grows to what the participants of the largest round send, until the run's end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec
import torch
from torch import Tensor

from coordinator.cohort import Client
from edge_sdk.errors import StoreError
from edge_sdk.tensors import Sender, Tensors, views
from edge_sdk.wire import PART_BYTES, Segment, Struct, Update, digest_of, layout

log = logging.getLogger(__name__)
T = TypeVar("T")


class Arrived(Struct, frozen=True, kw_only=True):
    """What is kept beside the tensors of a whole update. client: of a late one, whose round is over
    and whose job nobody gives again."""

    update: Update
    segments: tuple[Segment, ...]
    client: Client | None = None
    upload_s: float
    bytes_down: int
    bytes_up: int


class PartFile:
    """Storage of one transfer. Mapped when it is whole: pages come and go with use."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path, self._num_bytes = path, num_bytes
        _checked(
            path, lambda: _opened(path, os.O_CREAT, lambda file: os.ftruncate(file, num_bytes))
        )

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
        self._free = sorted(folder.glob("free-*"))

    def storage(self, round: int, client: str) -> Callable[[int], PartFile]:
        """For a Receiver: where this client's update of this round goes."""

        def make(num_bytes: int) -> PartFile:
            path = self._path(round, client, "data")
            if self._free and not path.exists():
                _checked(path, lambda: os.replace(self._free.pop(), path))
            return PartFile(path, num_bytes)

        return make

    def keep(self, round: int, client: str, arrived: Arrived, sent: Tensors) -> None:
        """The stream is whole and good: it need not be sent again. sent: what the job began from,
        kept for a late one."""
        path = self._path(round, client, "json")
        draft = path.with_suffix(".new")

        def put() -> None:
            if arrived.client is not None:
                base = Sender({spec.name: sent[spec.name] for spec in arrived.update.tensors})
                with self._path(round, client, "base").open("wb") as file:
                    file.writelines(base.part(index) for index in range(base.num_parts))
            draft.write_bytes(msgspec.json.encode(arrived))
            os.replace(draft, path)

        _checked(path, put)

    def take(self, round: int, client: str, job: str) -> tuple[Arrived, Tensors] | None:
        """A whole update of this very job from before the coordinator was killed."""
        found = self._read(self._path(round, client, "json"))
        return found if found and found[0].update.job == job else None

    def late(self, round: int) -> Iterator[tuple[Arrived, Tensors, Tensors]]:
        """Whole late updates of rounds before this one, and what each began from."""
        for path in sorted(self.folder.glob("*.json")):
            found = self._read(path) if path.name < f"{round:010d}" else None
            if found is None or found[0].client is None:
                continue
            base = path.with_suffix(".base")
            try:
                sent = views(found[0].update.tensors, _mapped(base, base.stat().st_size))
            except (OSError, RuntimeError) as error:
                log.warning("%s cannot be read, so its update is left out: %s", base, error)
                continue
            yield *found, sent

    def _read(self, path: Path) -> tuple[Arrived, Tensors] | None:
        data = path.with_suffix(".data")
        try:
            arrived = msgspec.json.decode(path.read_bytes(), type=Arrived)
            size = layout(arrived.update.tensors)[1]
            if data.stat().st_size != size:
                return None
            with data.open("rb") as file:
                digest = digest_of(iter(lambda: file.read(PART_BYTES), b""))
            if digest != arrived.update.digest:
                log.warning("%s is damaged and left out", data)
                return None
            stream = _mapped(data, size) if size else torch.empty(0, dtype=torch.uint8)
        except (OSError, msgspec.MsgspecError):
            return None
        return arrived, views(arrived.update.tensors, stream)

    def forget(self, round: int, client: str) -> None:
        """Nobody needs this one any more."""
        for ending in (
            "json",
            "new",
            "base",
            "data",
        ):  # the data last: without json it counts as nothing
            with suppress(OSError):
                self._path(round, client, ending).unlink()

    def forget_before(self, round: int, wanted: set[tuple[int, str]]) -> None:
        """Free every update of rounds before this one, but for these, by round and client. Their
        files are written over by the next: that is several times quicker than new ones."""
        names = {self._path(*key, "data").stem for key in wanted}
        with suppress(OSError):
            for path in sorted(self.folder.iterdir(), reverse=True):  # x.json before x.data
                if path.stem in names or path.name >= f"{round:010d}":
                    continue
                if path.suffix != ".data":
                    path.unlink(missing_ok=True)
                    continue
                free = self.folder / f"free-{path.name}"
                os.replace(path, free)
                self._free.append(free)

    def clear(self) -> None:
        """The run is over."""
        with suppress(OSError):
            for path in self.folder.iterdir():
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
