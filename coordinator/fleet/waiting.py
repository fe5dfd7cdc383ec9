"""What the log says while a round waits for the last of its participants."""

from __future__ import annotations

import logging
from collections.abc import Collection

from edge_sdk.helpers.logs import event

log = logging.getLogger(__name__)
TELL_S = 15.0  # between lines about what is waited for
MOST_NAMES = 5


class Waiting:
    """Of one round. closes_at: its deadline with the grace; now: as closes_at, of any clock."""

    def __init__(self, round: int, closes_at: float, now: float) -> None:
        self._round, self._closes_at = round, closes_at
        self._told = now  # or when a result came
        self._has_result = False

    def note_result(self, now: float) -> None:
        self._told, self._has_result = now, True

    def tell(
        self, counts: tuple[int, int, int], awaited: Collection[str], now: float, *, may_close: bool
    ) -> None:
        """Log whom the round waits for, every TELL_S from the last result or the round's end on.
        counts: returned, asked, needed. may_close: the round ends at closes_at as things are."""
        left_s = self._closes_at - now
        if now - self._told <= TELL_S or not (self._has_result or left_s < 0):
            return
        self._told = now
        returned, asked, needed = counts
        names = ", ".join(sorted(awaited)[:MOST_NAMES])
        names += f" and {len(awaited) - MOST_NAMES} more" * (len(awaited) > MOST_NAMES)
        limit = f"at most {max(0.0, left_s):.0f} s more" if may_close else f"{needed} needed"
        level = logging.INFO if left_s >= 0 else logging.WARNING
        extra = event("waiting", round=self._round, returned=returned, needed=needed)
        said = "round %d: %d of %d returned, waiting for %s, %s"
        log.log(level, said, self._round, returned, asked, names, limit, extra=extra)
