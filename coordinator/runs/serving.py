"""`edge-coordinator serve`, from its settings to the end."""

from __future__ import annotations

import logging
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import torch

from coordinator.admission.client_list import Admission
from coordinator.config import RunConfig
from coordinator.fleet.cohort import ZmqCohort
from coordinator.fleet.flow_control import BUDGET_BYTES, LEAST_BUDGET_BYTES
from coordinator.fleet.spool import Spool
from coordinator.links.connections import allow_connections
from coordinator.links.router import Router
from coordinator.methods.base import Method, families_of
from coordinator.methods.registry import check_method, make_method
from coordinator.runs.beginning import check_init
from coordinator.runs.exporting import check_export, export_finished, try_export
from coordinator.runs.monitor import Monitor
from coordinator.runs.own_models import has_global, write_model
from coordinator.runs.prometheus import MetricsServer, metrics_flag
from coordinator.runs.rounds import RoundReport, check_folder, print_round, run_rounds
from coordinator.runs.untrained import tell_untrained, untrained_exits
from coordinator.settings import checked, shaped
from coordinator.store.opening import open_store
from coordinator.store.store import SPOOL, Store
from edge_sdk.data.loading import Examples, as_asked, load
from edge_sdk.errors import EdgeError, UsageError, typed
from edge_sdk.helpers import logs
from edge_sdk.helpers.interrupts import stop_signals
from edge_sdk.helpers.text import checked_endpoint
from edge_sdk.models.causal import check_sight
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.keys import read_keys
from edge_sdk.training.devices import pick_device

log = logging.getLogger(__name__)
FINISHED = "run finished"


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What of `serve` is not the run's own, and may be another when it goes on.

    folder: where the run lives. endpoint: where devices connect. keys: the folder of the
    coordinator's; None: nothing is encrypted and everybody is admitted. clients_file: of the
    admitted devices, by default beside the keys. metrics: HOST:PORT for Prometheus. export: folder
    for the served model as ONNX, at the end. imports: modules that register what the run uses.
    input_shape, num_classes, task, vocabulary: asked for beside a test set, which may lack some
    classes or token ids."""

    folder: Path
    is_resumed: bool = False
    endpoint: str = "tcp://*:5555"
    keys: Path | None = None
    clients_file: Path | None = None
    device: str = "auto"
    threads: int = 1
    give_up_after_s: float = 3600.0
    budget_bytes: int = BUDGET_BYTES
    metrics: str | None = None
    export: Path | None = None
    imports: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    task: Task | None = None
    vocabulary: int | None = None


def check_serve(config: RunConfig, settings: ServeSettings) -> torch.device:
    """Raise EdgeError for what is wrong with the settings themselves, before any data is read."""
    with typed():
        check_method(checked(config))
        checked_endpoint(settings.endpoint, "--listen")
        if settings.metrics is not None:
            metrics_flag(settings.metrics)
        if settings.budget_bytes < LEAST_BUDGET_BYTES:
            raise UsageError(
                f"--memory-budget is {settings.budget_bytes} bytes, expected at least "
                f"{LEAST_BUDGET_BYTES}"
            )
        device = pick_device(settings.device)
    check_folder(settings.folder, settings.is_resumed)
    check_export(settings.export)
    return device


def serve(config: RunConfig, settings: ServeSettings) -> None:
    """The whole run over real devices, or as far as a signal lets it. config.data: the common test
    set, which gives the model its input shape and classes; where it is "", the model has them.
    Raises EdgeError."""
    device = check_serve(config, settings)
    torch.set_num_threads(settings.threads)
    keys, admission = None, None
    if settings.keys is None:
        log.warning("--insecure: nothing is encrypted and every device is admitted")
    else:
        keys = read_keys(settings.keys, "server")
        admission = Admission(settings.clients_file or settings.keys / "clients")
    allow_connections(config.min_clients)
    test = None
    if config.data:
        _, train_part, test_part = load(config.data)
        found = test_part or train_part
        asked = settings.input_shape, settings.num_classes, settings.task, settings.vocabulary
        test = as_asked(found, config.data, *asked)
        shape = test.input_shape, test.num_classes
        config = checked(shaped(config, *shape, test.trained_on, test.task, test.vocabulary))
    with typed():
        method = make_method(config, device)  # a model that cannot be built begins no run
    if test is not None and not (has_global(method) or families_of(method)):
        said = (
            "method %s has no model for all clients, so --test %s only gives their models a shape"
        )
        log.warning(said, config.method, config.data)
    if test is not None:
        check_sight(method.spec, test)
    try_export(method, test, settings.export)
    if not settings.is_resumed:
        check_init(config, method)
    with ExitStack() as stack:
        metrics = MetricsServer(settings.metrics) if settings.metrics is not None else None
        if metrics:
            stack.enter_context(closing(metrics))
        router = Router(checked_endpoint(settings.endpoint, "--listen"), keys, admission)
        try:
            store = open_store(settings.folder, config, "serve", settings.is_resumed)
        except BaseException:
            router.close()
            raise
        serve_rounds(settings, router, store, method, test, device, metrics)


def serve_rounds(
    settings: ServeSettings,
    router: Router,
    store: Store,
    method: Method,
    test: Examples | None,
    device: torch.device,
    metrics: MetricsServer | None,
) -> None:
    """Rounds over the router until all are done or a signal arrives; closes router and store."""
    config = store.config
    where = (store.run, store.folder, router.endpoint)
    if store.is_finished:
        log.info("run %s has all its %d rounds already", store.run, config.rounds)
    log.info("run %s in %s, listening on %s", *where, extra=logs.event("started", run=store.run))
    goodbye, untrained = "coordinator stopped", list[int]()
    with stop_signals() as stopping:

        def is_stopping() -> bool:  # asked at every message
            monitor.tick()
            return bool(stopping)

        def report(done: RoundReport) -> None:
            print_round(done)
            monitor.round_done(done)

        try:
            cohort = ZmqCohort(
                router,
                Spool(store.folder / SPOOL),
                config,
                method.offer(),
                run=store.run,
                give_up_after_s=settings.give_up_after_s,
                budget_bytes=settings.budget_bytes,
                should_stop=is_stopping,
                was_counted=store.was_counted,
                next_round=store.next_round(),
            )
        except EdgeError:
            store.close()
            router.close()
            raise
        monitor = Monitor(
            store.folder, store.run, config.rounds, cohort.snapshot, check_held=store.check_held
        )
        if metrics:
            metrics.latest = lambda: monitor.latest
        try:
            with monitor.until_end(lambda: store.is_finished):
                store.write_endpoint(router.endpoint)
                run_rounds(
                    store,
                    method,
                    cohort,
                    test,
                    device=device,
                    should_stop=lambda: bool(stopping),
                    report=report,
                    phase=monitor.phase,
                )
                if store.is_finished:
                    path = write_model(store, method)
                    untrained = untrained_exits(store, method.spec.exit) if path else []
                    tell_untrained(untrained, method.spec.exit)
                    goodbye = FINISHED
                    place = f", its model is in {path}" if path else ""
                    fields = logs.event("finished", run=store.run)
                    log.info("run %s is finished%s", store.run, place, extra=fields)
        finally:
            if stopping and not store.is_finished:
                said = "stopped; round %d is next, go on with --resume"
                log.info(said, store.next_round(), extra=logs.event("stopped"))
            store.close()
            cohort.close(goodbye, is_final=goodbye == FINISHED)
    if goodbye == FINISHED:  # and no device waits for it
        export_finished(store, method, test, settings.export, untrained, settings.imports)
