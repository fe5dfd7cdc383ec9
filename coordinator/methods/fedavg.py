"""FedAvg (McMahan et al. 2017) at one depth for everybody, whatever a client can hold.

`fedavg-s`: everyone trains exit 1 only. `fedavg-l`: everyone trains the whole model; it is the
bound that the others are measured against, not a method for weak devices. Deviation: the joint loss
of all exits is trained, so that the exits can be compared."""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.config import RunConfig
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import fixed


@register_method(
    "fedavg-s",
    without=("distill", "exit_weights"),
    on_device=OnDevice("exit 1 for everyone", "M_1", "K_1"),
)
def fedavg_s(config: RunConfig, device: TorchDevice) -> Method:
    """Everyone trains exit 1 only, whatever it can hold."""
    shallow = replace(config.model, exit=1)
    config = replace(config, model=shallow, exit_weights=())
    return DepthAveraging(config, fixed(1))


@register_method("fedavg-l", on_device=OnDevice("nothing: the whole model", "M", "K"))
def fedavg_l(config: RunConfig, device: TorchDevice) -> Method:
    """Everyone trains the whole model, all its exits: the bound, not for weak devices."""
    return DepthAveraging(config, fixed(config.model.exit))
