"""FedAvg (McMahan et al. 2017) at one depth for everybody, whatever a client can hold.

`fedavg`: everyone trains the whole model by the loss of its last exit, as other systems do; shallow
exits travel as they were made, so only the last one answers better than chance. `fedavg-s`:
everyone trains exit 1 only. `fedavg-l`: everyone trains the whole model; it is the bound that the
others are measured against. Deviation of these two: the joint loss of all exits is trained, so that
the exits can be compared. None is for weak devices but `fedavg-s`: one that cannot hold the whole
model fails at its jobs."""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.config import STEADY, RunConfig
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import fixed


@register_method(
    "fedavg-s",
    defaults=STEADY,
    without=("distill", "exit_weights"),
    on_device=OnDevice("exit 1 for everyone", "M_1", "K_1"),
)
def fedavg_s(config: RunConfig, device: TorchDevice) -> Method:
    """Everyone trains exit 1 only, whatever it can hold."""
    shallow = replace(config.model, exit=1)
    config = replace(config, model=shallow, exit_weights=())
    return DepthAveraging(config, fixed(1))


# Batch and epochs as in its table 2; the learning rate is tuned there, one for each experiment.
PAPER = {"lr": 0.1, "momentum": 0.0, "batch_size": 10, "epochs": 5, "server.serve": "last"}


@register_method(
    "fedavg",
    defaults={"server.serve": "last"},
    paper=PAPER,
    without=("distill", "exit_weights"),
    on_device=OnDevice("nothing: the whole model", "M", "K"),
)
def fedavg(config: RunConfig, device: TorchDevice) -> Method:
    """Everyone trains the whole model by its last exit alone, as other systems do."""
    exits = config.model.exit
    config = replace(config, exit_weights=(0.0,) * (exits - 1) + (1.0,))
    return DepthAveraging(config, fixed(exits), least_exit=exits)


@register_method(
    "fedavg-l", defaults=STEADY, on_device=OnDevice("nothing: the whole model", "M", "K")
)
def fedavg_l(config: RunConfig, device: TorchDevice) -> Method:
    """Everyone trains the whole model, all its exits: the bound, not for weak devices."""
    return DepthAveraging(config, fixed(config.model.exit))
