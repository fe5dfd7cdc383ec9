"""`owners-mean`: each client trains the prefix to its exit, each tensor becomes the mean over those
who trained it. With `--rotation` clients train deeper stages too (rotation.py)."""

from __future__ import annotations

from coordinator.config import RunConfig
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import TorchDevice, register_method
from coordinator.methods.rotation import rotation


@register_method("owners-mean", uses=("rotation",))
def owners_mean(config: RunConfig, device: TorchDevice) -> Method:
    return DepthAveraging(config, rotation(config.rotation, config.seed, config.deadline_s))
