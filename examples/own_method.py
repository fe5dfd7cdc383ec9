"""A method of your own: everybody trains exit 1 alone for some rounds, then as deep as they can.

    PYTHONPATH=examples edge-coordinator emulate --import own_method --method warm-up --shallow 2
    PYTHONPATH=examples edge-coordinator emulate --import own_method --method warm-up --help

A method says what a client trains (assign) and what is made of the updates (aggregate); this one
has only a rule of its own for what is trained, the rest is DepthAveraging's.
"""

from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta

from coordinator.cohorts.base import Client
from coordinator.config import Options, RunConfig, flag
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import TorchDevice, register_method
from edge_sdk.protocol.messages import Segment


class WarmUp(Options, frozen=True, kw_only=True):
    """Each field is a flag, with its default, bounds and help."""

    shallow: Annotated[int, Meta(ge=0, le=10_000), flag("rounds of exit 1 alone")] = 3


@register_method("warm-up", options=WarmUp, defaults={"server.momentum": 0.5, "server.lr": 0.75})
def warm_up(config: RunConfig, device: TorchDevice, options: WarmUp) -> Method:
    def rule(client: Client, round: int, owners: Sequence[float]) -> tuple[Segment, ...]:
        return (Segment(first=1, last=1 if round <= options.shallow else client.exit),)

    return DepthAveraging(config, rule)
