"""What HeteroFL, FedRolex and ScaleFL share: each client trains the widest model that it can hold
of those that the method offers, which is a part of the whole one, channel by channel
(edge_sdk/models/widths.py); each element becomes the mean over those who held it
(aggregation/sliced.py).

Classifier rows. Of a plan with masked cross entropy a device returns the rows of classes that it
has no example of as they came, bit by bit; a row that did not move is taken as not held. So nothing
is told beside the weights, no list or mask of a client's labels: whoever sees rows that are
averaged by owner sees as much. Statistics of BatchNorm are averaged like weights.

Robust rules and --clip compare whole tensors of all clients, so they have no place here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from msgspec.structs import replace
from torch import Tensor

from coordinator.aggregation.server_optimizer import Server
from coordinator.aggregation.sliced import SlicedMean, cut
from coordinator.aggregation.staleness import rebase_late_updates
from coordinator.cohorts.base import Assignment, Client, ClientUpdate, Offer
from coordinator.cohorts.sampling import job_seed
from coordinator.config import RunConfig
from coordinator.methods.base import Metrics
from edge_sdk.errors import CapacityError, ShapeError
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.scaling import scaled_names
from edge_sdk.models.widths import slice_of
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors, check_shapes, specs_of, with_prefix
from edge_sdk.protocol.timing import Stopwatch

log = logging.getLogger(__name__)
# (the settings' plan of a round, the client's model, the round, 0: any) -> the plan of its job
PlanRule: TypeAlias = Callable[[Plan, ModelSpec, int], Plan]


# Settings without a place here: these compare whole tensors.
WITHOUT = ("aggregation.rule", "aggregation.clip")


def variants_of(spec: ModelSpec, widths: Sequence[float]) -> tuple[ModelSpec, ...]:
    """The whole model at these shares of its channels, cheapest first."""
    return tuple(replace(spec, width=width * spec.width) for width in sorted(set(widths)))


@dataclass(frozen=True)
class Slice:
    """A narrow model of the whole one: where its tensors lie, and what they are."""

    parts: Mapping[str, tuple[Tensor | None, ...]]
    tensors: Tensors


def slice_from(whole: Tensors, spec: ModelSpec, model: ModelSpec, shift: int) -> Slice:
    """whole: the tensors of `spec`. Raises ConfigError for a family that cannot be cut."""
    parts = slice_of(replace(spec, exit=model.exit), model.width, shift)
    return Slice(parts, cut({name: whole[name] for name in parts}, parts))


def step_(
    server: Server, mean: SlicedMean, parameters: Collection[str], round: int, metrics: Metrics
) -> bool:
    """Take the server's step to the mean of those who held each element. False, and nothing is
    changed, where finite updates, or --server-lr, would make it infinite."""
    try:
        server.step(mean.result(), {name: mean.owned(name) for name in parameters})
    except ShapeError as error:
        log.error("round %d: %s; the global model stays as it was", round, error)
        metrics.values["aggregate_refused"] = 1.0
        return False
    return True


class WidthAveraging:
    """variants: the models that clients choose among, cheapest first; shift: by how many channels
    the parts of a round's jobs are moved."""

    def __init__(
        self,
        config: RunConfig,
        variants: tuple[ModelSpec, ...],
        plan_rule: PlanRule,
        shift: Callable[[int], int] = lambda round: 0,
    ) -> None:
        self.spec = config.model
        self._config = config
        self._variants = variants
        self._plan_rule = plan_rule
        self._shift = shift
        self._parameters = {name for name, _ in build(self.spec).named_parameters()}
        self.server = Server(
            initial_tensors(self.spec, config.seed), self._parameters, config.server
        )
        self._slices: dict[tuple[int, float, int], Slice] = {}  # of the globals, until they change
        for model in variants:
            self._slice(model, 1)  # a family that cannot be cut begins no run

    def offer(self) -> Offer:
        config = self._config
        plan = self._plan_rule(config.plan(config.rounds), self.spec, config.rounds)
        return Offer(self.spec, plan, self._variants)

    def assign(self, client: Client, round: int) -> Assignment:
        """Raises CapacityError for a client that holds none of the variants."""
        if not 1 <= client.variant <= len(self._variants):
            raise CapacityError(f"{client.id} holds none of the {len(self._variants)} models")
        model = self._variants[client.variant - 1]
        down = dict(self._slice(model, round).tensors)
        plan = replace(
            self._plan_rule(self._config.plan(round), model, round),
            segments=(Segment(first=1, last=model.exit),),
            seed=job_seed(self._config.seed, round, client.id),
        )
        return Assignment(model=model, plan=plan, tensors=down, returns=specs_of(down))

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> Metrics:
        metrics, watch = Metrics(), Stopwatch()
        mean = SlicedMean(self.server.globals)
        for update in updates:
            weight = float(update.num_examples) if self._config.weighting == "examples" else 1.0
            with watch("aggregate"):
                self._add_(mean, update, weight, round)
            metrics.num_updates += 1
        if metrics.num_updates:
            metrics.values["coverage"] = mean.coverage()
            with watch("aggregate"):
                step_(self.server, mean, self._parameters, round, metrics)
                self._slices = {}
        metrics.phases |= watch.phases
        return metrics

    def _add_(self, mean: SlicedMean, update: ClientUpdate, weight: float, round: int) -> None:
        model = update.model or self._variants[update.client.variant - 1]
        began = update.round or round  # an emulated client's message names none
        held = self._slice(model, began)
        if update.staleness and update.sent:
            half_life = self._config.staleness_half_life
            late = rebase_late_updates([update], held.tensors, self._parameters, half_life)
            update = next(late)
        tensors, parts = dict(update.tensors), dict(held.parts)
        is_masked = self._plan_rule(self._config.plan(began), model, began).mask_absent
        for name, tensor in update.tensors.items() if is_masked else ():
            if stage_of(name)[0] == "exits" and tensor.shape[:1] == (self.spec.num_classes,):
                rows = (tensor != held.tensors[name]).reshape(len(tensor), -1).any(1)
                tensors[name] = tensor[rows]
                parts[name] = (rows.nonzero().flatten(), *held.parts[name][1:])
        mean.add_(tensors, weight, parts)

    def _slice(self, model: ModelSpec, round: int) -> Slice:
        """The same tensors for all clients of a variant."""
        key = model.exit, model.width, self._shift(round)
        if key not in self._slices:
            self._slices[key] = slice_from(self.server.globals, self.spec, model, key[2])
        return self._slices[key]

    def current(self) -> Tensors:
        return self.server.globals

    def begin_from(self, tensors: Tensors) -> None:
        self.server.globals = self.server.globals | tensors
        self._slices = {}

    def served(self) -> Tensors:
        return self.server.served()

    def deployed(self, client: Client) -> tuple[ModelSpec, Tensors]:
        """The first channels of the served model. Where narrow models train with their layers'
        outputs divided by the width, the division is in the weights: a model that is deployed
        stands alone."""
        model = self._variants[max(1, client.variant) - 1]
        held = slice_from(self.served(), self.spec, model, 0).tensors
        plan = self._plan_rule(self._config.plan(self._config.rounds), model, self._config.rounds)
        if plan.scaler == "none":
            return model, held
        return model, held | {name: held[name] / model.width for name in scaled_names(build(model))}

    def state_dict(self) -> Tensors:
        return {f"server/{name}": tensor for name, tensor in self.server.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        rest = {name: tensor for name, tensor in state.items() if not name.startswith("server/")}
        check_shapes(rest, {}, "checkpoint")
        self.server.load_state_dict(with_prefix(state, "server/"))
        self._slices = {}
