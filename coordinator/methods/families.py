"""Methods of several backbones: each is averaged over its own clients (depthwise.py has its state
and its jobs), and what all have in common may be moved together (aggregation/families.py).

Memory: a kernel for each family, updates are folded in as they arrive."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor

from coordinator.aggregation.families import aligned, common_step, family_weights, slots
from coordinator.aggregation.frozen_start import FrozenStart, Verdict
from coordinator.aggregation.mean import Kernel
from coordinator.aggregation.registry import make_kernel
from coordinator.cohorts.base import Assignment, Client, ClientUpdate, Offer
from coordinator.cohorts.sampling import job_seed
from coordinator.config import RunConfig
from coordinator.methods.base import Family, Metrics
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.rotation import rotation
from edge_sdk.errors import CapacityError, ConfigError, ShapeError
from edge_sdk.models import build
from edge_sdk.models.adapters.attach import shared_names
from edge_sdk.models.checking import check_family
from edge_sdk.models.flat import num_weights, parameter_shapes
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensor_lists import is_frozen
from edge_sdk.protocol.tensors import Tensors, check_shapes, with_prefix
from edge_sdk.protocol.timing import Stopwatch

log = logging.getLogger(__name__)
ONLY = "model"  # the name of a run's single family


class FamilyAveraging:
    """A run's backbones, or its one model, which a client may then train up to any exit. share: see
    aggregation/families.py. With --holdout a family that is found worse than its start on its
    clients' hold-outs shares no longer, and the model from before is served (frozen_start.py)."""

    def __init__(self, config: RunConfig, share: Literal["none", "shared", "aligned"]) -> None:
        self._config, self._share = config, share
        runs = {backbone.name: config.of_backbone(backbone) for backbone in config.backbones}
        runs = runs or {ONLY: config}
        self._families = {name: _family(name, run) for name, run in runs.items()}
        self._check_order()
        self._frozen = {name: run.frozen for name, run in runs.items()}
        self._apart = dict.fromkeys(runs, False)  # those that share no longer
        self._slots = slots(
            {
                name: shared_names(config.model.adapters, list(family.current()))
                for name, family in self._families.items()
            }
        )
        if share != "none":
            self._begin_alike()
        self._guards = {name: FrozenStart(self._trained(name)) for name in runs if config.holdout}
        self.spec = max((f.spec for f in self._families.values()), key=lambda spec: spec.exit)

    def _check_order(self) -> None:
        """Raise ConfigError for a backbone that is smaller than the one before it: devices take the
        last that fits."""
        before, least = "", 0
        for name, family in self._families.items():
            if (count := num_weights(parameter_shapes(build(family.spec)))) < least:
                raise ConfigError(
                    f"--backbones: {name} has {count} weights and comes after {before}, which has "
                    f"{least}; put the smallest first"
                )
            before, least = name, count

    def _trained(self, name: str) -> Tensors:
        held, frozen = self._families[name].current(), self._frozen[name]
        return {key: tensor for key, tensor in held.items() if not is_frozen(key, frozen)}

    def _begin_alike(self) -> None:
        """What families share begins as the last's that has it: nothing of an adapter's inside
        shows before its outer matrices move."""
        for owners in self._slots.values():
            *others, last = owners
            tensor = self._families[last].current()[owners[last]]
            for name in others:
                self._families[name].begin_from({owners[name]: tensor.clone()})

    def offer(self) -> Offer:
        plans = [family.offer().plan for family in self._families.values()]
        models = [family.spec for family in self._families.values()]
        deepest = models.index(self.spec)
        return Offer(self.spec, plans[deepest], tuple(models) if len(models) > 1 else ())

    def _name_of(self, client: Client) -> str:
        """Raises CapacityError for a client that holds none of several."""
        names = list(self._families)
        if len(names) > 1 and not 1 <= client.variant <= len(names):
            raise CapacityError(f"{client.id} holds none of the {len(names)} backbones")
        return names[max(client.variant, 1) - 1]

    def assign(self, client: Client, round: int) -> Assignment:
        return self._families[self._name_of(client)].assign(client, round)

    def aggregate(self, round: int, updates: Iterable[ClientUpdate]) -> Metrics:
        metrics, watch = Metrics(), Stopwatch()
        means: dict[str, Kernel] = {}
        examples: dict[str, float] = {}
        for update in updates:
            name = self._name_of(update.client)
            weight = update.weight(self._config.weighting)
            with watch("aggregate"):
                mean = means.setdefault(name, make_kernel(self._config.aggregation))
                mean.add_(update.tensors, weight)
            examples[name] = examples.get(name, 0.0) + update.num_examples
            metrics.num_updates += 1
            if self._guards:
                self._guards[name].hear_(update)
        for name in means:
            self._judge(name, metrics)
        with watch("aggregate"):
            made = {name: mean.result(self._current(name)) for name, mean in means.items()}
            if self._share != "none" and made:
                self._share_(made, examples, round)
            for name, aggregate in made.items():
                self._step(name, aggregate, round, metrics)
        metrics.phases |= watch.phases
        return metrics

    def _judge(self, name: str, metrics: Metrics) -> None:
        if (guard := self._guards.get(name)) is None:
            return
        verdict, saved = guard.judge_(self._current(name))
        if verdict is Verdict.WORSE:
            self._apart[name] = True
        if verdict is not Verdict.OPEN:
            metrics.values[f"{name}.saved_loss"] = saved

    def _share_(self, made: dict[str, Tensors], examples: Mapping[str, float], round: int) -> None:
        """In the aggregates, give all families that have a slot the same step there. A family
        nobody of which returned takes it too, and then has an aggregate."""
        before = {name: self._current(name) for name in self._families}
        for slot, held in self._slots.items():
            owners = {name: key for name, key in held.items() if not self._apart[name]}
            moved = {
                name: made[name][key] - before[name][key]
                for name, key in owners.items()
                if name in examples
            }
            if len(owners) < 2 or not moved:
                continue
            weights = family_weights({name: examples[name] for name in moved})
            if self._share == "aligned":
                drawn = f"{self._config.seed}/{slot.part}/{slot.depth}"
                order = sorted(moved, key=lambda name: job_seed(0, round, f"{drawn}/{name}"))
                moved = aligned(moved, weights, order)
            step = common_step(moved, weights)
            for name, key in owners.items():
                made.setdefault(name, dict(before[name]))[key] = before[name][key] + step

    def _step(self, name: str, aggregate: Tensors, round: int, metrics: Metrics) -> None:
        """Take the server's step, unless it would not be finite."""
        try:
            self._families[name].server.step(aggregate)
        except ShapeError as error:
            log.error("round %d: %s: %s; it stays as it was", round, name, error)
            metrics.values["aggregate_refused"] = 1.0
            return
        if guard := self._guards.get(name):
            guard.note_step_()

    def _current(self, name: str) -> Tensors:
        return self._families[name].current()

    def _served(self, name: str) -> Tensors:
        family = self._families[name]
        guard = self._guards.get(name)
        return family.current() | guard.served if guard else family.served()

    def families(self) -> dict[str, Family]:
        return {
            name: Family(family.spec, family.current(), self._served(name))
            for name, family in self._families.items()
        }

    def begin_family_from(self, name: str, tensors: Tensors) -> None:
        self._families[name].begin_from(tensors)
        if name in self._guards:
            self._guards[name] = FrozenStart(self._trained(name))

    @property
    def _alone(self) -> str:
        return next(iter(self._families)) if len(self._families) == 1 else ""

    def current(self) -> Tensors:
        return self._current(self._alone) if self._alone else {}

    def begin_from(self, tensors: Tensors) -> None:
        self.begin_family_from(self._alone, tensors)

    def served(self) -> Tensors:
        return self._served(self._alone) if self._alone else {}

    def deployed(self, client: Client) -> tuple[ModelSpec, Tensors]:
        name = self._name_of(client)
        spec, part = self._families[name].deployed(client)
        served = self._served(name)
        return spec, {key: served[key] for key in part}

    def state_dict(self) -> Tensors:
        state: Tensors = {}
        for name, family in self._families.items():
            parts = {"": family.state_dict()}
            if name in self._guards:
                parts["guard/"] = self._guards[name].state_dict()
            for part, held in parts.items():
                state |= {f"{name}/{part}{key}": tensor for key, tensor in held.items()}
            state[f"{name}/apart"] = torch.tensor([self._apart[name]])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        held = {name: with_prefix(state, f"{name}/") for name in self._families}
        known = {f"{name}/{key}" for name, part in held.items() for key in part}
        check_shapes({k: t for k, t in state.items() if k not in known}, {}, "checkpoint")
        for name, part in held.items():
            apart = {key: part.pop(key) for key in ("apart",) if key in part}
            check_shapes(apart, {"apart": (1,)}, f"checkpoint, {name}")
            guard = {key: part.pop(key) for key in list(part) if key.startswith("guard/")}
            self._families[name].load_state_dict(part)
            if name in self._guards:
                self._guards[name].load_state_dict(with_prefix(guard, "guard/"))
            self._apart[name] = bool(apart["apart"])


def _family(name: str, run: RunConfig) -> DepthAveraging:
    """Raises ConfigError, with the backbone's name."""
    try:
        check_family(run.model)
        return DepthAveraging(run, rotation(run.rotation, run.seed))
    except ConfigError as error:
        said = f"{error}" if name == ONLY else f"--backbones: {name}: {error}"
        raise ConfigError(said) from error
