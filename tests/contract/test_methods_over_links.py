"""Every method, and every task, over ZeroMQ: a real device, which keeps its own state, gives to the
last bit what an emulated client gives."""

from __future__ import annotations

import time

import pytest
import torch
from msgspec.structs import replace

from coordinator.admission.client_list import Admission
from coordinator.cohorts.budget import Variant
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.config import Backbone
from coordinator.fleet.cohort import ZmqCohort
from coordinator.fleet.spool import Spool
from coordinator.links.router import Router
from coordinator.methods.registry import METHODS, make_method
from coordinator.runs.rounds import run_rounds
from coordinator.settings import with_backbones
from coordinator.store.store import SPOOL, Store
from edge_sdk.protocol.fields import Adapters
from edge_sdk.protocol.keys import read_keys
from edge_sdk.tasks.table import TASKS
from tests.contract.methods import changed_names
from tests.support.examples import config
from tests.support.processes import World
from tests.support.task_problems import problem, spec_of

ROUNDS = 2  # the second one begins from what the device kept of the first
PATIENCE_S = 90.0


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One device that stays for all runs."""
    torch.set_num_threads(1)
    with World(tmp_path_factory.mktemp("world"), num_devices=1) as world:
        world.device("a")
        yield world


def finished(folder, settings, cohort_of):
    """The method after a whole run."""
    store, method = Store.create(folder, settings, "serve"), make_method(settings)
    cohort = cohort_of(store, method)
    try:
        run_rounds(store, method, cohort, None)
    finally:
        store.close()
        if isinstance(cohort, ZmqCohort):
            cohort.close("run finished", is_final=False)
    return method, cohort


def over_links(world, settings):
    """A function that makes the cohort of the devices that come to the world's address."""
    give_up = time.monotonic() + PATIENCE_S

    def cohort_of(store, method):
        admission = Admission(world.keys / "clients")
        router = Router(world.endpoint, read_keys(world.keys, "server"), admission)
        spool = Spool(store.folder / SPOOL)
        return ZmqCohort(
            router,
            spool,
            settings,
            method.offer(),
            run=store.run,
            should_stop=lambda: time.monotonic() > give_up,
        )

    return cohort_of


# Of a method that may have several, and trains no model whole.
BACKBONES = tuple(
    Backbone(name=f"dim-{dim}", family="vit", exits=exits, options={"dim": dim, "heads": 2})
    for dim, exits in ((8, 2), (12, 1))
)


@pytest.mark.parametrize("name", [*METHODS, "heterotune, backbones"])
def test_a_device_gives_the_bytes_that_an_emulated_client_gives(world, tmp_path, name):
    method, _, backbones = name.partition(", ")
    settings = config(method, rounds=ROUNDS, late="drop")
    settings = replace(settings, model=replace(settings.model, num_classes=10))
    if backbones:
        model = replace(settings.model, adapters=Adapters(kind="dema", rank=4))
        changes = {"model": model, "holdout": 0.2, "own": {"share": "aligned"}}
        settings = with_backbones(replace(settings, **changes), BACKBONES)

    def emulated(store, method):
        offer = method.offer()
        chosen = None
        if offer.variants:
            last = offer.variants[-1]
            chosen = {"a": Variant(len(offer.variants), last.exit, 0)}
        return InProcessCohort(
            world.shards, {"a": method.spec.exit}, method.spec.exit, variants=chosen
        )

    real, _ = finished(tmp_path / "real", settings, over_links(world, settings))
    alike, _ = finished(tmp_path / "emulated", settings, emulated)
    assert not changed_names(real.state_dict(), alike.state_dict())


@pytest.mark.parametrize("task", [task for task in TASKS if task != "classify"])
def test_so_it_does_of_every_task(tmp_path, task):
    shard = problem(task, 60)
    model = spec_of(shard)
    if shard.vocabulary:  # a family that a device knows
        options = {"dim": 8, "heads": 2, "ffn": 16}
        model = replace(model, family="transformer", options=options)
    settings = config("stage-rotation", model=model, rounds=ROUNDS, late="drop", holdout=0.2)
    with World(tmp_path / "world", num_devices=1) as world:
        world.admit("task", shard)
        world.device("task")
        real, _ = finished(tmp_path / "real", settings, over_links(world, settings))
    alike, _ = finished(
        tmp_path / "emulated",
        settings,
        lambda store, _: InProcessCohort({"task": shard}, {"task": 2}, 2),
    )
    assert changed_names(real.current(), make_method(settings).current()), "it learned"
    assert not changed_names(real.state_dict(), alike.state_dict())
