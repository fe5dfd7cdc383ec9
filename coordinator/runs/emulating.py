"""`edge-coordinator emulate`, from settings to the end; cohorts/population.py makes its clients."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace

from coordinator.cohorts.base import Client, Offer
from coordinator.cohorts.budget import check_numbers, chosen_variants
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.cohorts.population import (
    EmulatedClient,
    Population,
    check_population,
    check_processes,
    check_split,
    choose_holders,
    emulated_clients,
    exits_of,
)
from coordinator.cohorts.processes import ProcessCohort
from coordinator.cohorts.sampling import job_seed
from coordinator.config import RunConfig
from coordinator.methods.base import Method
from coordinator.methods.registry import check_method, make_method
from coordinator.runs.beginning import check_init
from coordinator.runs.costs import client_costs
from coordinator.runs.evaluate import Personalised, personalised
from coordinator.runs.exporting import check_export, export_finished, try_export
from coordinator.runs.own_models import STATES, OwnModels, check_global, has_global, write_model
from coordinator.runs.rounds import check_folder, print_round, run_rounds
from coordinator.runs.untrained import tell_untrained, untrained_exits
from coordinator.settings import checked, shaped
from coordinator.store.opening import open_store
from coordinator.store.store import Store
from edge_sdk.data.loading import load_dataset
from edge_sdk.data.partition import split_holdout
from edge_sdk.errors import EdgeError, ExportError, StoreError, UsageError, typed
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.helpers import files
from edge_sdk.helpers.interrupts import stop_signals
from edge_sdk.models.causal import check_sight
from edge_sdk.tasks.metrics import METRICS
from edge_sdk.training.devices import pick_device

log = logging.getLogger(__name__)
HOLDOUT = 0.2  # as in the paper


@dataclass(frozen=True, kw_only=True)
class EmulateSettings:
    """What of `emulate` is not the run's own, and may be another when it goes on.

    folder: where the run lives; None: it is not kept. processes: clients trained at once. imports:
    modules that register families, for those processes. personal_epochs: of fine-tuning at every
    client at the end, 0: none. out: JSON file of the rounds. export: folder for the served model as
    ONNX, at the end."""

    folder: Path | None = None
    is_resumed: bool = False
    device: str = "auto"
    threads: int = 1
    processes: int = 1
    imports: tuple[str, ...] = ()
    personal_epochs: int = 0
    out: Path | None = None
    export: Path | None = None


def check_emulate(
    config: RunConfig, population: Population, settings: EmulateSettings
) -> torch.device:
    """Raise EdgeError for what is wrong with the settings themselves, before any data is read."""
    with typed():
        device = pick_device(settings.device)
        check_method(checked(config))
        check_population(population, config.num_groups)
        check_processes(settings.processes, device)
    asked = 0 if settings.is_resumed else config.participants or 0
    if asked > population.clients:
        raise UsageError(
            f"--participants {asked}, expected at most the {population.clients} --clients"
        )
    check_folder(settings.folder, settings.is_resumed)
    if settings.out:
        files.check_output(settings.out, "--out")
    check_export(settings.export)
    return device


def emulate(config: RunConfig, population: Population, settings: EmulateSettings) -> None:
    """The whole run over clients in this process, or as far as a signal lets it. config.data: the
    data, which gives the model its input shape and classes. Raises EdgeError."""
    device = check_emulate(config, population, settings)
    torch.set_num_threads(settings.threads)
    data = load_dataset(config.data, config.seed, config.examples, config.test_examples)
    train = data.train
    shape = train.input_shape, train.num_classes
    config = shaped(config, *shape, train.trained_on, train.task, train.vocabulary)
    check_split(population, train)
    config = checked(replace(config, population=population.text()))
    with typed():
        method = make_method(config, device)  # a model that cannot be built begins no run
        check_sight(method.spec, train)
        if population.variants:
            check_numbers(population.variants, method.offer(), len(population.groups))
    if settings.personal_epochs:
        check_global(method, "--personalise", "its own model is tested by --holdout alone")
    try_export(method, data.test, settings.export)
    if not settings.is_resumed:
        check_init(config, method)
    clients = emulated_clients(population, config, train)
    with ExitStack() as stack:
        folder = settings.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        cohort = stack.enter_context(
            emulated_cohort(
                population,
                config,
                clients,
                device=device,
                processes=settings.processes,
                imports=settings.imports,
                offer=method.offer(),
                states=folder / STATES,
            )
        )
        stopping = stack.enter_context(stop_signals())
        store = open_store(folder, config, "emulate", settings.is_resumed)
        if not settings.is_resumed:  # a run that was here before may have left some
            shutil.rmtree(folder / STATES, ignore_errors=True)
        stack.callback(store.close)
        store.is_temporary = settings.folder is None
        stack.enter_context(errors_in_json(store, method.offer(), population, settings.out))
        own = None
        if config.holdout:
            shards = {client.id: client.shard for client in clients}
            who = cohort.clients()
            kept = cohort.newest if method.offer().plan.flat else lambda name: {}
            own = OwnModels(who, shards, config.holdout, kept, device)
        run_rounds(
            store,
            method,
            cohort,
            data.test,
            own=own.figures if own else None,
            device=device,
            should_stop=lambda: bool(stopping),
            report=print_round,
        )
        if not store.is_finished:
            log.info("stopped; round %d was next, %s", store.next_round(), store.way_on())
            return
        write_model(store, method)
        untrained = untrained_exits(store, method.spec.exit) if has_global(method) else []
        tell_untrained(untrained, method.spec.exit)
        extra: dict[str, Any] = {}
        if own:
            extra["personal"] = msgspec.to_builtins(own.results(method))
        if epochs := settings.personal_epochs:
            metric = METRICS[train.task]
            found = personalise(config, method, cohort.clients(), clients, epochs, device)
            extra["personalised"] = found
            for name, group in found["groups"].items():
                before, after = (metric.said(group[when]) for when in ("before", "after"))
                print(
                    f"{name}: {group['clients']} clients, {metric.name} on their own hold-outs "
                    f"{before}, after {epochs} local epochs {after}"
                )
        if settings.out:
            write_json(store, method.offer(), population, settings.out, extra)
        imports = settings.imports
        export_finished(store, method, data.test, settings.export, untrained, imports)


@contextmanager
def errors_in_json(
    store: Store, offer: Offer, population: Population, out: Path | None
) -> Iterator[None]:
    """Around a run: one that ends with an error leaves its rounds and the reasons in `out`, too."""
    try:
        yield
    except ExportError:  # the run is finished and `out` written
        raise
    except EdgeError as error:
        if out:
            try:
                write_json(store, offer, population, out, {"error": str(error)})
            except EdgeError as other:  # of a full disk, which ended the run, too
                log.error("%s", other)
        raise


@contextmanager
def emulated_cohort(
    population: Population,
    config: RunConfig,
    clients: Sequence[EmulatedClient],
    *,
    device: torch.device,
    processes: int = 1,
    imports: Sequence[str] = (),
    offer: Offer | None = None,
    states: Path | None = None,
) -> Iterator[InProcessCohort | ProcessCohort]:
    """The clients as a cohort, trained here or in `processes`. offer: of the run's method; None:
    one without variants. states: see InProcessCohort."""
    shards = {client.id: client.shard for client in clients}
    exits = {client.id: client.exit for client in clients}
    holders = choose_holders(exits, population.holders, config.seed)
    variants = None
    if offer and offer.variants:
        plain = replace(config.plan(config.rounds), optimizer="adam")  # one memory, any method
        numbers = population.variants or tuple(range(1, len(config.backbones) + 1))
        variants = chosen_variants(offer, config.model, plain, exits, numbers)
    here = InProcessCohort(shards, exits, config.model.exit, device, holders, variants, states)
    if processes == 1:
        yield here
        return
    check_processes(processes, device)
    threads = torch.get_num_threads()
    with ProcessCohort(here, processes, imports=imports, threads=threads) as cohort:
        yield cohort


def personalise(
    config: RunConfig,
    method: Method,
    known: Sequence[Client],
    clients: Sequence[EmulatedClient],
    epochs: int,
    device: torch.device,
) -> dict[str, Any]:
    """The metric on the clients' hold-outs, of the served model's part that each can run, before
    and after `epochs` of fine-tuning (HypeMeFed, section 5.3.2): means over all clients and over
    those of each exit. known: the same clients as the cohort has them, but for those that take no
    part. The losses are plain: a client's own label counts are what it is tuned to."""
    plan = replace(config.plan(config.rounds), holdout=0.0, logit_adjustment=0.0)
    emulated = {client.id: client for client in clients}
    groups: dict[str, list[Personalised]] = {"all": []}
    for client in known:
        own = emulated[client.id]
        kept, held = split_holdout(own.shard, config.holdout)
        if not len(held):
            continue
        spec, tensors = method.deployed(client)
        seeded = replace(plan, seed=job_seed(config.seed, 0, client.id))
        found = personalised(spec, tensors, [kept], [held], seeded, epochs, device=device)
        groups["all"] += found
        groups.setdefault(f"exit {own.exit}", []).extend(found)
    return {
        "epochs": epochs,
        "groups": {
            name: {
                "clients": len(results),
                "before": sum(result.before for result in results) / len(results),
                "after": sum(result.after for result in results) / len(results),
            }
            for name, results in groups.items()
            if results
        },
    }


def write_json(
    store: Store, offer: Offer, population: Population, path: Path, extra: Mapping[str, Any]
) -> None:
    """The run as one JSON file, from the database, replaced as a whole. offer: of its method.
    extra: more of its keys. Raises StoreError."""
    config: RunConfig = store.config
    costs: dict[int, dict[str, float]] = {}
    groups: dict[str, Any] = {}
    try:
        with memory_errors("while counting costs"):
            exits = exits_of(population, config.num_groups)
            costs, groups = client_costs(store, offer, exits)
    except EdgeError as error:  # of a family's own code, or for memory
        log.warning("%s has no costs of clients: %s", path, error)
    content = {
        "config": msgspec.to_builtins(config) | msgspec.to_builtins(population),
        "machine": {"torch": torch.__version__, "numpy": np.__version__, "cpus": os.cpu_count()},
        "rounds": [entry | costs.get(int(str(entry["round"])), {}) for entry in store.history()],
        "groups": groups,
        "failures": msgspec.to_builtins(store.failures()),
        **extra,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_whole(path, json.dumps(content, indent=1))
    except OSError as error:
        raise StoreError(
            f"{path} cannot be written: {files.why_not(error)}; {store.way_on()}"
        ) from error
