"""What one client keeps between rounds for a plan that asks for it: control variates, initial
weights, statistics. Written whole and synced, and used only once the update that it went with was
accepted: a lost update, or a device killed at any moment, leaves nothing of a round that did not
count.

A job of round r begins from the newest accepted state of a round before r, so one that is given
again begins from the same. Kept are the KEPT newest accepted states of one run and one that waits
to be accepted, of at most `most_bytes` each: no more than that ever lies on the disk. What is saved
for another run removes those of the run before."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import torch

from edge_sdk.data.contract import ModelNote
from edge_sdk.errors import CapacityError, EdgeError, StoreError
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.helpers.files import replacing, sha256_of, sync, why_not
from edge_sdk.helpers.text import mebibytes, one_line
from edge_sdk.protocol.fields import Digest, Struct
from edge_sdk.protocol.messages import Specs
from edge_sdk.protocol.stream import layout
from edge_sdk.protocol.tensors import Sender, Tensors, views

log = logging.getLogger(__name__)
KEPT = 2  # accepted states: a coordinator that lost its last round gives that once more
MOST_BYTES = 1024**3  # of one state
MOST_HEAD_BYTES = 4 * 1024**2
FILE = re.compile(
    r"(?P<run>[0-9a-f]{16})-(?P<round>[0-9]+)(?:\.state|-(?P<job>[0-9a-f]*)\.waiting)"
)


class Place(NamedTuple):
    """One state, by the mark of its run. job: of a state that waits to be accepted, "" where jobs
    have no names; None: accepted."""

    run: str
    round: int
    job: str | None = None


class Shelf(Protocol):
    """Where states lie. What cannot be done raises OSError."""

    def places(self) -> list[Place]: ...
    def put(self, place: Place, tensors: Tensors, model: ModelNote | None) -> None: ...
    def take(self, place: Place) -> Tensors: ...
    def move(self, old: Place, new: Place) -> None: ...
    def remove(self, place: Place) -> None: ...


class ClientState:
    """folder: of this client alone, made when needed; None: states are kept in this process, which
    begins without any when it is started again. is_synced: they also outlive a loss of power."""

    def __init__(
        self, folder: Path | None, *, most_bytes: int = MOST_BYTES, is_synced: bool = True
    ) -> None:
        self._shelf: Shelf = InMemory() if folder is None else OnDisk(folder, is_synced)
        self._most_bytes = most_bytes
        self._folder = folder

    def load(self, run: str, before_round: int) -> tuple[int, Tensors]:
        """The round and tensors of the newest accepted state of a round before that; (0, {}) if
        there is none, or it is damaged, which is told in one line. The caller may empty what it
        gets, but writes into no tensor."""
        try:
            newest = max((n for n in self._accepted(run) if n < before_round), default=0)
            if not newest:
                return 0, {}
            with memory_errors("while reading what this client keeps"):
                return newest, self._shelf.take(Place(mark_of(run), newest))
        except (OSError, ValueError, msgspec.MsgspecError, EdgeError) as error:
            said = "what this client keeps cannot be used in round %d, which begins without: %s"
            log.warning(said, before_round, one_line(str(error)))
            return 0, {}

    def newest(self, run: str) -> Tensors:
        """The tensors of the newest state, whether or not it is accepted; {} where there is none,
        or it is damaged."""
        try:
            places = [place for place in self._shelf.places() if place.run == mark_of(run)]
            return self._shelf.take(max(places, key=lambda p: p.round)) if places else {}
        except (OSError, ValueError, msgspec.MsgspecError, EdgeError) as error:
            log.warning("what a client keeps cannot be used: %s", one_line(str(error)))
            return {}

    def save(
        self,
        run: str,
        round: int,
        tensors: Tensors,
        job: str = "",
        model: ModelNote | None = None,
    ) -> None:
        """Keep the state that goes with an update of this round, which is not accepted yet. model:
        of which the state holds all weights (own_model.py). Raises CapacityError for more than
        most_bytes, and StoreError; the update must not be sent then, as the client's next one would
        not be what the coordinator takes it for."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self._most_bytes:
            said = f"what a client keeps of round {round} takes {mebibytes(size)}"
            most = f"at most {mebibytes(self._most_bytes)} are kept; take a smaller model"
            raise CapacityError(f"{said}, {most}")
        own = mark_of(run)
        with _store_errors(self._folder, round):
            for place in self._shelf.places():
                if place.run != own or place.job is not None:
                    self._shelf.remove(place)
            self._shelf.put(Place(own, round, job), tensors, model)

    def accept(self, run: str, round: int, job: str = "") -> None:
        """The update of this round's job was accepted. Nothing is done where nothing was saved for
        it, or it is accepted already. Raises StoreError."""
        own = mark_of(run)
        waiting = Place(own, round, job)
        with _store_errors(self._folder, round):
            if waiting not in self._shelf.places():
                return
            self._shelf.move(waiting, Place(own, round))
            rounds = self._accepted(run)
            kept = [number for number in rounds if number <= round][-KEPT:]
            for number in rounds:
                if number not in kept:
                    self._shelf.remove(Place(own, number))

    def _accepted(self, run: str) -> list[int]:
        own = mark_of(run)
        return sorted(p.round for p in self._shelf.places() if p.run == own and p.job is None)


class InMemory:
    """A shelf in this process."""

    def __init__(self) -> None:
        self._held: dict[Place, Tensors] = {}

    def places(self) -> list[Place]:
        return list(self._held)

    def put(self, place: Place, tensors: Tensors, model: ModelNote | None) -> None:
        self._held[place] = {name: tensor.clone() for name, tensor in tensors.items()}

    def take(self, place: Place) -> Tensors:
        return dict(self._held[place])

    def move(self, old: Place, new: Place) -> None:
        self._held[new] = self._held.pop(old)

    def remove(self, place: Place) -> None:
        del self._held[place]


class Head(Struct, frozen=True, kw_only=True):
    """The first line of a state's file; the tensors' stream follows. digest: of that. model: see
    ClientState.save."""

    place: tuple[str, int]
    digest: Digest
    tensors: Specs
    model: ModelNote | None = None


class OnDisk:
    """A shelf in a folder, one file a state: RUN-ROUND.state, RUN-ROUND-JOB.waiting."""

    def __init__(self, folder: Path, is_synced: bool) -> None:
        self._folder = folder
        self._is_synced = is_synced

    def places(self) -> list[Place]:
        try:
            names = [path.name for path in self._folder.iterdir()]
        except FileNotFoundError:
            return []
        found = [match for name in names if (match := FILE.fullmatch(name))]
        return [Place(match["run"], int(match["round"]), match["job"]) for match in found]

    def put(self, place: Place, tensors: Tensors, model: ModelNote | None) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        sender = Sender(tensors)
        digest, specs = sender.digest(), sender.specs
        about = Head(place=place[:2], digest=digest, tensors=specs, model=model)
        with replacing(self._path(place), mode=0o600, is_synced=self._is_synced) as file:
            file.write(msgspec.json.encode(about) + b"\n")
            for index in range(sender.num_parts):
                file.write(sender.part(index))

    def take(self, place: Place) -> Tensors:
        return self.read(place)[1]

    def read(self, place: Place) -> tuple[ModelNote | None, Tensors]:
        """The tensors are views of the only copy of the file in memory. Raises ValueError and
        MsgspecError for what is not as `put` left it."""
        with self._path(place).open("rb") as file:
            head = msgspec.json.decode(file.readline(MOST_HEAD_BYTES), type=Head)
            size = layout(head.tensors)[1]
            if os.fstat(file.fileno()).st_size != file.tell() + size:
                raise ValueError(f"{self._path(place)} is not of the length that it says")
            stream = torch.empty(size, dtype=torch.uint8)
            file.readinto(stream.numpy().data)
        tensors = views(head.tensors, stream)
        if head.place != place[:2] or Sender(tensors).digest() != head.digest:
            raise ValueError(f"{self._path(place)} is damaged")
        return head.model, tensors

    def move(self, old: Place, new: Place) -> None:
        os.replace(self._path(old), self._path(new))
        if self._is_synced:
            sync(self._folder)

    def remove(self, place: Place) -> None:
        self._path(place).unlink(missing_ok=True)

    def _path(self, place: Place) -> Path:
        job = "" if place.job is None else f"-{place.job}"
        kind = "state" if place.job is None else "waiting"
        return self._folder / f"{place.run}-{place.round}{job}.{kind}"


def mark_of(run: str) -> str:
    """A run's name as a part of file names."""
    return sha256_of(run.encode())[:16]


@contextmanager
def _store_errors(folder: Path | None, round: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"{folder}: what this client keeps of round {round} cannot be written"
        raise StoreError(f"{what}: {why_not(error)}") from error
