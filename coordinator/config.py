"""One run's settings: frozen, made once in the CLI, stored with the run.

A field with `flag` has a flag: its name, type, default and help are those of the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import msgspec
from msgspec import UNSET, Meta, UnsetType
from msgspec.structs import replace

from edge_sdk.data.contract import NOT_KNOWN, TrainedOn
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.fields import Index, Name, Option, Seconds
from edge_sdk.protocol.messages import (
    ModelSpec,
    Plan,
    Segment,
)
from edge_sdk.protocol.tensor_lists import frozen_prefixes

Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Decay: TypeAlias = Annotated[float, Meta(ge=0, lt=1)]
Rate: TypeAlias = Annotated[float, Meta(gt=0, le=1000)]
NotNegative: TypeAlias = Annotated[float, Meta(ge=0)]
Size: TypeAlias = Annotated[int, Meta(ge=1, le=2**16)]  # of a network or memory
# What a registered method, rule or generator has of its own, by name; left out where it has none.
Own: TypeAlias = dict[str, Any] | UnsetType
SPLITS = ("dirichlet", "iid", "subject")  # of the examples among emulated clients


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Frozen, checked settings."""


def flag(help: str, name: str = "", metavar: str = "", only: Sequence[str] = ()) -> Meta:
    """Makes a field a flag of the command line. name: by default the field's, with dashes. only:
    another flag and those of its values with which this one counts; elsewhere it is refused."""
    return Meta(description=help, extra={"flag": name, "metavar": metavar, "only": only})


SERVER_LR = "fedavgm: share of the step that is taken; fedadam, fedyogi: about a weight's step"
REFUSE = "refuse an update whose weights move over FACTOR medians of earlier ones, 0: none"
CLIP = "bound an update's movement to FACTOR medians of earlier ones, 0: off"
ROTATION = "a deeper stage for weak clients: beside their prefix, or instead of it"
DEADLINE = "seconds a job may take, devices plan for it"
GRACE = "seconds after the deadline before a round closes without its stragglers"
MODE = "async: a round ends with its quorum, the others go on and count later"
LATE = "an update of a round that is over: count it, for less, or not"
HALF_LIFE = "after which a late update counts half"
BACKBONES = "TOML of several models, one for each kind of device; see docs/adapters.md"
INIT = "weights that the model begins from, as safetensors or a torch state dict"
FREEZE = "not trained, and sent once: backbone (all stages), stages=1,2, or all but adapters"
ADJUSTMENT = "tau of logits shifted by a client's own label counts in training, 0: off"
HOLDOUT = "of each client's examples, set aside: they test the model that it receives"
EXIT_WEIGHTS = "of the joint loss, e.g. 1,1,2; default all ones"
# With which values of another flag a flag counts; a file of your own may take any flag. With which
# methods: coordinator/registry.py.
NETWORKS = ("--generator", "svd-mlp", "svd-mlp-residual", "naive-mlp")
GENERATING = (*NETWORKS, "update-regression")
FACTORS = ("--generator", "svd-mlp", "svd-mlp-residual", "update-regression")
ROTATING = ("--rotation", "add", "replace")
DISTILLING = ("--distill", "deep-to-shallow", "shallow-to-deep", "mutual", "auto")


class ServerOptions(Options, frozen=True, kw_only=True):
    """What happens to the aggregate; the same for every method. D = aggregate - w.

    damping p: D is taken times rho^p, rho the share of the cohort's weight that trained the tensor;
    0 is the owners' mean, 1 without a generator the stale copy of published code.
    The optimizer steps parameters; statistics of BatchNorm follow the aggregate.
    fedavgm: v <- momentum v + D, w <- w + lr v; 0 and 1 is the plain mean.
    fedadam, fedyogi (Reddi et al. 2021): m <- momentum m + (1 - momentum) D, second moment by
    beta2, w <- w + lr m / (sqrt(second) + tau); from the command line with ADAPTIVE.
    ema d: the served model is the d-weighted average of the globals, never fed back."""

    optimizer: Annotated[
        Literal["fedavgm", "fedadam", "fedyogi"],
        flag("of the step from the global model to the aggregate", "--server-optimizer"),
    ] = "fedavgm"
    momentum: Annotated[Decay, flag("momentum of the server's step", "--server-momentum")] = 0.0
    lr: Annotated[Rate, flag(SERVER_LR, "--server-lr")] = 1.0
    beta2: Decay = 0.99
    tau: Rate = 1e-3
    damping: Annotated[Share, flag("0 owners' mean, 1 stale copy")] = 0.0
    ema: Annotated[Decay, flag("decay of the served average", only=("--serve", "ema"))] = 0.8
    serve: Annotated[
        Literal["ema", "last"], flag("serve the moving average, or the last model")
    ] = "ema"


# By --optimizer, of local steps. Adam begins anew each round and moves every weight by about lr a
# step, whatever its gradient: with few steps on skewed labels clients then drift apart, and the
# mean over them loses to that by SGD with momentum (docs/results/label-skew.md).
LOCAL: Mapping[str, Mapping[str, Any]] = {
    "sgd": {"lr": 0.02, "momentum": 0.9},
    "adam": {"lr": 1e-3, "momentum": 0.0},
}
# What measured best for means over devices of unequal depth, and for their bound: a client's logits
# shifted by its own label counts, clients counting alike, a server that steps with momentum.
STEADY: Mapping[str, Any] = {
    "logit_adjustment": 1.0,
    "weighting": "equal",
    "server.momentum": 0.5,
    "server.lr": 0.75,
}
# A step of fedadam or fedyogi is about lr per weight, whatever the aggregate's: 1 would ruin a
# model in a round.
ADAPTIVE: Mapping[str, Any] = {"server.momentum": 0.9, "server.lr": 0.01}


class AggregationOptions(Options, frozen=True, kw_only=True):
    """How a round's updates become one model (aggregation/registry.py), and how far one may move
    (aggregation/border.py, methods/clipping.py).

    trim: share of a tensor's owners that trimmed-mean leaves out at each end of every coordinate.
    own: what a rule has beside these."""

    rule: Annotated[str, flag("how updates become one model", "--aggregation")] = "mean"
    trim: Annotated[
        float,
        Meta(ge=0, lt=0.5),
        flag("trimmed-mean: share at each end", only=("--aggregation", "trimmed-mean")),
    ] = 0.1
    refuse_above: Annotated[
        float, Meta(ge=0, le=1e6), flag(REFUSE, "--refuse-above", metavar="FACTOR")
    ] = 10.0
    clip: Annotated[float, Meta(ge=0, le=1e6), flag(CLIP, metavar="FACTOR")] = 0.0
    own: Own = UNSET


class GeneratorOptions(Options, frozen=True, kw_only=True):
    """What fills the stages that clients lack (generators/registry.py). Networks have the paper's
    settings, `hidden` is its code's. own: what a generator has beside these.

    generate: "conv" main weights only, "conv+bn" every parameter of a stage, "all" exits too.
    gain: weight of a generated tensor against a trained one; 0 is the owners' mean exactly."""

    name: Annotated[str, flag("what fills stages that a client lacks", "--generator")] = "none"
    generate: Annotated[
        Literal["conv", "conv+bn", "all"], flag("which tensors", only=GENERATING)
    ] = "conv"
    gain: Annotated[Share, flag("weight of generated tensors, 0 to 1", only=GENERATING)] = 1.0
    rank: Annotated[Size, flag("of factors, or of update-regression's memory", only=FACTORS)] = 100
    hidden: Annotated[Size, flag("width of the networks", only=NETWORKS)] = 512
    epochs: Annotated[Size, flag("of the networks, each round", "--fit-epochs", only=NETWORKS)] = 25
    lr: Rate = 5e-4
    owners_per_step: Annotated[
        int, Meta(ge=0, le=2**16), flag("0: all in one step", only=NETWORKS)
    ] = 0
    memory_rows: Annotated[
        int,
        Meta(ge=4, le=2**16),
        flag("updates that it remembers", only=("--generator", "update-regression")),
    ] = 30
    own: Own = UNSET


class RotationOptions(Options, frozen=True, kw_only=True):
    """Deeper stages for weak clients, over a frozen prefix (methods/rotation.py). add: beside the
    client's prefix, at most `stages` a round (0: all that it can hold and has time for); replace:
    one instead of it. draw: needy favours stages with few owners."""

    mode: Annotated[Literal["off", "add", "replace"], flag(ROTATION, "--rotation")] = "off"
    stages: Annotated[
        int,
        Meta(ge=0, le=100),
        flag("at most a round, 0: all", "--rotation-stages", only=ROTATING[:2]),
    ] = 1
    draw: Annotated[
        Literal["uniform", "needy"],
        flag("needy: rather stages with few owners", "--rotation-draw", only=ROTATING),
    ] = "uniform"


class DistillOptions(Options, frozen=True, kw_only=True):
    """Distillation between a client's exits; the weight rises linearly over `ramp_rounds`. auto:
    shallow-to-deep in rounds before which less than half as many clients trained the deepest stage
    as stage 1, counted over the run; there it helps, elsewhere it does nothing or harm."""

    direction: Annotated[
        Literal["none", "deep-to-shallow", "shallow-to-deep", "mutual", "auto"],
        flag("between a client's exits", "--distill"),
    ] = "none"
    weight: Annotated[
        float, Meta(ge=0, le=1000), flag("in the loss", "--distill-weight", only=DISTILLING)
    ] = 1.0
    temperature: Annotated[
        Rate, flag("of the softmax", "--distill-temperature", only=DISTILLING)
    ] = 1.0
    ramp_rounds: Annotated[
        int, Meta(ge=0), flag("rounds to the full weight", "--distill-ramp", only=DISTILLING)
    ] = 10

    def weight_at(self, round: int) -> float:
        if self.direction == "none":
            return 0.0
        return self.weight * min(1.0, round / self.ramp_rounds) if self.ramp_rounds else self.weight


BACKBONE_NAME = r"\A[a-z0-9][a-z0-9_-]{0,31}\Z"
BACKBONE_NAME_IN_WORDS = "1 to 32 small letters, digits, - or _"


class Backbone(Options, frozen=True, kw_only=True):
    """One of several models of a run, of unequal size: what `model` of the run tells of a single
    one. All else, such as inputs, outputs and adapters, is the run's. init: as RunConfig.init."""

    name: Annotated[str, Meta(pattern=BACKBONE_NAME)]
    family: Name
    exits: Annotated[int, Meta(ge=1, le=100)] = 1
    options: dict[Name, Option] = msgspec.field(default_factory=dict)
    init: str = ""


class RunConfig(Options, frozen=True, kw_only=True):
    """Everything that decides a run but the devices themselves. What goes into `plan` has the
    bounds of the wire's Plan besides; `checked` applies them.

    mode async (after FedBuff, Nguyen et al. 2022): a round is over when a quorum of those who have
    a job has returned; the others go on. late: an update of a round that is over counts in the one
    at hand, its movement times 0.5^(rounds / staleness_half_life), or not at all."""

    method: str
    model: ModelSpec  # exit = the number of exits of the whole model
    data: str = ""  # what the common test set comes from
    trained_on: TrainedOn = NOT_KNOWN  # scaling and class names of that data
    rounds: Annotated[Index, flag("of the whole run")]
    # The smallest first; (): `model` alone, which is otherwise one of the deepest of them.
    backbones: Annotated[
        tuple[Backbone, ...], Meta(max_length=100), flag(BACKBONES, metavar="FILE.toml")
    ] = ()
    init: Annotated[str, flag(INIT, metavar="FILE")] = ""
    freeze: Annotated[str, flag(FREEZE, metavar="WHAT")] = ""
    participants: Annotated[Index | None, flag("clients per round, default all")] = None
    epochs: Annotated[Index, flag("local epochs")] = 1
    batch_size: Annotated[int, Meta(ge=2), flag("of a local step")] = 32
    lr: Annotated[float, Meta(gt=0), flag("of local steps")] = LOCAL["sgd"]["lr"]
    lr_decay: Annotated[
        float, Meta(gt=0, le=1), flag("factor of --lr from one round to the next")
    ] = 1.0
    optimizer: Annotated[Literal["sgd", "adam"], flag("of local steps")] = "sgd"
    momentum: Annotated[Decay, flag("of local SGD", only=("--optimizer", "sgd"))] = LOCAL["sgd"][
        "momentum"
    ]
    seed: Annotated[int, Meta(ge=0, lt=2**31), flag("of all random draws")] = 0
    eval_every: Annotated[Index, flag("rounds from one evaluation to the next")] = 1
    eval_tail: Annotated[Index, flag("last rounds that are always evaluated")] = 1
    deadline_s: Annotated[Seconds, flag(DEADLINE, "--deadline")] = 0.0  # 0: none
    grace_s: Annotated[float, Meta(gt=0, le=10**9), flag(GRACE, "--grace")] = 600.0
    quorum: Annotated[Share, flag("share of participants that must return")] = 0.0  # at least one
    min_updates: Annotated[Index, flag("and so many of them at least")] = 1
    mode: Annotated[Literal["sync", "async"], flag(MODE)] = "sync"
    late: Annotated[Literal["accept", "drop"], flag(LATE)] = "accept"
    staleness_half_life: Annotated[
        Rate, flag(HALF_LIFE, metavar="ROUNDS", only=("--late", "accept"))
    ] = 2.0
    min_clients: Annotated[Index, flag("devices to wait for before the first round")] = 1
    exit_weights: Annotated[tuple[NotNegative, ...], flag(EXIT_WEIGHTS)] = ()
    weight_decay: Annotated[NotNegative, flag("added to the gradient, times the weights")] = 0.0
    prox_mu: Annotated[NotNegative, flag("FedProx's pull to the received weights")] = 0.0
    logit_adjustment: Annotated[NotNegative, flag(ADJUSTMENT, metavar="TAU")] = 0.0
    holdout: Annotated[Decay, flag(HOLDOUT, metavar="SHARE")] = 0.0
    weighting: Annotated[
        Literal["examples", "equal"], flag("of a client in the mean: its examples, or equal")
    ] = "examples"
    population: str = ""  # emulated clients: count, groups, split; a resumed run must have the same
    examples: Annotated[Index | None, flag("stratified subset of the training data")] = None
    test_examples: Annotated[Index | None, flag("stratified subset of the test data")] = None
    server: ServerOptions = ServerOptions()
    aggregation: AggregationOptions = AggregationOptions()
    generator: GeneratorOptions = GeneratorOptions()
    rotation: RotationOptions = RotationOptions()
    distill: DistillOptions = DistillOptions()
    own: Own = UNSET  # what the method has beside these

    @property
    def oldest(self) -> int:
        """Rounds after which an update counts no more: by then it would weigh a sixteenth."""
        if self.late == "drop" and self.mode == "sync":
            return 0
        return math.ceil(4 * self.staleness_half_life)

    @property
    def frozen(self) -> tuple[str, ...]:
        """What plans say of it; with adapters at least all stages. Raises ConfigError."""
        has_adapters = self.model.adapters is not None
        return frozen_prefixes(self.freeze, self.model.exit, has_adapters=has_adapters)

    @property
    def num_groups(self) -> int:
        """Kinds of emulated clients: one for each backbone, or for each exit."""
        return len(self.backbones) or self.model.exit

    def of_backbone(self, backbone: Backbone) -> RunConfig:
        """The same run of this backbone alone."""
        family, exit, options = backbone.family, backbone.exits, backbone.options
        model = replace(self.model, family=family, exit=exit, options=options)
        return replace(self, model=model, init=backbone.init, backbones=())

    def plan(self, round: int) -> Plan:
        """The training that devices are asked for in a round; segments and seed are set per job.
        The last round's costs most: it is what devices count with."""
        direction = self.distill.direction
        return Plan(
            segments=(Segment(first=1, last=self.model.exit),),
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=self.lr * self.lr_decay ** (round - 1),
            optimizer=self.optimizer,
            momentum=self.momentum,
            exit_weights=self.exit_weights,
            weight_decay=self.weight_decay,
            prox_mu=self.prox_mu,
            distill="shallow-to-deep" if direction == "auto" else direction,
            distill_weight=self.distill.weight_at(round),
            distill_temperature=self.distill.temperature,
            logit_adjustment=self.logit_adjustment if self.model.task == "classify" else 0.0,
            frozen=self.frozen,
            holdout=self.holdout,
        )

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


PARTS: dict[str, type[Options]] = {
    name: kind
    for name, kind in get_type_hints(RunConfig).items()
    if isinstance(kind, type) and issubclass(kind, Options)
}


def read_config(text: str, where: str) -> RunConfig:
    """Inverse of to_json. Raises ConfigError naming the field."""
    try:
        return msgspec.json.decode(text, type=RunConfig)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{where}: {error}; made by another version of edge-sdk?") from error
