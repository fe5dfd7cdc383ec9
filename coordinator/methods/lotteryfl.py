"""`lotteryfl`: LotteryFL (Li et al. 2021, arXiv 2008.03371). Each client looks for a small model of
its own within the global one: a mask of each layer's weights, which only loses entries. It gets
what its mask leaves; where that answers enough of its held-out examples right, it prunes the
smallest weights of each layer and begins again from the run's initial values (a plan's `prune`);
then it trains. A weight becomes the mean over the clients whose mask has it, else keeps its value.

Masks travel as bits beside the values that are left, initial values once. The server keeps each
client's mask, an eighth of a byte a weight; a client's model is the global one under its mask.

Deviations. Pruning is decided by examples that are held out and never trained on; published code
takes its test data. Biases and norms have no mask, as published, but begin again from copies:
published code goes on to train the initial values. A kept 0 stays kept. Nobody ends below
--prune-target, which published code misses by up to one --prune-share. A client prunes from an
accuracy of --prune-above on, published above it: of a few examples many reach just that. Weights:
by examples, published alike (--paper). The loss is of all exits. A device holds the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated

from msgspec import Meta, structs
from torch import Tensor

from coordinator.aggregation.server_optimizer import Server
from coordinator.aggregation.sliced import SlicedMean, cut
from coordinator.aggregation.staleness import rebase_late_updates
from coordinator.cohorts.base import Assignment, Client, ClientUpdate, Offer
from coordinator.cohorts.sampling import job_seed
from coordinator.config import Options, RunConfig, Share, flag
from coordinator.methods.base import Method, Metrics
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.width import WITHOUT, step_
from coordinator.personal.client_masks import ClientMasks
from edge_sdk.errors import ConfigError
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.masks import maskable, unpacked
from edge_sdk.protocol.messages import ModelSpec, Plan, Prune, Segment
from edge_sdk.protocol.tensors import Tensors, specs_of, with_prefix

DEFAULTS = {"holdout": 0.2, "server.serve": "last"}
SGD = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.5, "epochs": 10}
PAPER = {**SGD, "weighting": "equal", "holdout": 0.1, "server.serve": "last"}


class LotteryOptions(Options, frozen=True, kw_only=True):
    prune_share: Annotated[float, Meta(gt=0, lt=1), flag("of a layer's weights, at once")] = 0.2
    prune_target: Annotated[
        float, Meta(gt=0, le=1), flag("share of its weights at which a client prunes no more")
    ] = 0.5
    prune_above: Annotated[Share, flag("accuracy on its hold-out from which a client prunes")] = 0.5


class LotteryFL:
    """One global model and a mask of it for each client."""

    def __init__(self, config: RunConfig, options: LotteryOptions) -> None:
        self.spec = config.model
        self._config = config
        share, target = options.prune_share, options.prune_target
        self._prune = Prune(share=share, target=target, threshold=options.prune_above)
        model, tensors = build(self.spec), initial_tensors(self.spec, config.seed)
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self._parameters = {name for name, _ in model.named_parameters()}
        self.server = Server(tensors, self._parameters, config.server)
        initial = {name: tensors[name] for name in tensors if name in self._parameters}
        self._masks = ClientMasks(initial, maskable(model))

    def offer(self) -> Offer:
        return Offer(self.spec, self._plan(self._config.rounds), (self.spec,))

    def _plan(self, round: int) -> Plan:
        segments = (Segment(first=1, last=self.spec.exit),)
        return structs.replace(self._config.plan(round), segments=segments, prune=self._prune)

    def assign(self, client: Client, round: int) -> Assignment:
        down, beside = self._masks.sent_to(client.id, self.server.globals)
        plan = structs.replace(
            self._plan(round), seed=job_seed(self._config.seed, round, client.id)
        )
        return Assignment(self.spec, plan, down | beside, specs_of(down))

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> Metrics:
        metrics, mean, held = Metrics(), SlicedMean(self.server.globals), dict(self._masks.held)
        for update in updates:
            weight = update.weight(self._config.weighting)
            tensors, masks = self._unpacked(update)
            mean.add_(cut(tensors, masks), weight, masks)
            name, state_round = update.client.id, update.message.state_round
            held[name] = self._masks.after(name, masks, state_round)
            metrics.num_updates += 1
        if metrics.num_updates and step_(self.server, mean, self._parameters, round, metrics):
            self._masks.held = held
        return metrics

    def _unpacked(self, update: ClientUpdate) -> tuple[Tensors, Tensors]:
        """Its weights, of a late one as if it had begun from those of now, and its masks."""
        tensors, masks = unpacked(update.tensors, self._shapes)
        if not update.staleness:
            return tensors, masks
        late = replace(update, tensors=tensors, sent=unpacked(update.sent, self._shapes)[0])
        now, half_life = self.server.globals, self._config.staleness_half_life
        (late,) = rebase_late_updates([late], now, self._parameters, half_life)
        return late.tensors, masks

    def current(self) -> Tensors:
        return self.server.globals

    def begin_from(self, tensors: Tensors) -> None:
        self.server.globals = self.server.globals | tensors
        self._masks.initial |= {n: t.clone() for n, t in tensors.items() if n in self._parameters}

    def served(self) -> Tensors:
        return self.server.served()

    def deployed(self, client: Client) -> tuple[ModelSpec, Tensors]:
        """The client's own model: the global one under its mask."""
        served, masks = self.served(), self._masks.of(client.id)
        return self.spec, served | {name: served[name] * mask for name, mask in masks.items()}

    def state_dict(self) -> Tensors:
        state = {f"server/{name}": tensor for name, tensor in self.server.state_dict().items()}
        return state | self._masks.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        rest = {name: tensor for name, tensor in state.items() if not name.startswith("server/")}
        self.server.load_state_dict(with_prefix(state, "server/"))
        self._masks.load_state_dict(rest)


def check_holdout(config: RunConfig) -> None:
    if not config.holdout:
        raise ConfigError("method 'lotteryfl' prunes by a hold-out; give --holdout, such as 0.2")


@register_method(
    "lotteryfl",
    defaults=DEFAULTS,
    paper=PAPER,
    options=LotteryOptions,
    without=WITHOUT,
    check=check_holdout,
    on_device=OnDevice("nothing: the whole model", "M and K", "s K + K / 32", "initial values"),
    is_personal=True,
    tasks=("classify", "multilabel", "tokens"),  # whose metric is a share, as --prune-above is
)
def lotteryfl(config: RunConfig, device: TorchDevice, options: LotteryOptions) -> Method:
    """Each client prunes the global model to a small one of its own, by what it holds out."""
    return LotteryFL(config, options)
