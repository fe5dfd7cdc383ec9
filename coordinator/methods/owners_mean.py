"""`owners-mean`: each client trains the prefix to its exit, each tensor becomes the mean over those
who trained it. With `--rotation` clients train deeper stages too (rotation.py)."""

from __future__ import annotations

from coordinator.config import STEADY, RunConfig
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import rotation


@register_method(
    "owners-mean",
    defaults=STEADY,
    uses=("rotation", "server.damping"),
    on_device=OnDevice("depth", "M_e", "K_e"),
)
def owners_mean(config: RunConfig, device: TorchDevice) -> Method:
    """The prefix to the device's exit; each tensor is the mean over those who trained it."""
    return DepthAveraging(config, rotation(config.rotation, config.seed, config.deadline_s))
