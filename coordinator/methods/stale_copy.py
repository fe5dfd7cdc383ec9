"""`stale-copy`: what HypeMeFed's published code amounts to, kept to be measured. Clients count with
the weights that they were sent for the stages that they do not train."""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.config import STEADY, RunConfig
from coordinator.methods.base import Method
from coordinator.methods.owners_mean import owners_mean
from coordinator.methods.registry import OnDevice, TorchDevice, register_method


@register_method(
    "stale-copy",
    defaults=STEADY,
    uses=("rotation",),
    on_device=OnDevice("depth", "M_e", "K_e"),
)
def stale_copy(config: RunConfig, device: TorchDevice) -> Method:
    """The prefix to the device's exit; who lacks a stage counts with the weights sent for it."""
    return owners_mean(replace(config, server=replace(config.server, damping=1.0)), device)
