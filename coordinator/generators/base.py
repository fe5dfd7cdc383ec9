"""What fills the stages that a client lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from coordinator.cohorts.base import ClientUpdate
from edge_sdk.models import StagedModel, build, find_family
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors


class Generator(Protocol):
    """Each round in this order: observe every update, fit, generate; then forget the round.

    Nothing is generated before the first fit, for a stage without an owner in the round, or for a
    (client, stage) that the client trained. Statistics of BatchNorm are never generated."""

    def observe(self, update: ClientUpdate, current: Mapping[str, Tensor], weight: float) -> None:
        """Keep of one update what fit and generate need; never the update itself.
        current: the global model sent out; weight: the client's in the mean."""

    def fit(self, current: Mapping[str, Tensor], round: int) -> dict[str, float]:
        """Learn from the round's owners. Returns figures that say how far its predictions can be
        trusted, taken before it learned from this round: `trust_stage_t` (0 to 1) and a relative
        error of what it predicts: of whole tensors `error_stage_t`, against those trained, with
        `previous_stage_t`, the same of the global that was sent; or, of a generator that predicts
        how owners deviate from their mean, `deviation_error_stage_t`, which is 1 for the mean. And
        `generator_bytes`, the memory it held at most."""

    def generate(
        self, current: Mapping[str, Tensor], mean: Mapping[str, Tensor]
    ) -> Iterator[tuple[float, Tensors]]:
        """A weight, and tensors that stand for lacking clients of that weight; each name once.
        mean: the owners' mean, as it was before anything was generated for its tensors."""

    def state_dict(self) -> Tensors: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ShapeError for the state of another generator or model."""


def generated_names(spec: ModelSpec, generate: str) -> list[str]:
    """Parameters that are generated, in the model's order, those of stage and exit 1 (which are
    sources only) included. generate: "conv" the family's main weights; "conv+bn" every parameter of
    the stages; "all" the exits too."""
    model = _blank(spec)
    if generate == "conv":
        return list(model.main_weights)
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if generate == "all" or stage_of(name)[0] == "stages"]


def parameter_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in _blank(spec).named_parameters()}


def _blank(spec: ModelSpec) -> StagedModel:
    """A model for its names and shapes: without memory, but for a person's own family, whose code
    may look at the values that it draws."""
    if find_family(spec.family).is_built_in:
        with torch.device("meta"):
            return build(spec)
    with torch.random.fork_rng(devices=[]):
        return build(spec)
