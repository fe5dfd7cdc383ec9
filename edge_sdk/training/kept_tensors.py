"""Tensors that a coordinator sends once: what its runs freeze lies here by the digest of its bytes,
so that no later job, of this run or another, after a restart or not, brings it again.

A file a tensor, named by its digest, in a folder of this agent and coordinator alone: whoever else
could name a digest would learn what was here, and have it trained on. A file is written whole, and
read against its name: a damaged one counts as not there, and is fetched again. Where the folder
grows over its bound, what was asked for longest ago goes first."""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from edge_sdk.errors import ProtocolError
from edge_sdk.helpers.files import why_not, write_whole
from edge_sdk.protocol.messages import TensorSpec
from edge_sdk.protocol.stream import digest_of
from edge_sdk.protocol.tensors import Receiver
from edge_sdk.training.saved_update import KEPT, forget_old_ones

log = logging.getLogger(__name__)
MOST_BYTES = 1024**3
LEAST_FREE_BYTES = 256 * 1024**2  # of the disk, for what training must be able to save
BY_DIGEST = re.compile(r"[0-9a-f]{32}\Z")


class KeptTensors:
    """beside: the folder of this agent's saved update, made when needed; None: nothing is kept.
    Errors of the disk are told and cost a transfer, no training."""

    def __init__(
        self,
        beside: Path | None,
        most_bytes: int = MOST_BYTES,
        least_free_bytes: int = LEAST_FREE_BYTES,
    ) -> None:
        self._folder = beside and beside / KEPT
        self._most_bytes = most_bytes
        self._least_free_bytes = least_free_bytes

    def fill(self, receiver: Receiver) -> None:
        """Write what is kept of a job's tensors to their places, before any part is asked for."""
        kept = {n for n, spec in enumerate(receiver.specs) if self._read(spec, receiver, n)}
        if kept:
            receiver.skip(kept)
            log.debug("%d of %d tensors are kept here", len(kept), len(receiver.specs))

    def _read(self, spec: TensorSpec, receiver: Receiver, number: int) -> bool:
        """Whether the tensor was kept, whole."""
        if self._folder is None or spec.digest is None:
            return False
        path, place = self._folder / spec.digest, receiver.place_of(number)
        try:
            with path.open("rb") as file:
                is_whole = file.readinto(place) == len(place) and not file.read(1)
            if is_whole and digest_of([place]) == spec.digest:
                os.utime(path)
                return True
            log.warning("%s is damaged; %s is fetched again", path, spec.name)
            path.unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            log.warning("%s cannot be read: %s", path, why_not(error))
        return False

    def check(self, receiver: Receiver) -> None:
        """Raise ProtocolError for a tensor whose bytes, all here, have another digest than its."""
        for number, spec in enumerate(receiver.specs):
            if spec.digest and digest_of([receiver.place_of(number)]) != spec.digest:
                raise ProtocolError(
                    f"tensor {spec.name} came with other bytes than its digest {spec.digest}; "
                    "nothing was trained"
                )

    def keep(self, receiver: Receiver) -> None:
        """Keep what has arrived whole of a job's tensors with a digest, also of a job that is given
        up; the job's own are never those that make room."""
        folder, room = self._folder, self._most_bytes
        named = {spec.digest: n for n, spec in enumerate(receiver.specs) if spec.digest}
        if folder is None or not named:
            return
        try:
            for new in (folder.parent.parent, folder.parent, folder):
                new.mkdir(parents=True, exist_ok=True, mode=0o700)
            forget_old_ones(folder.parent)
            for digest, number in named.items():
                place = receiver.place_of(number)
                room -= len(place)
                if room < 0:
                    said = "frozen tensors of a job take more than %d bytes; the rest is not kept"
                    log.warning(said, self._most_bytes)
                    break
                if not receiver.has_whole(number) or (folder / digest).exists():
                    continue
                free = shutil.disk_usage(folder).free - len(place)
                if free < self._least_free_bytes:
                    said = "frozen tensors are not kept: %s would have %d bytes free, at least %d"
                    log.warning(said, folder, free, self._least_free_bytes)
                    break
                if digest_of([place]) == digest:
                    write_whole(folder / digest, bytes(place), mode=0o600, is_synced=False)
            self._make_room(folder, named)
        except OSError as error:
            log.warning("frozen tensors are not kept in %s: %s", folder, why_not(error))

    def _make_room(self, folder: Path, needed: Collection[str]) -> None:
        """Remove the files that were asked for longest ago, but for those that are needed, until
        the rest takes at most most_bytes; and drafts that a killed trainer left. Raises OSError."""
        files = []
        for path in folder.iterdir():
            if BY_DIGEST.match(path.name):
                found = path.stat()
                files.append((path.name in needed, found.st_mtime_ns, found.st_size, path))
            else:
                path.unlink()
        total = sum(size for _, _, size, _ in files)
        for is_needed, _, size, path in sorted(files):
            if total <= self._most_bytes or is_needed:
                break
            with suppress(FileNotFoundError):
                path.unlink()
            total -= size
