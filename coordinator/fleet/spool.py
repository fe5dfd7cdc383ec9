"""Updates on disk from their first part until their round is final, so that memory does not grow
with their number and a coordinator that is killed keeps those that had arrived.

Of each: ROUND-CLIENT.data, the stream as it comes in; ROUND-CLIENT.json, written when it is whole
and checked; of a job that outlives its round .seat, and .base, what it began from: where the file
system has hard links, one file for all who began from the same. Nothing is synced: what a power cut
leaves is held against its digest. Grows to what the participants of the largest round send, and one
model for every round that late ones began in, until the run's end.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakKeyDictionary

import msgspec
import torch
from torch import Tensor

from coordinator.cohorts.base import ArrivedUpdate, Client
from coordinator.store.lock import writing
from edge_sdk.errors import EdgeError
from edge_sdk.helpers.files import write_whole
from edge_sdk.protocol.fields import Struct
from edge_sdk.protocol.messages import Job, TensorSpec
from edge_sdk.protocol.stream import PART_BYTES, digest_of, layout
from edge_sdk.protocol.tensors import Sender, Tensors, views

log = logging.getLogger(__name__)


class SavedJob(Struct, frozen=True, kw_only=True):
    """A job whose round is over, and whose update still counts: nobody gives it again. base: digest
    of what it began from. outlives: it is waited for beyond its round; else it is late."""

    client: Client
    job: Job
    returns: tuple[TensorSpec, ...]
    base: str
    outlives: bool


class PartFile:
    """Storage of one transfer. Mapped when it is whole: pages come and go with use."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path, self._num_bytes = path, num_bytes
        with _opened(path, os.O_CREAT) as file:
            os.ftruncate(file, num_bytes)

    def write(self, start: int, payload: memoryview | bytes) -> None:
        with _opened(self._path) as file:
            written = 0
            while written < len(payload):  # a full disk takes some, then nothing
                written += os.pwrite(file, payload[written:], start + written)

    def whole(self) -> Tensor:
        with writing(self._path):
            return _mapped(self._path, self._num_bytes)


class Spool:
    """The folder of a run's updates. Every failure to write is a StoreError that ends the run
    before anything is lost."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self._free = sorted(folder.glob("free-*"))
        self._digests: WeakKeyDictionary[Sender, str] = WeakKeyDictionary()
        self._bases: WeakKeyDictionary[Sender, Path] = WeakKeyDictionary()  # a file of each

    def storage(self, round: int, client: str) -> Callable[[int], PartFile]:
        """Makes, for a Receiver, the file that this client's update of this round goes to."""

        def make(num_bytes: int) -> PartFile:
            path = self._path(round, client, "data")
            if self._free and not path.exists():
                with writing(path):
                    os.replace(self._free.pop(), path)
            return PartFile(path, num_bytes)

        return make

    def save_update(self, round: int, client: str, arrived: ArrivedUpdate) -> None:
        """The stream is whole and good: it need not be sent again."""
        _put(self._path(round, client, "json"), arrived)

    def save_job(
        self,
        client: Client,
        job: Job,
        returns: tuple[TensorSpec, ...],
        sender: Sender,
        *,
        outlives: bool,
    ) -> None:
        """Keep a job that goes on after its round. sender: of the tensors that it began from."""
        base = self._path(job.round, client.id, "base")
        digest = self._digests.get(sender) or self._digests.setdefault(sender, sender.digest())
        same = self._bases.get(sender)
        if same != base:
            for other in [other for other, path in self._bases.items() if path == base]:
                del self._bases[other]
        with writing(base):
            self._write_base(base, same, sender)
        held = SavedJob(client=client, job=job, returns=returns, base=digest, outlives=outlives)
        _put(base.with_suffix(".seat"), held)

    def _write_base(self, base: Path, same: Path | None, sender: Sender) -> None:
        """same: the file that has these bytes already, if one has."""
        if same == base and base.exists():
            return
        base.unlink(missing_ok=True)  # never written over: others may share it
        with suppress(OSError):
            if same:
                os.link(same, base)
                return
        with base.open("wb") as file:
            file.writelines(sender.blocks())
        self._bases[sender] = base

    def adopt_job(self, held: SavedJob, sender: Sender) -> None:
        """Take the files of a job that saved_jobs() has found for those of this sender's tensors,
        from which it began: when the job is saved again, they are not written again."""
        self._digests[sender] = held.base
        self._bases[sender] = self._path(held.job.round, held.client.id, "base")

    def take_update(
        self, round: int, client: str, job: str
    ) -> tuple[ArrivedUpdate, Tensors] | None:
        """The update of this very job that had arrived whole before the coordinator was killed."""
        found = self._read(self._path(round, client, "json"))
        return found if found and found[0].update.job == job else None

    def saved_jobs(self, round: int) -> Iterator[tuple[SavedJob, Tensors]]:
        """Jobs of rounds before this one that are still in hand or whose updates are here, oldest
        first, and what each began from."""
        checked: set[tuple[int, str]] = set()  # inode and digest of those that are shared
        for path in sorted(self.folder.glob("*.seat")):
            if path.name >= f"{round:010d}":
                continue
            base = path.with_suffix(".base")
            try:
                held = msgspec.json.decode(path.read_bytes(), type=SavedJob)
                key = base.stat().st_ino, held.base
                tensors = _stream(base, held.job.tensors, "" if key in checked else held.base)
                checked.add(key)
                yield held, tensors
            except (OSError, RuntimeError, EdgeError, msgspec.MsgspecError) as error:
                log.warning("%s is left out, and its update: %s", path, error)

    def _read(self, path: Path) -> tuple[ArrivedUpdate, Tensors] | None:
        try:
            arrived = msgspec.json.decode(path.read_bytes(), type=ArrivedUpdate)
            data = path.with_suffix(".data")
            return arrived, _stream(data, arrived.update.tensors, arrived.update.digest)
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError, EdgeError, msgspec.MsgspecError) as error:
            log.warning("%s is left out: %s", path, error)
            return None

    def delete(self, round: int, client: str) -> None:
        """Delete the update of this client and round, and its job: neither counts any more."""
        for ending in ("json", "seat", "base", "data"):  # in this order: it counts no more
            with suppress(OSError):
                self._path(round, client, ending).unlink()

    def delete_before(self, round: int, wanted: set[tuple[int, str]]) -> None:
        """Free every update of rounds before this one, but for these, by round and client. Their
        files are written over by the next: that is several times quicker than new ones."""
        names = {self._path(*key, "data").stem for key in wanted}
        for path in sorted(self.folder.iterdir(), reverse=True):  # x.json before x.data
            if path.stem in names or path.name >= f"{round:010d}":
                continue
            with suppress(OSError):
                if path.suffix != ".data":
                    path.unlink()
                    continue
                free = self.folder / f"free-{path.name}"
                os.replace(path, free)
                self._free.append(free)

    def clear(self) -> None:
        """Delete everything: the run is over."""
        with suppress(OSError):
            for path in self.folder.iterdir():
                path.unlink(missing_ok=True)

    def _path(self, round: int, client: str, ending: str) -> Path:
        return self.folder / f"{round:010d}-{client}.{ending}"


def _put(path: Path, what: Struct) -> None:
    """Write the file whole or not at all."""
    with writing(path):
        write_whole(path, msgspec.json.encode(what), is_synced=False)


def _stream(path: Path, specs: tuple[TensorSpec, ...], digest: str) -> Tensors:
    """The tensors in this file, whose bytes have this digest; "" if that was checked before. Raises
    OSError if they are not there, RuntimeError, ProtocolError."""
    size = layout(specs)[1]
    if path.stat().st_size != size:
        raise OSError(f"{path} is not of {size} bytes")
    with path.open("rb") as file:
        if digest and digest_of(iter(lambda: file.read(PART_BYTES), b"")) != digest:
            raise OSError(f"{path} is damaged")
    return views(specs, _mapped(path, size))


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    """The file, open for this act alone: one descriptor for every upload would be too many."""
    with writing(path):
        file = os.open(path, os.O_WRONLY | flags, 0o600)
        try:
            yield file
        finally:
            os.close(file)


def _mapped(path: Path, num_bytes: int) -> Tensor:
    if not num_bytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.from_file(str(path), shared=False, size=num_bytes, dtype=torch.uint8)
