"""Who takes part in the round at hand, in a file that is final at once, so that a coordinator that
was killed gives the same jobs again. One round at a time."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from coordinator.cohort import Client

log = logging.getLogger(__name__)


class Begun:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._round = 0
        self._clients: dict[str, Client] = {}

    def add(self, round: int, clients: Iterable[Client]) -> None:
        """These too. Raises OSError."""
        if round != self._round:
            self._round, self._clients = round, {}
        self._clients |= {client.id: client for client in clients}
        draft = self.path.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode((round, list(self._clients.values()))))
        os.replace(draft, self.path)

    def count(self, round: int) -> int:
        return len(self._clients) if round == self._round else 0

    def read(self, round: int) -> list[Client]:
        """The participants of this round; nobody if the file is of another or cannot be read: what
        it names is not final."""
        try:
            found, clients = msgspec.json.decode(
                self.path.read_bytes(), type=tuple[int, list[Client]]
            )
        except FileNotFoundError:
            return []
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("%s cannot be read: %s; the round begins anew", self.path, error)
            return []
        return clients if found == round else []
