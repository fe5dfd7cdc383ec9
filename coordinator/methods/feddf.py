"""`feddf`: FedDF (Lin et al. 2020, arXiv 2006.07242). After the mean the server goes on training
the global model on examples of its own, whose labels it does not look at (--public): it learns to
answer as the clients' models do together, with k over the clients that own an exit:

    minimise KL( softmax(mean_k z_k(x)) || softmax(z(x)) )

by Adam, whose rate falls along a half cosine to 0 (aggregation/ensemble.py). Clients count alike in
it, as published, however the mean weighs them; late ones as the mean has them, brought forward.

Deviations. The number of steps is fixed: the paper stops early, by labelled data of the server.
Each client trains the prefix to its exit, so each exit has a teacher of its own, and a step takes
the sum over the exits. BatchNorm normalises by the mean of the owners' statistics and dropout is
off, in teachers and in training: the public set is of another kind than the clients' data. A
client whose answers are not finite does not teach. A robust rule is refused: it bounds what one
client does to the mean, and not what it does to the teacher; --clip bounds both."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated

import torch
from msgspec import Meta
from msgspec.structs import replace
from torch import Tensor

from coordinator.aggregation.ensemble import Ensemble
from coordinator.aggregation.mean import Kernel
from coordinator.cohorts.base import ClientUpdate
from coordinator.cohorts.sampling import job_seed
from coordinator.config import Options, RunConfig, flag
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import rotation
from edge_sdk.data.contract import mismatch
from edge_sdk.data.loading import load_shard
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.tensors import Tensors, check_shapes
from edge_sdk.tasks.metrics import ONLY_CLASSES

log = logging.getLogger(__name__)
# ResNet-8 on CIFAR-10, CIFAR-100 as the public set.
PAPER = {
    "optimizer": "sgd",
    "lr": 0.1,
    "momentum": 0.0,
    "batch_size": 64,
    "epochs": 40,
    "server.serve": "last",
    "own.fusion_steps": 10_000,
    "own.fusion_batch": 128,
    "own.public_examples": 50_000,
}
PUBLIC = "examples of the server's own, digits, a folder or a file; their labels are not used"


class FedDFOptions(Options, frozen=True, kw_only=True):
    public: Annotated[str, flag(PUBLIC, metavar="DATA")] = ""
    public_examples: Annotated[int, Meta(ge=1), flag("of --public, at most, drawn once")] = 2000
    fusion_steps: Annotated[int, Meta(ge=0, le=10**6), flag("on --public, each round")] = 200
    fusion_batch: Annotated[int, Meta(ge=1, le=2**16), flag("examples of such a step")] = 64
    fusion_lr: Annotated[float, Meta(gt=0, le=1), flag("of the first such step, by Adam")] = 1e-3


class Fusion:
    """The distillation, as a ServerRule; nothing of it stays over a round."""

    def __init__(self, config: RunConfig, options: FedDFOptions, device: TorchDevice) -> None:
        self._config, self._options, self._device = config, options, device
        self._x = public_inputs(config, options)

    def begin(self, round: int) -> None:
        self._round = round
        self._ensemble = Ensemble(self._config.model, self._x, self._device)

    def add_(self, mean: Kernel, update: ClientUpdate, weight: float, sent: Tensors) -> None:
        mean.add_(update.tensors, weight)
        deepest = update.segments[-1].last
        if self._options.fusion_steps and not self._ensemble.add_(deepest, update.tensors):
            said = "round %d: %s teaches nothing, its model's answers on --public are not finite"
            log.warning(said, self._round, update.client.id)

    def stepped(self, mean: Kernel, aggregate: Tensors, sent: Tensors) -> tuple[Tensors, Tensors]:
        options, round = self._options, self._round
        plan = self._config.plan(round)
        plan = replace(plan, optimizer="adam", lr=options.fusion_lr, weight_decay=0.0)
        seed = job_seed(self._config.seed, round, "fusion")
        steps, batch = options.fusion_steps, options.fusion_batch
        return aggregate | self._ensemble.taught(aggregate, plan, steps, batch, seed), {}

    def state_dict(self) -> Tensors:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        check_shapes(state, {}, "checkpoint")


def public_inputs(config: RunConfig, options: FedDFOptions) -> Tensor:
    """(n, *input_shape) float32, or token ids. Raises DataError or ConfigError for what the model
    cannot take."""
    data, where = load_shard(options.public), f"--public {options.public}"
    is_other = bool(data.vocabulary) != bool(config.model.vocabulary)
    if is_other or data.input_shape != config.model.input_shape:
        raise ConfigError(
            f"{where} has examples of {data.input_shape}, expected {config.model.input_shape} as "
            "the run's own data; give others"
        )
    if found := mismatch(config.trained_on.scaling, data.input_scaling, ("the run's data", where)):
        if found.is_certain:
            raise ConfigError(found.text)
        log.warning("%s", found.text)
    rng = torch.Generator().manual_seed(job_seed(config.seed, 0, "public"))
    order = torch.randperm(len(data), generator=rng)[: options.public_examples]
    return torch.from_numpy(data.x)[order]


def check_public(config: RunConfig) -> None:
    if not (config.own and config.own.get("public")):
        raise ConfigError(
            "method 'feddf' distils on examples of the server's own; give --public, such as a "
            "folder of pictures like the clients' (their labels are not used)"
        )


@register_method(
    "feddf",
    paper=PAPER,
    options=FedDFOptions,
    without=("aggregation.rule", "aggregation.trim", "freeze"),
    check=check_public,
    on_device=OnDevice("depth", "M_e", "K_e"),
    tasks=ONLY_CLASSES,  # it distils a softmax
)
def feddf(config: RunConfig, device: TorchDevice, options: FedDFOptions) -> Method:
    """The prefix to the device's exit; the server distils their models' answers on a public set."""
    rule = Fusion(config, options, device)
    return DepthAveraging(config, rotation(config.rotation, config.seed), server_rule=rule)
