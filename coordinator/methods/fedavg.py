"""FedAvg (McMahan et al. 2017) at one depth for everybody, whatever a client can hold.

`fedavg-s`: everyone trains exit 1 only. `fedavg-l`: everyone trains the whole model; it is the
bound that the others are measured against, not a method for weak devices. Deviation: the joint loss
of all exits is trained, so that the exits can be compared."""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.config import RunConfig
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import TorchDevice, register_method
from coordinator.methods.rotation import fixed
from edge_sdk.errors import ConfigError


def check_one_exit(config: RunConfig) -> None:
    if config.distill.direction != "none":
        raise ConfigError(
            f"method 'fedavg-s' trains one exit, so --distill {config.distill.direction} has no "
            "place there; leave it out"
        )


@register_method("fedavg-s", check=check_one_exit)
def fedavg_s(config: RunConfig, device: TorchDevice) -> Method:
    shallow = replace(config.model, exit=1)
    config = replace(config, model=shallow, exit_weights=config.exit_weights[:1])
    return DepthAveraging(config, fixed(1))


@register_method("fedavg-l")
def fedavg_l(config: RunConfig, device: TorchDevice) -> Method:
    return DepthAveraging(config, fixed(config.model.exit))
