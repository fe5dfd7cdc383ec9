"""`fedhm`: FedHM (Yao et al. 2021, arXiv 2111.14655). Each client trains the model at the rank that
it can hold, with two factors in the place of each layer after the first stage (what is factorised:
edge_sdk/models/factorised.py). The server cuts the factors from the global weights by their largest
singular values, multiplies those that return, and averages weights of full rank.

As published: where nobody trained the whole model, the global one counts as one more client, so
that what low ranks leave out is not lost at once. With --rank-tau T a client of rank r weighs
exp(-1 / (r T)) of the usual, as published for capacities that change.

Deviations. Weights: by examples, published 1 / n (--paper). Classifier rows: of all clients,
published those with the label. Loss: of all exits. Left out: the decay of the product, which
published code does not use, and BatchNorm between factors. 8 s of a core a round for resnet18."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated

import torch
from msgspec import Meta, structs
from torch import Tensor

from coordinator.aggregation.mean import Kernel
from coordinator.cohorts.base import Assignment, Client, ClientUpdate, Offer
from coordinator.config import NotNegative, Options, RunConfig, flag
from coordinator.methods.base import Method, Metrics
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.registry import OnDevice, TorchDevice, register_method
from coordinator.methods.rotation import fixed
from coordinator.methods.server_rule import OwnersMeanAlone
from edge_sdk.errors import CapacityError
from edge_sdk.models import build
from edge_sdk.models.checking import check_family
from edge_sdk.models.factorised import factor_ranks, lowered, raised
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensors import Tensors, specs_of

Rank = Annotated[float, Meta(gt=0, le=1)]
Ranks = Annotated[tuple[Rank, ...], Meta(min_length=1, max_length=100)]
PAPER = {"weighting": "equal", "server.serve": "last"}  # rate, epochs and batch: not known to us


class FedHMOptions(Options, frozen=True, kw_only=True):
    ranks: Annotated[Ranks, flag("shares of a layer's rank to choose")] = (0.125, 0.25, 0.5, 1.0)
    rank_tau: Annotated[NotNegative, flag("the smaller, the less low ranks weigh; 0: alike")] = 0.0
    global_vote: Annotated[bool, flag("the global model counts where none had it whole")] = True


class RankMean(OwnersMeanAlone):
    """The ServerRule of weights that came as factors, and are whole again."""

    def __init__(self, options: FedHMOptions) -> None:
        self._options = options

    def begin(self, round: int) -> None:
        self._ranks: list[float] = []
        self._usual = self._total = 0.0

    def add_(self, mean: Kernel, update: ClientUpdate, weight: float, sent: Tensors) -> None:
        rank, tau = update.model.rank if update.model else 1.0, self._options.rank_tau
        counts = weight * math.exp((1 - 1 / rank) / tau) if tau else weight
        mean.add_(update.tensors, counts)
        self._ranks.append(rank)
        self._usual += weight
        self._total += counts

    def stepped(self, mean: Kernel, aggregate: Tensors, sent: Tensors) -> tuple[Tensors, Tensors]:
        if 1.0 in self._ranks or not self._options.global_vote:
            return aggregate, {}
        share = (vote := self._usual / len(self._ranks)) / (self._total + vote)
        floats = {name: t for name, t in aggregate.items() if t.is_floating_point()}
        return aggregate | {n: torch.lerp(t, sent[n], share) for n, t in floats.items()}, {}


class FedHM:
    """Whole weights in the server, factors at the clients."""

    def __init__(self, config: RunConfig, options: FedHMOptions) -> None:
        self.spec = config.model
        ranks = sorted(set(options.ranks))
        self._variants = tuple(structs.replace(self.spec, rank=rank) for rank in ranks)
        for model in self._variants:
            check_family(model)
        self._ranks = [factor_ranks(build(self.spec), rank) for rank in ranks]
        self._names = {name for ranks in self._ranks for name in ranks}
        self._whole = DepthAveraging(config, fixed(self.spec.exit), server_rule=RankMean(options))
        self._lowered: tuple[Tensors, list[Tensors]] | None = None

    def offer(self) -> Offer:
        return Offer(self.spec, self._whole.offer().plan, self._variants)

    def assign(self, client: Client, round: int) -> Assignment:
        """Raises CapacityError for a client that holds none of the variants."""
        if not 1 <= client.variant <= len(self._variants):
            raise CapacityError(f"{client.id} holds none of the {len(self._variants)} models")
        job, model = self._whole.assign(client, round), self._variants[client.variant - 1]
        down = dict(self._at_ranks(self.current())[client.variant - 1])
        return replace(job, model=model, tensors=down, returns=specs_of(down))

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> Metrics:
        return self._whole.aggregate(round, map(self._raised, updates))

    def _raised(self, update: ClientUpdate) -> ClientUpdate:
        """With whole weights; of a late update those of now, moved as its own were."""
        tensors = raised(update.tensors, self._names)
        if update.staleness:
            now = self.current()
            for name, began in raised(update.sent, self._names).items():
                tensors[name] = now[name] + (tensors[name] - began)
        return replace(update, tensors=tensors, sent={})

    def current(self) -> Tensors:
        return self._whole.current()

    def begin_from(self, tensors: Tensors) -> None:
        self._whole.begin_from(tensors)

    def served(self) -> Tensors:
        return self._whole.served()

    def deployed(self, client: Client) -> tuple[ModelSpec, Tensors]:
        """At the client's rank; the whole model where that is not known."""
        place = (client.variant or len(self._variants)) - 1
        return self._variants[place], self._at_ranks(self.served())[place]

    def _at_ranks(self, whole: Tensors) -> list[Tensors]:
        """The tensors of each variant: the same for all clients, until the model is another."""
        if self._lowered is None or self._lowered[0] is not whole:
            self._lowered = whole, lowered(whole, self._ranks)
        return self._lowered[1]

    def state_dict(self) -> Tensors:
        return self._whole.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._whole.load_state_dict(state)


@register_method(
    "fedhm",
    options=FedHMOptions,
    paper=PAPER,
    without=("freeze",),
    on_device=OnDevice("the highest of --ranks", "M with factors", "about 2/3 w K"),
)
def fedhm(config: RunConfig, device: TorchDevice, options: FedHMOptions) -> Method:
    """Each client trains two factors of each layer after stage 1, of the rank that it can hold."""
    return FedHM(config, options)
