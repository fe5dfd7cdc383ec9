"""One run's settings: frozen, made once in the CLI, stored with the run."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edge_sdk.errors import ConfigError
from edge_sdk.wire import ModelSpec, Plan, Segment

Share = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(ge=1)]


class ServerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens to the aggregate; the same for every method.

    momentum b and lr a: v <- b v + (aggregate - w), w <- w + a v on parameters; statistics of
    BatchNorm follow the aggregate. 0 and 1 is the plain mean. ema d: the served model is the
    d-weighted average of the globals, never fed back into training."""

    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    lr: Annotated[float, Meta(gt=0)] = 1.0
    ema: Annotated[float, Meta(ge=0, lt=1)] = 0.8
    serve: Literal["ema", "last"] = "ema"


class GeneratorOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The paper's factorised hypernetworks; defaults are its settings, `hidden` is its code's.

    gain: weight of a generated tensor against a trained one; 0 is the owners' mean exactly."""

    gain: Share = 1.0
    rank: Positive = 100
    hidden: Positive = 512
    epochs: Positive = 25
    lr: Annotated[float, Meta(gt=0)] = 5e-4


class RunConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides a run but the devices themselves."""

    method: str
    model: ModelSpec  # exit = the number of exits of the whole model
    data: str = ""  # what the common test set comes from
    rounds: Positive
    participants: Positive | None = None  # None: every client
    epochs: Positive = 1
    batch_size: Annotated[int, Meta(ge=2)] = 32
    lr: Annotated[float, Meta(gt=0)] = 1e-3
    optimizer: Literal["sgd", "adam"] = "adam"
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Meta(ge=0, lt=2**31)] = 0
    eval_every: Positive = 1
    eval_tail: Positive = 1  # so many last rounds are evaluated in any case
    deadline_s: Annotated[float, Meta(ge=0)] = 0.0  # what devices plan for; 0: none
    grace_s: Annotated[float, Meta(gt=0)] = 600.0  # how much longer the coordinator waits
    quorum: Share = 0.5  # share of the participants that must return
    min_clients: Positive = 1  # devices to wait for before the first round
    exit_weights: tuple[Annotated[float, Meta(ge=0)], ...] = ()  # of the joint loss; (): all ones
    weight_decay: Annotated[float, Meta(ge=0)] = 0.0
    prox_mu: Annotated[float, Meta(ge=0)] = 0.0  # FedProx, on any method
    weighting: Literal["examples", "equal"] = "examples"  # of clients in the mean
    population: str = ""  # emulated clients: count, groups, split; a resumed run must have the same
    examples: Positive | None = None  # stratified subsets, None: all
    test_examples: Positive | None = None
    server: ServerOptions = ServerOptions()
    generator: GeneratorOptions = GeneratorOptions()

    def plan(self) -> Plan:
        """The training that every device is asked for; segments and seed are set per job."""
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
        )

    def to_json(self) -> str:
        return msgspec.json.encode(self).decode()


def read_config(text: str, where: str) -> RunConfig:
    """Inverse of to_json. Raises ConfigError naming the field."""
    try:
        return msgspec.json.decode(text, type=RunConfig)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{where}: {error}; made by another version of edge-sdk?") from error


def checked(config: RunConfig) -> RunConfig:
    """The same config, its constraints checked: a struct made in Python is not by itself."""
    try:
        good = msgspec.convert(msgspec.to_builtins(config), type=RunConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"setting refused: {error}; see --help") from error
    if good.exit_weights and len(good.exit_weights) != good.model.exit:
        raise ConfigError(
            f"{len(good.exit_weights)} exit weights for {good.model.exit} exits; give one each"
        )
    return good
