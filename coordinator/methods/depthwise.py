"""Depth-wise methods: each client trains some segments of one multi-exit model, each tensor becomes
the mean over its owners. What differs between the methods is data: which segments a client gets
(rotation.py), how deep the model is, and what fills in for clients that lack a stage (generators/).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from msgspec.structs import replace
from torch import Tensor

from coordinator.aggregation.mean import Kernel
from coordinator.aggregation.registry import make_kernel
from coordinator.aggregation.server_optimizer import Server
from coordinator.cohorts.base import Assignment, Client, ClientUpdate, Offer
from coordinator.cohorts.sampling import job_seed
from coordinator.config import RunConfig
from coordinator.generators.base import Generator
from coordinator.methods.base import Metrics
from coordinator.methods.clipping import NormClip
from coordinator.methods.rotation import SegmentRule
from coordinator.methods.server_rule import OwnersMeanAlone, ServerRule
from edge_sdk.errors import EdgeError, ShapeError
from edge_sdk.helpers.text import one_line
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.freezing import check_trainable
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensor_lists import (
    is_frozen,
    needed_names,
    stage_of,
    trained_names,
)
from edge_sdk.protocol.tensors import Tensors, check_finite, check_shapes, specs_of, with_prefix
from edge_sdk.protocol.timing import Stopwatch

log = logging.getLogger(__name__)
SCARCE = 0.5  # of stage 1's owners: with fewer of the deepest stage's its exits are taught
Adapt: TypeAlias = Callable[[Client, int, Assignment], Assignment]
MAX_WEIGHT = 1e6  # of what generators learn from; squares and products of it stay in float32


class DepthAveraging:
    """Each client trains the segments that `rule` gives it; each tensor becomes the mean over its
    owners, and what `make_generator` makes stands in for those who lack a stage. Where it cannot
    compute, the round has the owners' mean and the next a new one without memory.

    asks: fields of every job's plan beside the run's settings. adapt: (client, round, job) -> the
    job with what is the method's own. server_rule: what is done with the mean, and kept.
    least_exit: the shallowest that a deployed part may end with."""

    def __init__(
        self,
        config: RunConfig,
        rule: SegmentRule,
        make_generator: Callable[[], Generator | None] = lambda: None,
        *,
        asks: Mapping[str, Any] | None = None,
        adapt: Adapt = lambda client, round, job: job,
        server_rule: ServerRule | None = None,
        least_exit: int = 1,
    ) -> None:
        self.spec = config.model
        self._config = config
        self._rule = rule
        self._make_generator = make_generator
        self._generator = make_generator()
        self._asks = dict(asks or {})
        self._adapt = adapt
        self._server_rule = server_rule or OwnersMeanAlone()
        self._least_exit = least_exit
        names = [name for name, _ in build(self.spec).named_parameters()]
        frozen = config.frozen
        check_trainable(names, self.spec.exit, frozen)
        parameters = {name for name in names if not is_frozen(name, frozen)}
        self.server = Server(initial_tensors(self.spec, config.seed), parameters, config.server)
        factor = config.aggregation.clip
        clip = NormClip(
            factor,
            parameters,
            self.spec.exit,
            config.seed,
            num_kinds=3 if self._asks.get("correction") else 2,
        )
        self._clip = clip if factor else None
        self._owners = torch.zeros(self.spec.exit, dtype=torch.float64)  # of each stage, so far

    def offer(self) -> Offer:
        return Offer(self.spec, replace(self._config.plan(self._config.rounds), **self._asks))

    def assign(self, client: Client, round: int) -> Assignment:
        config = self._config
        segments = self._rule(client, round, self._owners.tolist())
        spec = replace(self.spec, exit=max(segment.last for segment in segments))
        held = self.server.globals
        down = {name: held[name] for name in needed_names(held, segments)}
        seed = job_seed(config.seed, round, client.id)
        plan = replace(config.plan(round), segments=segments, seed=seed, **self._asks)
        up = {name: held[name] for name in trained_names(held, segments, plan.frozen)}
        if config.distill.direction == "auto" and self._owners[-1] >= SCARCE * self._owners[0]:
            plan = replace(plan, distill="none", distill_weight=0.0)
        job = Assignment(model=spec, plan=plan, tensors=down, returns=specs_of(up))
        return self._adapt(client, round, job)

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> Metrics:
        metrics, watch = Metrics(), Stopwatch()
        mean = make_kernel(self._config.aggregation)
        sent, generator = self.server.globals, self._generator
        if self._clip:
            updates = self._clip.clipped(round, updates, sent, metrics)
        total = 0.0
        self._server_rule.begin(round)
        for update in updates:
            weight = update.weight(self._config.weighting)
            with watch("aggregate"):
                self._server_rule.add_(mean, update, weight, sent)
            if generator and is_learnable(update):
                with watch("fit"), self._sheltered(round, metrics):
                    generator.observe(update, sent, weight)
                generator = self._generator_of(metrics)
            for segment in update.segments:
                self._owners[segment.first - 1 : segment.last] += 1
            total += weight
            metrics.num_updates += 1
        shares = {name: mean.weight(name) / total for name in sent} if total else {}
        with watch("aggregate"):  # of the owners alone; robust rules do their work here
            merged = mean.result(sent)
        if metrics.num_updates and generator:
            with watch("fit"), self._sheltered(round, metrics):
                figures = generator.fit(sent, round)
                check_finite(generator.state_dict(), "its memory")
                metrics.values |= figures
            generator = self._generator_of(metrics)
        if metrics.num_updates and generator:
            with watch("generate"), self._sheltered(round, metrics):
                for weight, made in generator.generate(sent, merged):
                    check_finite(made, "what it made")
                    mean.add_(made, self._config.generator.gain * weight)
        if metrics.num_updates:
            with watch("aggregate"):
                self._step(mean, self._damped(mean, shares), round, metrics)
        metrics.phases |= watch.phases
        return metrics

    def _generator_of(self, metrics: Metrics) -> Generator | None:
        """None once it has failed in this round: what it saw of the round is not whole."""
        return None if "generator_failed" in metrics.values else self._generator

    @contextmanager
    def _sheltered(self, round: int, metrics: Metrics) -> Iterator[None]:
        """What a generator cannot compute (no SVD, no solution, an overflow) ends no round: absurd
        but finite updates may be behind it, or a memory of such ones."""
        try:
            yield
        except (ArithmeticError, RuntimeError, ValueError, EdgeError) as error:
            said = "round %d: the generator cannot go on: %s; owners' means, it begins anew"
            log.error(said, round, one_line(str(error)))
            metrics.values["generator_failed"] = 1.0
            self._generator = self._make_generator()

    def _damped(self, mean: Kernel, shares: Mapping[str, float]) -> Tensors:
        """The mean, or a part of the way to it where only a part of the cohort trained the tensor.
        shares: of the cohort's weight, by tensor."""
        sent, power = self.server.globals, self._config.server.damping
        result = mean.result(sent)
        if not power:
            return result
        for name, share in shares.items():
            if 0 < share < 1 and sent[name].is_floating_point():
                result[name] = torch.lerp(sent[name], result[name], share**power)
        return result

    def _step(self, mean: Kernel, aggregate: Tensors, round: int, metrics: Metrics) -> None:
        """Take the server's step, unless finite updates, or --server-lr, make it infinite."""
        try:
            aggregate, kept = self._server_rule.stepped(mean, aggregate, self.server.globals)
            check_finite(kept, "what the method keeps")
            self.server.step(aggregate)
        except ShapeError as error:
            log.error("round %d: %s; the global model stays as it was", round, error)
            metrics.values["aggregate_refused"] = 1.0
        else:
            self._server_rule.load_state_dict(kept)

    def current(self) -> Tensors:
        return self.server.globals

    def begin_from(self, tensors: Tensors) -> None:
        self.server.globals = self.server.globals | tensors

    def served(self) -> Tensors:
        return self.server.served()

    def deployed(self, client: Client) -> tuple[ModelSpec, Tensors]:
        exit = max(self._least_exit, min(client.exit, self.spec.exit))
        part = {name: t for name, t in self.served().items() if stage_of(name)[1] <= exit}
        return replace(self.spec, exit=exit), part

    def state_dict(self) -> Tensors:
        state = {f"server/{name}": tensor for name, tensor in self.server.state_dict().items()}
        state |= {f"rule/{name}": t for name, t in self._server_rule.state_dict().items()}
        state["owners"] = self._owners.clone()
        if self._clip:
            state["clip"] = self._clip.memory.norms.clone()
        if self._generator:
            made = self._generator.state_dict()
            state |= {f"generator/{name}": tensor for name, tensor in made.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        parts = ("server/", "rule/", *(("generator/",) if self._generator else ()))
        rest = {name: tensor for name, tensor in state.items() if not name.startswith(parts)}
        shapes: dict[str, tuple[int, ...]] = {"owners": (self.spec.exit,)}
        if self._clip:
            shapes["clip"] = tuple(self._clip.memory.norms.shape)
        check_shapes(rest, shapes, "checkpoint")
        self.server.load_state_dict(with_prefix(state, "server/"))
        self._server_rule.load_state_dict(with_prefix(state, "rule/"))
        self._owners = state["owners"].clone()
        if self._clip:
            self._clip.memory.norms = state["clip"].clone()
        if self._generator:
            self._generator.load_state_dict(with_prefix(state, "generator/"))


def is_learnable(update: ClientUpdate) -> bool:
    """Whether a generator may learn from an update: one absurd but finite weight would stay in what
    it remembers. In the mean the update counts all the same. Masks and counters are not learned."""
    for name, tensor in update.tensors.items():
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        if (largest := float(tensor.abs().max())) > MAX_WEIGHT:
            said = "%s: %s reaches %.1g, more than %.0g; the generator leaves its update out"
            log.warning(said, update.client.id, name, largest, MAX_WEIGHT)
            return False
    return True
