"""`stage-rotation` (ours; related: FeDepth 2023, ProFL 2024): as owners-mean, where a client also
trains deeper stages, by turns, each alone over the frozen prefix before it (rotation.py)."""

from __future__ import annotations

from coordinator.config import STEADY, RunConfig
from coordinator.methods.base import Method
from coordinator.methods.owners_mean import owners_mean
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from edge_sdk.errors import ConfigError


def check_rotates(config: RunConfig) -> None:
    if config.rotation.mode == "off":
        raise ConfigError(
            "method 'stage-rotation' with --rotation off is owners-mean; use --method owners-mean "
            "or --rotation add"
        )


@register_method(
    "stage-rotation",
    defaults={**STEADY, "rotation.mode": "add", "rotation.stages": 0},
    uses=("rotation", "server.damping"),
    check=check_rotates,
    on_device=OnDevice("depth", "M_e", "K_e, and K - K_e down and up by turns"),
)
def stage_rotation(config: RunConfig, device: TorchDevice) -> Method:
    """The prefix to the device's exit, and deeper stages by turns over what lies before them."""
    return owners_mean(config, device)
