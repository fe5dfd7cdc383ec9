"""How many updates a round needs, and with how many clients it begins: the policy of all rounds."""

from __future__ import annotations

import math

from coordinator.config import RunConfig


def updates_needed(config: RunConfig, participants: int) -> int:
    """Updates that a round of so many participants needs: the quorum's share of them, and at least
    min_updates, or all of them where they are fewer. Never none."""
    share = math.ceil(config.quorum * participants)
    return max(1, share, min(config.min_updates, participants))


def clients_needed(config: RunConfig) -> int:
    """Clients that a round begins with once the run has assembled: the quorum's share of
    min_clients, at least one."""
    return max(1, math.ceil(config.quorum * config.min_clients))
