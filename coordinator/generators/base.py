"""What fills the stages that a client lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

from coordinator.cohort import ClientUpdate
from edge_sdk.tensors import Tensors


class Generator(Protocol):
    """Each round in this order: observe every update, fit, generate; then forget the round."""

    def observe(self, update: ClientUpdate) -> None:
        """Keep of one update what fit and generate need; never the update itself."""

    def fit(self, current: Mapping[str, Tensor], round: int) -> dict[str, float]:
        """Learn from the round's owners. current: the global model sent out. Returns figures that
        say how far its predictions can be trusted."""

    def generate(self) -> Iterator[tuple[float, Tensors]]:
        """For each client lacking stages: its weight (examples) and the tensors made for it."""

    def state_dict(self) -> Tensors: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...
