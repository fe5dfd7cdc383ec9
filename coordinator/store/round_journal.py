"""Who takes part in the round at hand, in a file that is final at once, also over a power cut, so
that a coordinator that was killed gives the same jobs again. One round at a time."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec

from coordinator.cohorts.base import Client
from edge_sdk.helpers.files import write_whole

log = logging.getLogger(__name__)


class RoundJournal:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._round = 0
        self._clients: dict[str, Client] = {}
        self._num_chosen = 0

    def add(self, round: int, clients: Iterable[Client]) -> None:
        """Note that these clients take part too; the first that are noted in a round are those that
        were chosen. Raises OSError."""
        if round != self._round:
            self._round, self._clients, self._num_chosen = round, {}, 0
        self._clients |= {client.id: client for client in clients}
        self._num_chosen = self._num_chosen or len(self._clients)
        content = round, self._num_chosen, list(self._clients.values())
        write_whole(self.path, msgspec.json.encode(content))

    def count(self, round: int) -> int:
        return len(self._clients) if round == self._round else 0

    def read(self, round: int) -> tuple[list[Client], int]:
        """The participants of this round, and how many were chosen, before others were asked for
        those who failed. Nobody if the file is of another or cannot be read: what it names is not
        final."""
        try:
            found, num_chosen, clients = msgspec.json.decode(
                self.path.read_bytes(), type=tuple[int, int, list[Client]]
            )
        except FileNotFoundError:
            return [], 0
        except (OSError, msgspec.MsgspecError) as error:
            log.warning("%s cannot be read: %s; the round begins anew", self.path, error)
            return [], 0
        if found != round:
            return [], 0
        self._round, self._num_chosen = round, num_chosen
        self._clients = {client.id: client for client in clients}
        return clients, num_chosen
