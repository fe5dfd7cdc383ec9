"""`edge-coordinator serve`, from its flags to the end."""

from __future__ import annotations

import argparse
import logging
from contextlib import ExitStack, closing

import torch
from msgspec.structs import replace

from coordinator.admission.client_list import Admission
from coordinator.config import RunConfig
from coordinator.fleet.cohort import ServeOptions, ZmqCohort
from coordinator.fleet.flow_control import LEAST_BUDGET_BYTES
from coordinator.fleet.router import Router, allow_connections
from coordinator.fleet.spool import Spool
from coordinator.methods.base import Method
from coordinator.methods.registry import check_method, make_method
from coordinator.runs.exporting import check_export, export_served
from coordinator.runs.monitor import Monitor
from coordinator.runs.prometheus import MetricsServer, metrics_flag
from coordinator.runs.rounds import RoundReport, check_folder, print_round, run_rounds
from coordinator.settings import ANY_DATA, checked, run_config, whole_numbers
from coordinator.store.store import SPOOL, Store, open_store
from edge_sdk.data.loading import Examples, load
from edge_sdk.errors import ConfigError, EdgeError
from edge_sdk.helpers import logs
from edge_sdk.helpers.interrupts import stop_signals
from edge_sdk.helpers.text import checked_endpoint
from edge_sdk.protocol.keys import read_keys
from edge_sdk.training.trainer import pick_device

log = logging.getLogger(__name__)
FINISHED = "run finished"


def serve(args: argparse.Namespace) -> int:
    check_serve(args)
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    keys, admission = None, None
    if args.insecure:
        log.warning("--insecure: nothing is encrypted and every device is admitted")
    else:
        keys = read_keys(args.keys, "server")
        admission = Admission(args.clients_file or args.keys / "clients")
    allow_connections(args.min_clients)
    test = None
    if args.test:
        _, train_part, test_part = load(args.test)
        test = test_part or train_part
        shape, num_classes = test.input_shape, test.num_classes
    else:
        shape, num_classes = tuple(whole_numbers(args.input, "--input", "x")), args.classes
    config = serve_config(args, shape, num_classes)
    method = make_method(config, device)  # a model that cannot be built begins no run
    with ExitStack() as stack:
        metrics = (
            stack.enter_context(closing(MetricsServer(args.metrics)))
            if args.metrics is not None
            else None
        )
        router = Router(checked_endpoint(args.listen, "--listen"), keys, admission)
        try:
            store = open_store(args.run_dir, config, "serve", args.resume)
        except BaseException:
            router.close()
            raise
        return serve_rounds(args, router, store, method, test, device, metrics)


def check_serve(args: argparse.Namespace) -> None:
    """Raise EdgeError for what is wrong with the flags themselves, before any data is read."""
    if not args.test and not (args.input and args.classes is not None):
        raise ConfigError(
            "give --test SOURCE, or --input and --classes to train without a test set"
        )
    if args.run_dir is None:
        raise ConfigError("serve needs --run-dir, the folder that the run lives in")
    check_method(serve_config(args, *ANY_DATA))
    checked_endpoint(args.listen, "--listen")
    if args.metrics is not None:
        metrics_flag(args.metrics)
    if args.memory_budget < LEAST_BUDGET_BYTES:
        raise ConfigError(
            f"--memory-budget is {args.memory_budget} bytes, expected at least {LEAST_BUDGET_BYTES}"
        )
    check_folder(args.run_dir, args.resume)
    check_export(args.export)


def serve_config(
    args: argparse.Namespace, input_shape: tuple[int, ...], num_classes: int
) -> RunConfig:
    """Raises ConfigError naming the flag."""
    return checked(
        replace(
            run_config(args, input_shape, num_classes),
            data=args.test or "",
            deadline_s=args.deadline,
            grace_s=args.grace,
            quorum=args.quorum,
            min_clients=args.min_clients,
            min_updates=args.min_updates,
            mode=args.mode,
            late=args.late,
            staleness_half_life=args.staleness_half_life,
        )
    )


def serve_rounds(
    args: argparse.Namespace,
    router: Router,
    store: Store,
    method: Method,
    test: Examples | None,
    device: torch.device,
    metrics: MetricsServer | None,
) -> int:
    """Rounds over the router until all are done or a signal arrives; closes router and store."""
    config = store.config
    terms = ServeOptions(
        run=store.run,
        model=method.spec,
        plan=config.plan(config.rounds),
        deadline_s=config.deadline_s,
        grace_s=config.grace_s,
        quorum=config.quorum,
        min_clients=config.min_clients,
        min_updates=config.min_updates,
        is_async=config.mode == "async",
        oldest=config.oldest,
        give_up_after_s=args.give_up_after,
        budget_bytes=args.memory_budget,
    )
    where = (store.run, store.folder, router.endpoint)
    if store.is_finished:
        log.info("run %s has all its %d rounds already", store.run, config.rounds)
    log.info("run %s in %s, listening on %s", *where, extra=logs.event("started", run=store.run))
    goodbye = "coordinator stopped"
    with stop_signals() as stopping:

        def is_stopping() -> bool:  # asked at every message
            monitor.tick()
            return bool(stopping)

        def report(done: RoundReport) -> None:
            print_round(done)
            monitor.round_done(done)

        try:
            spool = Spool(store.folder / SPOOL)
            cohort = ZmqCohort(
                router, terms, spool, is_stopping, store.was_counted, store.next_round()
            )
        except EdgeError:
            store.close()
            router.close()
            raise
        monitor = Monitor(store.folder, store.run, config.rounds, cohort.snapshot)
        if metrics:
            metrics.latest = lambda: monitor.latest
        try:
            with monitor.until_end(lambda: store.is_finished):
                store.write_endpoint(router.endpoint)
                run_rounds(
                    store, method, cohort, test, device=device,
                    should_stop=lambda: bool(stopping), report=report, phase=monitor.phase,
                )  # fmt: skip
                if store.is_finished:
                    path = store.write_model(method.spec, method.served())
                    goodbye = FINISHED
                    export_served(method, test, args.export)
                    told = (store.run, path, logs.event("finished", run=store.run))
                    log.info("run %s is finished, its model is in %s", *told[:2], extra=told[2])
        finally:
            if stopping and not store.is_finished:
                said = "stopped; round %d is next, go on with --resume"
                log.info(said, store.next_round(), extra=logs.event("stopped"))
            store.close()
            cohort.close(goodbye, is_final=goodbye == FINISHED)
    return 0
