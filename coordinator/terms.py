"""What a coordinator tells every device, and when it closes a round."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coordinator.defaults import BUDGET_BYTES
from edge_sdk.wire import ModelSpec, Plan


@dataclass(frozen=True)
class Terms:
    """What every device is told, and when a round may close: see RunConfig. oldest: rounds after
    which a late update is not taken any more, 0: none is. give_up_after_s: how long nothing may
    change while there are too few devices, 0: without end."""

    run: str
    model: ModelSpec
    plan: Plan
    deadline_s: float
    grace_s: float
    quorum: float
    min_clients: int
    min_updates: int = 1
    is_async: bool = False
    oldest: int = 0
    give_up_after_s: float = 0.0
    budget_bytes: int = BUDGET_BYTES

    def needed(self, chosen: int) -> int:
        """Updates that a round of so many participants needs."""
        return max(1, math.ceil(self.quorum * chosen), min(self.min_updates, chosen))
