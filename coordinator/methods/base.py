"""A federated method: what each client gets, and what is done with what returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from coordinator.cohorts.base import Assignment, Client, ClientUpdate, Offer
from edge_sdk.protocol.messages import ModelSpec, Phase
from edge_sdk.protocol.tensors import Tensors


@dataclass
class Metrics:
    """Figures of a round by name, the time of each server phase, how many updates were used."""

    values: dict[str, float] = field(default_factory=dict)
    phases: dict[str, Phase] = field(default_factory=dict)
    num_updates: int = 0


class Method(Protocol):
    """State in, state out: everything between rounds is in state_dict."""

    spec: ModelSpec  # the whole model that it trains

    def offer(self) -> Offer:
        """The same in every round."""

    def assign(self, client: Client, round: int) -> Assignment:
        """This client's job in this round."""

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> Metrics:
        """Consume updates as they arrive, then take the server's step. None arrived: no step."""

    def current(self) -> Tensors:
        """The global model that the next round begins from."""

    def begin_from(self, tensors: Tensors) -> None:
        """Before the first round: begin from these, some of the current ones by name, as they are
        of their shapes and dtypes."""

    def served(self) -> Tensors:
        """The global model to use."""

    def deployed(self, client: Client) -> tuple[ModelSpec, Tensors]:
        """The part of the served model that this client can run."""

    def state_dict(self) -> Tensors: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ShapeError for the state of another method, generator or model."""


class Family(NamedTuple):
    """One of several models of a method, and all clients that train it."""

    spec: ModelSpec
    current: Tensors
    served: Tensors


@runtime_checkable
class HasFamilies(Protocol):
    """A method of several models, one for each kind of client, none for all: its `current` and
    `served` are {} unless it has one family alone."""

    def families(self) -> dict[str, Family]:
        """By name, in the order in which they are offered as variants."""

    def begin_family_from(self, name: str, tensors: Tensors) -> None:
        """As Method.begin_from, of one of them."""


def families_of(method: Method) -> dict[str, Family]:
    """Of a method that has several; {}: it has one model, or one for each client."""
    found = method.families() if isinstance(method, HasFamilies) else {}
    return found if len(found) > 1 else {}
