"""Each client's own model: how well it answers what that client set aside, and methods that have
nothing but such models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from coordinator.cohorts.base import Client
from coordinator.methods.base import Method, families_of
from coordinator.runs.holdouts import pooled
from coordinator.store.store import Store
from edge_sdk.data.loading import Examples
from edge_sdk.data.partition import split_holdout
from edge_sdk.errors import ConfigError
from edge_sdk.models import build, family_code
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import Holdout, ModelSpec
from edge_sdk.protocol.tensors import Tensors, with_prefix
from edge_sdk.tasks.metrics import METRICS
from edge_sdk.tasks.table import answered_at_once
from edge_sdk.training.holdout import answers
from edge_sdk.training.terms.flat import KEPT as STATISTICS

log = logging.getLogger(__name__)
STATES = "clients"  # of a run's folder: what its emulated clients keep between rounds


class OwnModels:
    """The clients of an emulation, of which everything can be asked. shards: all examples of each;
    share: of them that are set aside, as the plan says. kept: what a client keeps between rounds,
    of which the statistics of flat weights belong to its model."""

    def __init__(
        self,
        clients: Sequence[Client],
        shards: Mapping[str, Examples],
        share: float,
        kept: Callable[[str], Tensors] = lambda name: {},
        device: str | torch.device = "cpu",
    ) -> None:
        self._clients = clients
        self._holdouts = {c.id: split_holdout(shards[c.id], share)[1] for c in clients}
        self._kept = kept
        self._device = device

    def results(self, method: Method) -> dict[str, Holdout]:
        """By client, of those that have a hold-out: what `method.deployed` gives it, at its last
        exit."""
        found: dict[str, Holdout] = {}
        built: tuple[ModelSpec, StagedModel] | None = None
        for client in self._clients:
            spec, tensors = method.deployed(client)
            if built is None or built[0] != spec:  # clients of a group lie together
                built = spec, build(spec).ready(self._device)
            model = built[1]
            model.load(tensors)
            model.load(with_prefix(self._kept(client.id), STATISTICS))
            with family_code(spec, "evaluating", model):
                at_once = answered_at_once(spec)
                result = answers(model, self._holdouts[client.id], at_once, self._device)
            if result:
                found[client.id] = result
        return found

    def figures(self, method: Method) -> dict[str, float]:
        """`personal_accuracy` and so on, over all clients (holdouts.pooled); of several models over
        the clients of each too, as `NAME.personal_accuracy`."""
        metric, results = METRICS[method.spec.task], self.results(method)
        figures = pooled("personal", list(results.values()), metric)
        for place, name in enumerate(families_of(method), 1):
            own = [results[c.id] for c in self._clients if c.variant == place and c.id in results]
            figures |= pooled(f"{name}.personal", own, metric)
        return figures


def has_global(method: Method) -> bool:
    """Whether there is one model for all clients."""
    return bool(method.served())


def check_global(method: Method, what: str, instead: str) -> None:
    """Raise ConfigError where `what` was asked for of a method without a model for all."""
    if not has_global(method):
        each = "backbone" if families_of(method) else "client"
        raise ConfigError(
            f"{what}: this method has a model for each {each}, none for all; {instead}"
        )


def write_model(store: Store, method: Method) -> Path | None:
    """The served model as the run's; None, said in one line, where there is none for all. Of
    several backbones each, as model-NAME.safetensors."""
    if has_global(method):
        return store.write_model(method.spec, method.served())
    with suppress(OSError):
        (store.folder / "model.safetensors").unlink(missing_ok=True)
    if families := families_of(method):
        for name, family in families.items():
            store.write_model(family.spec, family.served, f"model-{name}")
        names = ", ".join(f"model-{name}.safetensors" for name in families)
        log.info("a model for each backbone, in %s: %s", store.folder, names)
        return None
    said = (
        "method %s has a model for each client, none for all, so no model.safetensors is written; "
    )
    log.info(
        said + "edge-coordinator export --run %s --client NAME", store.config.method, store.folder
    )
    return None
