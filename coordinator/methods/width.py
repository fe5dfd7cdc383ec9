"""What HeteroFL, FedRolex and ScaleFL share: each client trains the widest model that it can hold
of those that the method offers, which is a part of the whole one, channel by channel
(edge_sdk/models/widths.py); each element becomes the mean over those who held it
(aggregation/sliced.py).

Classifier rows. Of a plan with masked cross entropy a device returns the rows of classes that it
has no example of as they came, bit by bit; a row that did not move is taken as not held. So nothing
is told beside the weights, no list or mask of a client's labels: whoever sees rows that are
averaged by owner sees as much. Statistics of BatchNorm: aggregation/statistics.py.

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
from coordinator.aggregation.statistics import ModelStatistics
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


# Settings without a place here: these are of whole tensors.
WITHOUT = ("aggregation.rule", "aggregation.clip", "freeze")


def variants_of(spec: ModelSpec, widths: Sequence[float]) -> tuple[ModelSpec, ...]:
    """The whole model at these shares of its channels, cheapest first."""
    return tuple(replace(spec, width=width * spec.width) for width in sorted(set(widths)))


@dataclass(frozen=True)
class Slice:
    """A narrow model of the whole one: where its tensors lie, and what they are."""

    parts: Mapping[str, tuple[Tensor | None, ...]]
    tensors: Tensors


def step_(
    server: Server,
    mean: SlicedMean,
    parameters: Collection[str],
    round: int,
    metrics: Metrics,
    settled: Callable[[SlicedMean], Tensors] = SlicedMean.result,
) -> bool:
    """Take the server's step to the mean of those who held each element. settled: makes the next
    model of it. False, and nothing is changed, where finite updates, or --server-lr, would make it
    infinite."""
    try:
        server.step(settled(mean), {name: mean.owned(name) for name in parameters})
    except ShapeError as error:
        log.error("round %d: %s; the global model stays as it was", round, error)
        metrics.values["aggregate_refused"] = 1.0
        return False
    return True


class WidthAveraging:
    """variants: the models that clients choose among, cheapest first; shift: by how many channels
    the parts of a round's jobs are moved; is_redrawn: each job has one of the models up to the
    client's, all as likely."""

    def __init__(
        self,
        config: RunConfig,
        variants: tuple[ModelSpec, ...],
        plan_rule: PlanRule,
        shift: Callable[[int], int] = lambda round: 0,
        *,
        is_redrawn: bool = False,
    ) -> None:
        self.spec = config.model
        self._config = config
        self._variants = variants
        self._plan_rule = plan_rule
        self._shift = shift
        self._is_redrawn = is_redrawn
        self._parameters = {name for name, _ in build(self.spec).named_parameters()}
        whole = initial_tensors(self.spec, config.seed)
        self._names = list(whole)
        statistics = [name for name in whole if name not in self._parameters]
        self._statistics = ModelStatistics(statistics, len(variants))
        beside = self._statistics.beside(whole)
        self.server = Server(whole | beside, self._parameters, config.server)
        self._forget()
        for model in variants:
            self._slice(model, 1)  # a family that cannot be cut begins no run

    def _forget(self) -> None:
        """What was made of the globals: they are others now."""
        self._current = self._model_in(self.server.globals)
        self._slices: dict[tuple[int, int], Slice] = {}  # by place among the variants, and shift

    def _model_in(self, tensors: Tensors) -> Tensors:
        """Without the statistics beside it."""
        return {name: tensors[name] for name in self._names}

    def offer(self) -> Offer:
        config = self._config
        plan = self._plan_rule(config.plan(config.rounds), self.spec, config.rounds)
        return Offer(self.spec, plan, self._variants)

    def assign(self, client: Client, round: int) -> Assignment:
        """Raises CapacityError for a client that holds none of the variants."""
        if not 1 <= client.variant <= len(self._variants):
            raise CapacityError(f"{client.id} holds none of the {len(self._variants)} models")
        model = self._variants[self._drawn(client, round) - 1]
        down = dict(self._slice(model, round).tensors)
        plan = replace(
            self._plan_rule(self._config.plan(round), model, round),
            segments=(Segment(first=1, last=model.exit),),
            seed=job_seed(self._config.seed, round, client.id),
        )
        return Assignment(model=model, plan=plan, tensors=down, returns=specs_of(down))

    def _drawn(self, client: Client, round: int) -> int:
        """The place of its model in this round."""
        if not self._is_redrawn:
            return client.variant
        return 1 + job_seed(self._config.seed, round, f"width/{client.id}") % client.variant

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> Metrics:
        metrics, watch = Metrics(), Stopwatch()
        mean = SlicedMean(self.server.globals)
        for update in updates:
            weight = update.weight(self._config.weighting)
            with watch("aggregate"):
                self._add_(mean, update, weight, round)
            metrics.num_updates += 1
        if metrics.num_updates:
            metrics.values["coverage"] = mean.coverage(self._parameters)
            with watch("aggregate"):
                settled = self._statistics.settled
                if step_(self.server, mean, self._parameters, round, metrics, settled):
                    self._forget()
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
        is_masked = self._plan_rule(self._config.plan(began), model, began).mask_absent
        for name, tensor in update.tensors.items():
            part = held.parts[name]
            if is_masked and self._is_by_class(name, tensor):
                rows = (tensor != held.tensors[name]).reshape(len(tensor), -1).any(1)
                tensor, part = tensor[rows], (rows.nonzero().flatten(), *part[1:])
            own_name = self._statistics.own_name(name, self._place(model))
            mean.add_({own_name: tensor}, weight, {own_name: part})

    def _is_by_class(self, name: str, tensor: Tensor) -> bool:
        is_weight = name in self._parameters and stage_of(name)[0] == "exits"
        return is_weight and tensor.shape[:1] == (self.spec.num_classes,)

    def _place(self, model: ModelSpec) -> int:
        return self._variants.index(model) + 1

    def _slice(self, model: ModelSpec, round: int) -> Slice:
        """The same tensors for all clients of a variant."""
        key = self._place(model), self._shift(round)
        if key not in self._slices:
            self._slices[key] = self._cut(self.server.globals, model, key[1])
        return self._slices[key]

    def _cut(self, tensors: Tensors, model: ModelSpec, shift: int) -> Slice:
        """Of the whole model's tensors and those beside it. Raises ConfigError for a family that
        cannot be cut."""
        parts = slice_of(replace(self.spec, exit=model.exit), model.width, shift)
        whole = tensors | self._statistics.seen_by(self._place(model), tensors)
        return Slice(parts, cut({name: whole[name] for name in parts}, parts))

    def current(self) -> Tensors:
        return self._current

    def begin_from(self, tensors: Tensors) -> None:
        self.server.globals = self.server.globals | tensors
        self._forget()

    def served(self) -> Tensors:
        held = self.server.served()
        return self._current if held is self.server.globals else self._model_in(held)

    def deployed(self, client: Client) -> tuple[ModelSpec, Tensors]:
        """The channels of the served model that jobs of the last round hold: they were trained
        together. Where narrow models train with their layers' outputs divided by the width, the
        division is in the weights: a model that is deployed stands alone."""
        model, last = self._variants[max(1, client.variant) - 1], self._config.rounds
        held = self._cut(self.server.served(), model, self._shift(last)).tensors
        plan = self._plan_rule(self._config.plan(last), model, last)
        if plan.scaler == "none":
            return model, held
        return model, held | {name: held[name] / model.width for name in scaled_names(build(model))}

    def state_dict(self) -> Tensors:
        return {f"server/{name}": tensor for name, tensor in self.server.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        rest = {name: tensor for name, tensor in state.items() if not name.startswith("server/")}
        check_shapes(rest, {}, "checkpoint")
        self.server.load_state_dict(with_prefix(state, "server/"))
        self._forget()
