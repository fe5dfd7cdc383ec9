"""What a method's server keeps and does beside the owners' mean (depthwise.py), such as control
variates, and how many clients stand behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import msgspec
import torch
from torch import Tensor

from coordinator.aggregation.mean import Kernel
from coordinator.cohorts.base import ClientUpdate
from coordinator.cohorts.sampling import job_seed
from coordinator.config import RunConfig
from edge_sdk.errors import ShapeError
from edge_sdk.models import build
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors, check_shapes, with_prefix

IDS, WEIGHTS, TENSORS = "known_ids", "known_weights", "kept/"


class ServerRule(Protocol):
    """One run's, and during `add_` and `stepped` one round's."""

    def begin(self, round: int) -> None:
        """A round begins; what one that was broken off left is forgotten."""

    def add_(self, mean: Kernel, update: ClientUpdate, weight: float, sent: Tensors) -> None:
        """Fold an update into the round's mean, and note what else it brings."""

    def stepped(self, mean: Kernel, aggregate: Tensors, sent: Tensors) -> tuple[Tensors, Tensors]:
        """From the round's mean `aggregate` (where nobody owns: `sent` itself) what the server's
        step takes instead of it, and the state from then on. Changes nothing."""

    def state_dict(self) -> Tensors: ...
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ShapeError for another rule's or model's."""


class OwnersMeanAlone:
    """The rule of methods that do nothing beside the owners' mean."""

    def begin(self, round: int) -> None:
        pass

    def add_(self, mean: Kernel, update: ClientUpdate, weight: float, sent: Tensors) -> None:
        mean.add_(update.tensors, weight)

    def stepped(self, mean: Kernel, aggregate: Tensors, sent: Tensors) -> tuple[Tensors, Tensors]:
        return aggregate, {}

    def state_dict(self) -> Tensors:
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        check_shapes(state, {}, "checkpoint")


class KnownClients:
    """N of the papers, which a coordinator of real devices cannot know: the clients that have
    returned an update so far, each with its weight in the mean of each stage that it trained (its
    last one), and at least as many as the run is sure to have (`least`, taken to be like those).

    ids: (n,) int64, of the clients' names; weights: (n, stages) float64. 8 bytes a client and
    stage, so it grows with the clients and not with the rounds."""

    def __init__(self, num_stages: int, least: int) -> None:
        self._num_stages = num_stages
        self._least = least
        self.weights: dict[int, list[float]] = {}

    def note(self, update: ClientUpdate, weight: float) -> None:
        row = self.weights.setdefault(job_seed(0, 0, update.client.id), [0.0] * self._num_stages)
        for segment in update.segments:
            row[segment.first - 1 : segment.last] = [weight] * (segment.last + 1 - segment.first)

    def total(self, name: str | None = None) -> float:
        """Weight of all who own the tensor `name`; None: of all clients."""
        stage = stage_of(name)[1] - 1 if name else None
        rows = self.weights.values()
        held = math.fsum(max(row) if stage is None else row[stage] for row in rows)
        return held * max(1.0, self._least / len(rows)) if rows else 0.0

    def copy(self) -> KnownClients:
        made = KnownClients(self._num_stages, self._least)
        made.weights = {client: list(row) for client, row in self.weights.items()}
        return made

    def state_dict(self) -> Tensors:
        ids = sorted(self.weights)  # whatever the order in which updates arrived
        rows = torch.tensor([self.weights[client] for client in ids], dtype=torch.float64)
        return {
            IDS: torch.tensor(ids, dtype=torch.int64),
            WEIGHTS: rows.reshape(len(ids), self._num_stages),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ShapeError."""
        check_shapes(state, {IDS: (None,), WEIGHTS: (None, self._num_stages)}, "checkpoint")
        ids, rows = state[IDS].tolist(), state[WEIGHTS].tolist()
        if not len(set(ids)) == len(ids) == len(rows):
            said = f"{len(rows)} rows of weights for {len(ids)} clients, {len(set(ids))} different"
            raise ShapeError(f"checkpoint: {said}; expected one row for each")
        self.weights = dict(zip(ids, rows, strict=True))


class Kept:
    """What a rule keeps: for each parameter a tensor of float32, zero at first and never the
    weights themselves, and the clients that stand behind it."""

    def __init__(self, config: RunConfig) -> None:
        shapes = {name: p.shape for name, p in build(config.model).named_parameters()}
        self.tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
        self.known = KnownClients(config.model.exit, least_clients(config))

    def state_dict(self) -> Tensors:
        return state_of(self.tensors, self.known)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Raises ShapeError."""
        held = with_prefix(state, TENSORS)
        rest = {name: t for name, t in state.items() if not name.startswith(TENSORS)}
        check_shapes(held, {name: tuple(t.shape) for name, t in self.tensors.items()}, "checkpoint")
        self.known.load_state_dict(rest)
        self.tensors = {name: held[name] for name in self.tensors}  # in the model's order


def state_of(tensors: Mapping[str, Tensor], known: KnownClients) -> Tensors:
    """As Kept takes it."""
    return {TENSORS + name: tensor for name, tensor in tensors.items()} | known.state_dict()


def least_clients(config: RunConfig) -> int:
    """Clients that a run is sure to have: of an emulated one all, else those it waits for."""
    emulated = msgspec.json.decode(config.population)["clients"] if config.population else 0
    return max(config.min_clients, int(emulated))
