"""`fednova`: FedNova (Wang et al. 2020, arXiv 2007.07481). Clients take unequally many steps; in a
plain mean who takes more pulls the model to its own optimum. So each movement is divided by what
its steps add up to, a_i, and the mean of what results is taken times the mean a_i:

    w <- w + (sum p_i a_i) sum p_i (w_i - w) / a_i,   sum p_i = 1

a_i of t steps: t for SGD, [t - m (1 - m^t) / (1 - m)] / (1 - m) with momentum m,
[1 - (1 - lr mu)^t] / (lr mu) with FedProx's term. Server momentum is --server-momentum. Deviation:
with FedProx's term the authors' code takes the mean number of steps for (sum p_i a_i), which makes
the server's step longer than any client's; here it is the mean a_i always.

Here each client trains the prefix to its exit, and both sums are over a tensor's owners. Statistics
of BatchNorm follow the plain mean. t is what the update tells, at most what its epochs allow over
its examples. In the mean a_i, which scales the whole step, it is at most what they allow over the
examples that the client counts with (aggregation/weights.py)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from coordinator.aggregation.mean import Kernel
from coordinator.aggregation.robust import shortened
from coordinator.cohorts.base import ClientUpdate
from coordinator.config import RunConfig
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import rotation
from edge_sdk.errors import ConfigError
from edge_sdk.models import build
from edge_sdk.protocol.messages import Plan
from edge_sdk.protocol.tensors import Tensors, check_shapes

DEFAULTS = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.0}
# VGG-11 on CIFAR-10, 16 clients, as Flower's baseline reproduces table 1.
PAPER = {
    **DEFAULTS,
    "lr": 0.02,
    "weight_decay": 1e-4,
    "batch_size": 32,
    "epochs": 2,
    "server.serve": "last",
}


def steps_in_all(plan: Plan, steps: int) -> float:
    """a_i: the sum of the weights with which the gradients of so many steps move a client."""
    if plan.prox_mu:
        lost = plan.lr * plan.prox_mu
        return -math.expm1(steps * math.log1p(-lost)) / lost
    m = plan.momentum
    return (steps - m * (1 - m**steps) / (1 - m)) / (1 - m)


class NormalisedMean:
    """FedNova's mean, as a ServerRule; nothing of it stays over a round."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._parameters = {name for name, _ in build(config.model).named_parameters()}

    def begin(self, round: int) -> None:
        self._plan = self._config.plan(round)
        # By tensor: a_i of its first owner (equal steps are to be the plain mean to the last bit),
        # and the sum of p_i a_i.
        self._units: dict[str, float] = {}
        self._sums: dict[str, float] = {}

    def add_(self, mean: Kernel, update: ClientUpdate, weight: float, sent: Tensors) -> None:
        done = max(1, min(update.message.num_steps, self._most_steps(update.message.num_examples)))
        steps = steps_in_all(self._plan, done)
        counted = steps_in_all(self._plan, min(done, self._most_steps(update.num_examples)))
        tensors = dict(update.tensors)
        for name in self._parameters & tensors.keys():
            unit = self._units.setdefault(name, steps)
            self._sums[name] = self._sums.get(name, 0.0) + weight * counted
            if steps != unit:
                tensors[name] = shortened(tensors[name], sent[name], unit / steps)
        mean.add_(tensors, weight)

    def _most_steps(self, num_examples: int) -> int:
        return self._plan.epochs * max(1, math.ceil(num_examples / self._plan.batch_size))

    def stepped(self, mean: Kernel, aggregate: Tensors, sent: Tensors) -> tuple[Tensors, Tensors]:
        stepped = dict(aggregate)
        for name, total in self._sums.items():
            share = total / mean.weight(name) / self._units[name]
            if not math.isclose(share, 1.0, rel_tol=1e-12):
                stepped[name] = shortened(aggregate[name], sent[name], share)
        return stepped, {}

    def state_dict(self) -> Tensors:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        check_shapes(state, {}, "checkpoint")


def check_steps(config: RunConfig) -> None:
    why = ""
    if config.optimizer != "sgd":
        why = f"--optimizer {config.optimizer}: what its steps add up to is not known before"
    elif config.prox_mu and config.momentum:
        why = "--prox-mu and --momentum: the paper has a sum for each, none for both"
    elif config.prox_mu * config.lr >= 1:
        why = f"--prox-mu {config.prox_mu:g} at --lr {config.lr:g}: each step overshoots"
    if why:
        raise ConfigError(f"method 'fednova' with {why}; use SGD with one of them, or neither")


@register_method(
    "fednova",
    defaults=DEFAULTS,
    paper=PAPER,
    check=check_steps,
    on_device=OnDevice("depth", "M_e", "K_e"),
)
def fednova(config: RunConfig, device: TorchDevice) -> Method:
    """The prefix to the device's exit; movements are averaged by the step, not by the client."""
    segments = rotation(config.rotation, config.seed)
    return DepthAveraging(config, segments, server_rule=NormalisedMean(config))
