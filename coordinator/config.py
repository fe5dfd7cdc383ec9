"""One run's settings: frozen, made once in the CLI, stored with the run."""

from __future__ import annotations

import math
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import Meta

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.messages import Index, ModelSpec, Plan, Seconds, Segment

Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Size: TypeAlias = Annotated[int, Meta(ge=1, le=2**16)]  # of a network or memory
SPLITS = ("dirichlet", "iid", "subject")  # of the examples among emulated clients


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frozen, checked settings."""


class ServerOptions(Options, frozen=True, kw_only=True):
    """What happens to the aggregate; the same for every method. D = aggregate - w.

    damping p: D is taken times rho^p, rho the share of the cohort's weight that trained the tensor;
    0 is the owners' mean, 1 without a generator the stale copy of published code.
    The optimizer steps parameters; statistics of BatchNorm follow the aggregate. Its momentum and
    lr: 0 and 1 for fedavgm, 0.9 and 0.01 for the others unless a method has its own (defaults.py).
    fedavgm: v <- momentum v + D, w <- w + lr v; 0 and 1 is the plain mean.
    fedadam, fedyogi (Reddi et al. 2021): m <- momentum m + (1 - momentum) D, second moment by
    beta2, w <- w + lr m / (sqrt(second) + tau).
    ema d: the served model is the d-weighted average of the globals, never fed back."""

    optimizer: Literal["fedavgm", "fedadam", "fedyogi"] = "fedavgm"
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    lr: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    beta2: Annotated[float, Meta(ge=0, lt=1)] = 0.99
    tau: Annotated[float, Meta(gt=0, le=1000)] = 1e-3
    damping: Share = 0.0
    ema: Annotated[float, Meta(ge=0, lt=1)] = 0.8
    serve: Literal["ema", "last"] = "ema"


class AggregationOptions(Options, frozen=True, kw_only=True):
    """How a round's updates become one model (robust.py), and how far one may move
    (methods/clipping.py).

    trim: share of a tensor's owners that trimmed-mean leaves out at each end of every coordinate.
    clip: a stage's movement is cut to so many times the median of earlier ones; 0: as it is."""

    rule: Literal["mean", "trimmed-mean", "median", "norm-bounded"] = "mean"
    trim: Annotated[float, Meta(ge=0, lt=0.5)] = 0.1
    clip: Annotated[float, Meta(ge=0, le=1e6)] = 0.0


class GeneratorOptions(Options, frozen=True, kw_only=True):
    """What fills the stages that clients lack; see generators/. Networks have the paper's settings,
    `hidden` is its code's.

    generate: "conv" main weights only, "conv+bn" every parameter of a stage, "all" exits too.
    gain: weight of a generated tensor against a trained one; 0 is the owners' mean exactly.
    rank: of the factors that networks see, and of update-regression's memory."""

    name: Literal["none", "svd-mlp", "naive-mlp", "svd-mlp-residual", "update-regression"] = "none"
    generate: Literal["conv", "conv+bn", "all"] = "conv"
    gain: Share = 1.0
    rank: Size = 100
    hidden: Size = 512
    epochs: Size = 25
    lr: Annotated[float, Meta(gt=0, le=1000)] = 5e-4
    owners_per_step: Annotated[int, Meta(ge=0, le=2**16)] = 0  # 0: all of a round in one step
    memory_rows: Annotated[int, Meta(ge=4, le=2**16)] = 30


class RotationOptions(Options, frozen=True, kw_only=True):
    """Deeper stages for weak clients, over a frozen prefix (methods/rotation.py). add: beside the
    client's prefix, at most `stages` a round (0: all that it can hold and has time for); replace:
    one instead of it. draw: needy favours stages with few owners."""

    mode: Literal["off", "add", "replace"] = "off"
    stages: Annotated[int, Meta(ge=0, le=100)] = 1
    draw: Literal["uniform", "needy"] = "uniform"


class DistillOptions(Options, frozen=True, kw_only=True):
    """Distillation between a client's exits; the weight rises linearly over `ramp_rounds`. auto:
    shallow-to-deep in rounds before which less than half as many clients trained the deepest stage
    as stage 1, counted over the run; there it helps, elsewhere it does nothing or harm."""

    direction: Literal["none", "deep-to-shallow", "shallow-to-deep", "mutual", "auto"] = "none"
    weight: Annotated[float, Meta(ge=0, le=1000)] = 1.0
    temperature: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    ramp_rounds: Annotated[int, Meta(ge=0)] = 10

    def weight_at(self, round: int) -> float:
        if self.direction == "none":
            return 0.0
        return self.weight * min(1.0, round / self.ramp_rounds) if self.ramp_rounds else self.weight


class RunConfig(Options, frozen=True, kw_only=True):
    """Everything that decides a run but the devices themselves. What goes into `plan` has the
    bounds of the wire's Plan besides; `checked` applies them.

    mode async (after FedBuff, Nguyen et al. 2022): a round is over when a quorum of those who have
    a job has returned; the others go on. late: an update of a round that is over counts in the one
    at hand, its movement times 0.5^(rounds / staleness_half_life), or not at all."""

    method: str
    model: ModelSpec  # exit = the number of exits of the whole model
    data: str = ""  # what the common test set comes from
    rounds: Index
    participants: Index | None = None  # None: every client
    epochs: Index = 1
    batch_size: Annotated[int, Meta(ge=2)] = 32
    lr: Annotated[float, Meta(gt=0)] = 1e-3
    optimizer: Literal["sgd", "adam"] = "adam"
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    eval_every: Index = 1
    eval_tail: Index = 1  # so many last rounds are evaluated in any case
    deadline_s: Seconds = 0.0  # what devices plan for; 0: none
    grace_s: Annotated[float, Meta(gt=0, le=10**9)] = 600.0  # how much longer the coordinator waits
    quorum: Share = 0.0  # share of the participants that must return, one at least
    min_updates: Index = 1  # and so many of them
    mode: Literal["sync", "async"] = "sync"
    late: Literal["accept", "drop"] = "accept"
    staleness_half_life: Annotated[float, Meta(gt=0, le=1000)] = 2.0  # rounds
    min_clients: Index = 1  # devices to wait for before the first round
    exit_weights: tuple[Annotated[float, Meta(ge=0)], ...] = ()  # of the joint loss; (): all ones
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    prox_mu: Annotated[float, Meta(ge=0)] = 0.0  # FedProx, on any method
    weighting: Literal["examples", "equal"] = "examples"  # of clients in the mean
    population: str = ""  # emulated clients: count, groups, split; a resumed run must have the same
    examples: Index | None = None  # stratified subsets, None: all
    test_examples: Index | None = None
    server: ServerOptions = ServerOptions()
    aggregation: AggregationOptions = AggregationOptions()
    generator: GeneratorOptions = GeneratorOptions()
    rotation: RotationOptions = RotationOptions()
    distill: DistillOptions = DistillOptions()

    @property
    def oldest(self) -> int:
        """Rounds after which an update counts no more: by then it would weigh a sixteenth."""
        if self.late == "drop" and self.mode == "sync":
            return 0
        return math.ceil(4 * self.staleness_half_life)

    def plan(self, round: int) -> Plan:
        """The training that devices are asked for in a round; segments and seed are set per job.
        The last round's costs most: it is what devices count with."""
        return Plan(
            segments=(Segment(first=1, last=self.model.exit),),
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr,
            optimizer=self.optimizer,
            momentum=self.momentum,
            exit_weights=self.exit_weights,
            weight_decay=self.weight_decay,
            prox_mu=self.prox_mu,
            distill="shallow-to-deep"
            if self.distill.direction == "auto"
            else self.distill.direction,
            distill_weight=self.distill.weight_at(round),
            distill_temperature=self.distill.temperature,
        )

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


def read_config(text: str, where: str) -> RunConfig:
    """Inverse of to_json. Raises ConfigError naming the field."""
    try:
        return msgspec.json.decode(text, type=RunConfig)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{where}: {error}; made by another version of edge-sdk?") from error
