"""Depth-wise methods: each client trains some segments of one multi-exit model, each tensor becomes
the mean over its owners. What differs between the methods is data: which segments a client gets,
how deep the model is, and whether a generator fills in for clients that lack a stage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from msgspec.structs import replace
from torch import Tensor

from coordinator.aggregate import OwnersMean
from coordinator.cohort import Assignment, Client, ClientUpdate
from coordinator.config import ServerOptions
from coordinator.generators.base import Generator
from coordinator.methods.base import Metrics
from coordinator.sampling import job_seed
from coordinator.server_optim import Server, under
from edge_sdk.errors import ShapeError
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.staged import needed_names, place, trained_names
from edge_sdk.tensors import Tensors, check_finite, specs_of
from edge_sdk.trainer import clock, since
from edge_sdk.wire import ModelSpec, Phase, Plan, Segment

log = logging.getLogger(__name__)
Rule: TypeAlias = Callable[[Client, int], tuple[Segment, ...]]


class DepthAveraging:
    """rule(client, round): the segments it trains. gain: weight of generated against trained.
    is_weighted: clients count by their examples, else alike."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: Plan,
        rule: Rule,
        seed: int,
        server: ServerOptions,
        generator: Generator | None = None,
        gain: float = 1.0,
        is_weighted: bool = True,
    ) -> None:
        self.spec = spec
        self._plan = plan
        self._rule = rule
        self._seed = seed
        self._generator = generator if gain > 0 else None
        self._gain = gain
        self._is_weighted = is_weighted
        parameters = {name for name, _ in build(spec).named_parameters()}
        self.server = Server(initial_tensors(spec, seed), parameters, server)

    def assign(self, client: Client, round: int) -> Assignment:
        segments = self._rule(client, round)
        spec = replace(self.spec, exit=max(segment.last for segment in segments))
        held = self.server.globals
        down = {name: held[name] for name in needed_names(held, segments)}
        up = {name: held[name] for name in trained_names(held, segments)}
        plan = replace(self._plan, segments=segments, seed=job_seed(self._seed, round, client.id))
        return Assignment(model=spec, plan=plan, tensors=down, returns=specs_of(up))

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> Metrics:
        metrics = Metrics()
        mean = OwnersMean()
        fold = fit = generate = Phase(wall_s=0.0, cpu_s=0.0)
        count = 0
        for update in updates:
            start = clock()
            mean.add_(update.tensors, update.num_examples if self._is_weighted else 1)
            if self._generator:
                self._generator.observe(update)
            fold = _plus(fold, since(start))
            count += 1
        if count and self._generator:
            start = clock()
            metrics.values |= self._generator.fit(self.server.globals, round)
            fit = since(start)
            start = clock()
            for weight, made in self._generator.generate():
                mean.add_(made, self._gain * (weight if self._is_weighted else 1))
            generate = since(start)
            metrics.phases |= {"fit": fit, "generate": generate}
        if count:
            start = clock()
            self._step(mean.result(self.server.globals), round, metrics)
            fold = _plus(fold, since(start))
        metrics.num_updates = count
        metrics.phases["aggregate"] = fold
        return metrics

    def _step(self, aggregate: Tensors, round: int, metrics: Metrics) -> None:
        """Take the server's step, unless finite updates summed up to what is not."""
        try:
            check_finite(aggregate, f"aggregate of round {round}")
        except ShapeError as error:
            log.error("%s; the global model stays as it was", error)
            metrics.values["aggregate_refused"] = 1.0
            return
        self.server.step(aggregate)

    def current(self) -> Tensors:
        return self.server.globals

    def served(self) -> Tensors:
        return self.server.served()

    def deployed(self, client: Client) -> tuple[ModelSpec, Tensors]:
        exit = max(1, min(client.exit, self.spec.exit))
        part = {name: t for name, t in self.served().items() if place(name)[1] <= exit}
        return replace(self.spec, exit=exit), part

    def state_dict(self) -> Tensors:
        state = {f"server/{name}": tensor for name, tensor in self.server.state_dict().items()}
        if self._generator:
            made = self._generator.state_dict()
            state |= {f"generator/{name}": tensor for name, tensor in made.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.server.load_state_dict(under(state, "server/"))
        if self._generator:
            self._generator.load_state_dict(under(state, "generator/"))


def prefix(client: Client, round: int) -> tuple[Segment, ...]:
    """The paper's: stages up to the client's exit, jointly."""
    return (Segment(first=1, last=client.exit),)


def fixed(exit: int) -> Rule:
    """Stages up to `exit` for everybody, whatever it can hold."""
    return lambda client, round: (Segment(first=1, last=exit),)


def rotation(seed: int) -> Rule:
    """The client's prefix, and one deeper stage that it can hold, drawn by turns from (seed, round,
    client), alone over the frozen stages before it."""

    def rule(client: Client, round: int) -> tuple[Segment, ...]:
        deeper = [stage for stage in sorted(client.stages) if stage > client.exit]
        if not deeper:
            return prefix(client, round)
        stage = deeper[job_seed(seed, round, f"stage/{client.id}") % len(deeper)]
        return (*prefix(client, round), Segment(first=stage, last=stage))

    return rule


def _plus(a: Phase, b: Phase) -> Phase:
    return Phase(wall_s=a.wall_s + b.wall_s, cpu_s=(a.cpu_s or 0.0) + (b.cpu_s or 0.0))
