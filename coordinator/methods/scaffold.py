"""`scaffold`: SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, option II). A client steps by
y <- y - lr (g(y) - c_i + c); after J steps from w its control variate is c_i+ = c_i - c +
(w - y) / (J lr). The server takes w + eta_g mean(y - w), eta_g being --server-lr, and
c + |S| / N mean(c_i+ - c_i). All variates begin at zero and stand for trainable tensors only.

c_i stays on the device. c goes down beside the weights as "correction/NAME", and the difference
c_i+ - c_i comes back under the same name: twice the bytes of FedAvg each way. A device that has
lost its c_i begins again from zero; what it had told of before stays in c.

Here each client trains the prefix to its exit, so c is one per tensor, over those who own it, and N
is the number of known clients that do (server_rule.KnownClients). With --weighting examples shares
of clients are shares of examples in c as in the mean: else c would not vanish at the optimum. A
late update counts for less in the mean, and its difference wholly in c, as its client keeps all of
its c_i; what --clip takes off a difference is not in c."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from coordinator.aggregation.mean import Kernel
from coordinator.aggregation.registry import make_kernel
from coordinator.cohorts.base import Assignment, Client, ClientUpdate
from coordinator.config import RunConfig
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import rotation
from coordinator.methods.server_rule import Kept, state_of
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensor_lists import weight_names
from edge_sdk.protocol.tensors import Tensors, specs_of, with_prefix

BESIDE = "correction/"
DEFAULTS = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.0}
# Epochs and batch as Flower's baseline reproduces it: LeNet-like, 10 clients.
PAPER = {
    **DEFAULTS,
    "weighting": "equal",
    "batch_size": 64,
    "epochs": 10,
    "server.serve": "last",
}


class ControlVariates:
    """The server's c, as a ServerRule."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._kept = Kept(config)

    def begin(self, round: int) -> None:
        self._differences = make_kernel(self._config.aggregation)
        self._known = self._kept.known.copy()

    def job(self, client: Client, round: int, job: Assignment) -> Assignment:
        """With c of the tensors that the client trains."""
        variates = self._kept.tensors
        beside = {BESIDE + s.name: variates[s.name] for s in job.returns if s.name in variates}
        returns = job.returns + specs_of(beside)
        return dataclasses.replace(job, tensors=job.tensors | beside, returns=returns)

    def add_(self, mean: Kernel, update: ClientUpdate, weight: float, sent: Tensors) -> None:
        own = weight_names(update.tensors)
        mean.add_({name: update.tensors[name] for name in own}, weight)
        self._differences.add_(with_prefix(update.tensors, BESIDE), weight)
        self._known.note(update, weight)

    def stepped(self, mean: Kernel, aggregate: Tensors, sent: Tensors) -> tuple[Tensors, Tensors]:
        variates = dict(self._kept.tensors)
        differences = self._differences.result(
            {n: torch.zeros_like(c) for n, c in variates.items()}
        )
        for name, difference in differences.items():
            if owners := self._differences.weight(name):
                share = owners / self._known.total(name)
                variates[name] = variates[name] + share * difference
        return aggregate, state_of(variates, self._known)

    def state_dict(self) -> Tensors:
        return self._kept.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._kept.load_state_dict(state)


def check_plain_sgd(config: RunConfig) -> None:
    for flag, value, wanted in (
        ("--optimizer", config.optimizer, "sgd"),
        ("--momentum", config.momentum, 0.0),
    ):
        if value != wanted:
            raise ConfigError(
                f"method 'scaffold' with {flag} {value}: control variates take (w - y) / (J lr) "
                f"for the mean gradient, which is true of plain SGD alone; use {flag} {wanted}"
            )


@register_method(
    "scaffold",
    defaults=DEFAULTS,
    paper=PAPER,
    check=check_plain_sgd,
    on_device=OnDevice("depth", "M_e and 3 K_e", "2 K_e", "c_i, K_e"),
)
def scaffold(config: RunConfig, device: TorchDevice) -> Method:
    """The prefix to the device's exit, its drift corrected by control variates."""
    rule = ControlVariates(config)
    segments = rotation(config.rotation, config.seed)
    return DepthAveraging(
        config, segments, asks={"correction": True}, adapt=rule.job, server_rule=rule
    )
