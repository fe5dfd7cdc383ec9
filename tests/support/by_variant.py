"""A small method that offers variants: three widths of the run's model, each trained by those who
chose it and averaged over them alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from msgspec.structs import replace
from torch import Tensor

from coordinator.aggregation.mean import OwnersMean
from coordinator.cohorts.base import Assignment, Client, ClientUpdate, Offer
from coordinator.cohorts.sampling import job_seed
from coordinator.config import RunConfig
from coordinator.methods.base import Method, Metrics
from coordinator.methods.registry import TorchDevice, register_method
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import ModelSpec, Segment
from edge_sdk.protocol.tensors import Tensors, specs_of, with_prefix

WIDTHS = (0.25, 0.5, 1.0)


def variants_of(model: ModelSpec) -> tuple[ModelSpec, ...]:
    return tuple(replace(model, width=width) for width in WIDTHS)


class ByVariant:
    def __init__(self, config: RunConfig) -> None:
        self.spec = config.model
        self._config = config
        self._variants = variants_of(config.model)
        self._models = [initial_tensors(spec, config.seed) for spec in self._variants]

    def offer(self) -> Offer:
        return Offer(self.spec, self._config.plan(self._config.rounds), self._variants)

    def assign(self, client: Client, round: int) -> Assignment:
        spec, tensors = self.deployed(client)
        segments = (Segment(first=1, last=spec.exit),)
        seed = job_seed(self._config.seed, round, client.id)
        plan = replace(self._config.plan(round), segments=segments, seed=seed)
        return Assignment(spec, plan, tensors, specs_of(tensors))

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> Metrics:
        means = [OwnersMean() for _ in self._variants]
        metrics = Metrics()
        for update in updates:
            means[update.client.variant - 1].add_(update.tensors, float(update.num_examples))
            metrics.num_updates += 1
        self._models = [m.result(old) for m, old in zip(means, self._models, strict=True)]
        return metrics

    def current(self) -> Tensors:
        return self._models[-1]

    def begin_from(self, tensors: Tensors) -> None:
        self._models[-1] = self._models[-1] | tensors

    def served(self) -> Tensors:
        return self._models[-1]

    def deployed(self, client: Client) -> tuple[ModelSpec, Tensors]:
        place = client.variant - 1
        return self._variants[place], self._models[place]

    def state_dict(self) -> Tensors:
        return {f"{n}/{k}": t for n, held in enumerate(self._models) for k, t in held.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._models = [with_prefix(state, f"{n}/") for n in range(len(self._models))]


@register_method("by-variant")
def by_variant(config: RunConfig, device: TorchDevice) -> Method:
    return ByVariant(config)
