"""`depthfl`: DepthFL (Kim et al., ICLR 2023). Each client trains the prefix to its exit; its exits
teach each other (--distill mutual) with a weight that rises as exp(-5 (1 - t/R)^2) until round R
(--distill-ramp). Client and server regularise as in FedDyn; the mean of a tensor is over its
owners, all alike, and h moves by their share of all clients. The prediction is the mean of the
exits' logits: the figure `accuracy_mean_of_exits`.

Tensors are known by name: published code pairs them by their place in lists, which is right only
while a client's list begins the whole one. N counts the clients that are known
(server_rule.KnownClients). The largest integer of BatchNorm's counters is kept, not their mean. Of
late and clipped updates h takes what counted (feddyn.py)."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated

from msgspec import Meta
from msgspec.structs import replace

from coordinator.cohorts.base import Assignment, Client
from coordinator.config import Options, RunConfig, flag
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.feddyn import DynamicRegulariser
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import rotation

DEFAULTS = {
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.0,
    "weighting": "equal",
    "distill.direction": "mutual",
}
# Section 4.1: CIFAR-100, 1000 rounds.
PAPER = {
    **DEFAULTS,
    "lr_decay": 0.998,
    "weight_decay": 1e-3,
    "batch_size": 50,
    "epochs": 5,
    "distill.ramp_rounds": 300,
    "server.serve": "last",
}


class DepthFLOptions(Options, frozen=True, kw_only=True):
    alpha: Annotated[
        float, Meta(gt=0, le=1000), flag("of the dynamic regulariser", "--dyn-alpha")
    ] = 0.1


def ramp(round: int, rounds: int) -> float:
    """The weight of distillation in a round, 1 from round `rounds` on."""
    lacking = 1 - min(round, rounds) / rounds if rounds else 0.0
    return math.exp(-5 * lacking**2)


@register_method(
    "depthfl",
    defaults=DEFAULTS,
    paper=PAPER,
    options=DepthFLOptions,
    on_device=OnDevice("depth", "M_e and 2 K_e", "K_e", "g_i, K_e"),
)
def depthfl(config: RunConfig, device: TorchDevice, options: DepthFLOptions) -> Method:
    """The prefix to the device's exit, whose exits teach each other; FedDyn's regulariser."""
    distill = config.distill

    def adapt(client: Client, round: int, job: Assignment) -> Assignment:
        if job.plan.distill == "none":
            return job
        weight = distill.weight * ramp(round, distill.ramp_rounds)
        return dataclasses.replace(job, plan=replace(job.plan, distill_weight=weight))

    return DepthAveraging(
        config,
        rotation(config.rotation, config.seed),
        asks={"dyn_alpha": options.alpha},
        adapt=adapt,
        server_rule=DynamicRegulariser(config, options.alpha, is_of_owners=False),
    )
