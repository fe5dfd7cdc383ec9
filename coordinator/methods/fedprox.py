"""`fedprox`: FedProx (Li et al. 2020, arXiv 1812.06127). The local loss has mu/2 |w - w_received|^2
more, squared and over trainable tensors only; the mean is FedAvg's. Each client trains the prefix
to its exit.

Partial work. A device chooses the depth that it can train by the deadline, all epochs of it, so
here slowness costs depth and not epochs. What the paper does instead, `--stragglers SHARE` does:
that share of a round's participants trains only 1 to --epochs - 1 epochs, drawn from (seed, round,
client), and counts like the others.

Deviation: clients count by their examples; the paper draws them by these and counts them alike."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from msgspec import Meta
from msgspec.structs import replace

from coordinator.cohorts.base import Assignment, Client
from coordinator.cohorts.sampling import job_seed
from coordinator.config import Options, RunConfig, flag
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import rotation

# As the authors' code has it for the synthetic data of section 5.
PAPER = {
    "prox_mu": 1.0,
    "optimizer": "sgd",
    "lr": 0.01,
    "momentum": 0.0,
    "batch_size": 10,
    "epochs": 20,
    "server.serve": "last",
}


class FedProxOptions(Options, frozen=True, kw_only=True):
    stragglers: Annotated[
        float, Meta(ge=0, le=1), flag("share of participants that train fewer epochs")
    ] = 0.0


def partial_work(job: Assignment, key: str, share: float) -> Assignment:
    """The job, of a `share` of all keys with fewer epochs."""
    if job.plan.epochs == 1 or job_seed(0, 0, f"{key}/straggles") >= share * 2**62:
        return job
    epochs = 1 + job_seed(0, 0, f"{key}/epochs") % (job.plan.epochs - 1)
    return dataclasses.replace(job, plan=replace(job.plan, epochs=epochs))


@register_method(
    "fedprox",
    defaults={"prox_mu": 0.01},
    paper=PAPER,
    options=FedProxOptions,
    on_device=OnDevice("depth", "M_e and K_e", "K_e"),
)
def fedprox(config: RunConfig, device: TorchDevice, options: FedProxOptions) -> Method:
    """The prefix to the device's exit, with a pull to the received weights; some epochs less."""

    def adapt(client: Client, round: int, job: Assignment) -> Assignment:
        return partial_work(job, f"{config.seed}/{round}/{client.id}", options.stragglers)

    return DepthAveraging(config, rotation(config.rotation, config.seed), adapt=adapt)
