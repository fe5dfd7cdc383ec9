"""Which parts of the job in hand may come, and which of its update were asked for, so that nothing
waits for a trainer that it has not asked for."""

from __future__ import annotations

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.messages import Fetch, Part, TensorSpec, Update
from edge_sdk.protocol.stream import layout


class Transfer:
    """Of one job. tensors: its list."""

    def __init__(self, tensors: tuple[TensorSpec, ...] = ()) -> None:
        self._layout = layout(tensors)
        self._awaited: set[int] = set()
        self._num_up = self._asked_up_to = 0  # parts of the update; the latter on this connection

    @property
    def num_awaited(self) -> int:
        """Parts that the trainer has asked for and that have not come."""
        return len(self._awaited)

    def expect(self, fetch: Fetch) -> bool:
        """The trainer asks for these parts; whether it has all of them already."""
        number = self._layout.num_parts
        self._awaited.update(range(fetch.first, min(fetch.first + fetch.count, number)))
        return fetch.have >= number

    def take(self, part: Part, size: int) -> bool:
        """A part has come; whether it was asked for and is not here. Raises ProtocolError for a
        wrong size."""
        wanted = self._layout.part_size(part.index)
        if size != wanted:
            raise ProtocolError(f"part {part.index} has {size} bytes, expected {wanted}")
        if part.index not in self._awaited:
            return False
        self._awaited.discard(part.index)
        return True

    def announce(self, update: Update) -> None:
        """Its parts may be asked for, from now on or anew."""
        self._num_up, self._asked_up_to = layout(update.tensors).num_parts, 0

    def num_asked_again(self, fetch: Fetch) -> int:
        """The coordinator asks for these parts of the update: how many of them it asks for once
        more on this connection, at least 1 where that is all."""
        end = min(fetch.first + fetch.count, self._num_up)
        again = max(0, min(end, self._asked_up_to) - fetch.first)
        is_news = end > self._asked_up_to
        self._asked_up_to = max(self._asked_up_to, end)
        return again if is_news else max(1, again)
