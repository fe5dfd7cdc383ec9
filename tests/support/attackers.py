"""Cohorts in which one client lies, and what it sends."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from msgspec.structs import replace

from coordinator.cohorts.base import Absence, Assignment, Client, ClientUpdate
from coordinator.cohorts.budget import Variant
from coordinator.cohorts.in_process import InProcessCohort
from edge_sdk.protocol.plan_tensors import FLAT
from edge_sdk.protocol.tensor_lists import role_of
from edge_sdk.protocol.tensors import Tensors
from tests.support.examples import examples

EXITS = {"a": 1, "b": 1, "c": 2, "d": 3, "e": 3, "f": 3}
LIAR = "f"
EXAMPLES = 24  # of each client
Change = Callable[[str, torch.Tensor], torch.Tensor]  # name and trained tensor -> what is sent


def everywhere(value: float) -> Change:
    return lambda name, tensor: torch.full_like(tensor, value)


def one_number(value: float) -> Change:
    """Of each weight matrix, or what a mask leaves of it, and of a vector of all weights."""

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim < 2 and name != FLAT and role_of(name)[0] != "packed":
            return tensor
        made = tensor.clone(memory_format=torch.contiguous_format)
        made.view(-1)[0] = value
        return made

    return change


def statistic(ending: str, value: float) -> Change:
    return lambda name, tensor: torch.full_like(tensor, value) if name.endswith(ending) else tensor


ATTACKS: Mapping[str, Change] = {
    "1e20": everywhere(1e20),
    "one 1e20": one_number(1e20),
    "3e38": everywhere(3e38),
    "-3e38": everywhere(-3e38),
    "NaN": everywhere(float("nan")),
    "variance -1": statistic("running_var", -1.0),
    "variance 1e20": statistic("running_var", 1e20),
    "mean 1e30": statistic("running_mean", 1e30),
}


@dataclasses.dataclass
class Lying:
    """Six emulated clients, of whom LIAR does as `lie` says; None: it returns nothing. held: the
    models that they hold, of a method that offers some."""

    lie: Callable[[ClientUpdate], ClientUpdate] | None
    says_examples: int = 0  # 0: what it has
    held: Mapping[str, Variant] | None = None

    @functools.cached_property
    def inner(self) -> InProcessCohort:
        shards = {name: examples(EXAMPLES, seed=i) for i, name in enumerate(EXITS)}
        return InProcessCohort(shards, EXITS, 3, variants=self.held)

    def clients(self) -> Sequence[Client]:
        told = {LIAR: self.says_examples} if self.says_examples else {}
        return [
            dataclasses.replace(c, num_examples=told.get(c.id, c.num_examples))
            for c in self.inner.clients()
        ]

    def rest(self, tries: int) -> bool:
        return self.inner.rest(tries)

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]:
        by_id = {client.id: client for client in self.clients()}
        for result in self.inner.train(work, round, deadline_s):
            if not isinstance(result, ClientUpdate) or result.client.id != LIAR:
                yield result
            elif self.lie is None:
                yield Absence(result.client, result.segments, "failed", "trainer", "died")
            else:
                yield self.lie(dataclasses.replace(result, client=by_id[LIAR]))


def sends(change: Change) -> Callable[[ClientUpdate], ClientUpdate]:
    def lie(update: ClientUpdate) -> ClientUpdate:
        return dataclasses.replace(update, tensors=changed(update.tensors, change))

    return lie


def changed(tensors: Tensors, change: Change) -> Tensors:
    return {n: change(n, t) if t.is_floating_point() else t for n, t in tensors.items()}


def says(num_examples: int) -> Callable[[ClientUpdate], ClientUpdate]:
    """It trains as everybody, and says that it had so many examples."""

    def lie(update: ClientUpdate) -> ClientUpdate:
        told = replace(update.message, num_examples=num_examples)
        return dataclasses.replace(update, arrived=replace(update.arrived, update=told))

    return lie
