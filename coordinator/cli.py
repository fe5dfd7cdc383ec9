"""`edge-coordinator`: the coordinator's command line. Values are checked here, once."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace

from coordinator.admission import Admission
from coordinator.cli_arguments import (
    add_run_arguments,
    open_store,
    pick_device,
    run_config,
    settle,
    whole_numbers,
)
from coordinator.cli_clients import add_clients_command, add_invite_command, add_keys_command
from coordinator.cli_export import (
    add_export_command,
    add_export_flag,
    check_export,
    export_served,
)
from coordinator.cli_status import add_status_command
from coordinator.cohort_zmq import Terms, ZmqCohort
from coordinator.config import checked
from coordinator.credit import BUDGET_BYTES, LEAST_BUDGET_BYTES
from coordinator.emulate import (
    SPLITS,
    Population,
    check_writable,
    emulated_clients,
    emulated_cohort,
    personalise,
    write_json,
)
from coordinator.hub import Hub, allow_connections
from coordinator.methods import Method, make_method
from coordinator.metrics import MetricsServer
from coordinator.monitor import Monitor
from coordinator.presets import missing_data
from coordinator.rounds import RoundReport, run_rounds
from coordinator.spool import Spool
from coordinator.store import SPOOL, Store
from edge_sdk import logs
from edge_sdk.cli_flags import (
    checked_endpoint,
    duration_flag,
    import_module,
    path_flag,
    size_flag,
    whole_flag,
)
from edge_sdk.data import DataSet, Examples, load, load_dataset
from edge_sdk.errors import ConfigError, DataError, EdgeError, QuorumError
from edge_sdk.keys import read_keys

log = logging.getLogger(__name__)
FINISHED = "run finished"
GAVE_UP = 3  # exit status: too few devices for too long; 1 is any other error
HOLDOUT = 0.2  # as in the paper


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="edge-coordinator", description="Federated learning over unequal devices."
    )
    parser.add_argument("--debug", action="store_true", help="log everything, show tracebacks")
    parser.add_argument("--log-json", action="store_true", help="log one JSON object per line")
    commands = parser.add_subparsers(dest="command", required=True)
    add_emulate_command(commands)
    add_serve_command(commands)
    add_keys_command(commands)
    add_clients_command(commands)
    add_invite_command(commands)
    add_export_command(commands)
    add_status_command(commands)
    for command in commands.choices.values():  # it may stand before or after the command
        command.add_argument(
            "--log-json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    try:
        args = settle(parser, argv)
    except EdgeError as error:
        print(f"edge-coordinator: {error}", file=sys.stderr)
        return 1
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logs.set_up(is_json=args.log_json, is_debug=args.debug, form=form)
    try:
        for module in getattr(args, "imports", []):
            import_module(module)
        return int(args.run(args))
    except EdgeError as error:
        if args.debug:
            raise
        logs.last_words("edge-coordinator", error)
        return GAVE_UP if isinstance(error, QuorumError) else 1
    except KeyboardInterrupt:
        return 130


def add_emulate_command(commands: Any) -> None:
    parser = commands.add_parser("emulate", help="run the rounds over clients in this process")
    add_run_arguments(parser)
    parser.add_argument(
        "--data", default="digits", help="digits, a folder or a file; see README.md"
    )
    parser.add_argument("--examples", type=int, help="stratified subset of the training data")
    parser.add_argument("--test-examples", type=int, help="stratified subset of the test data")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--groups", default="17,17,16", help="clients per exit, shallow first")
    parser.add_argument("--alpha", type=float, default=0.5, help="Dirichlet label skew")
    parser.add_argument("--holders", type=float, default=1.0, metavar="SHARE",
                        help="share of the weak clients that can hold a deeper stage")  # fmt: skip
    parser.add_argument("--processes", type=whole_flag(1, 1024), default=1,
                        help="clients trained at once")  # fmt: skip
    parser.add_argument("--personalise", type=whole_flag(1, 100_000), metavar="EPOCHS",
                        help="at the end, fine-tune the model at every client; each keeps a fifth "
                        "of its examples for testing")  # fmt: skip
    parser.add_argument("--split", choices=SPLITS, default="dirichlet")
    parser.add_argument("--out", type=path_flag, help="write the rounds as JSON here")
    add_export_flag(parser)
    parser.set_defaults(run=run_emulate)


def run_emulate(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    data = load_for(args)
    shared = run_config(args, data.train.input_shape, data.train.num_classes)
    population = Population(
        clients=args.clients,
        groups=tuple(whole_numbers(args.groups, "--groups")),
        split=args.split,
        alpha=args.alpha,
        holders=args.holders,
        holdout=HOLDOUT if args.personalise else 0.0,
    )
    config = checked(
        replace(
            shared,
            data=args.data,
            population=population.text(),
            examples=args.examples,
            test_examples=args.test_examples,
        )
    )
    method = make_method(config, device)  # a model that cannot be built begins no run
    if args.out:
        check_writable(args.out)
    check_export(args.export)
    clients = emulated_clients(population, config, data.train)
    with ExitStack() as stack:
        cohort = stack.enter_context(
            emulated_cohort(
                population, config, clients,
                device=device, processes=args.processes, imports=args.imports,
            )
        )  # fmt: skip
        folder = args.run_dir or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run"
        stopping = stack.enter_context(stop_signals())
        store = open_store(folder, config, "emulate", args.resume)
        stack.callback(store.close)
        store.is_temporary = args.run_dir is None
        run_rounds(
            store, method, cohort, data.test,
            device=device, should_stop=lambda: bool(stopping), report=print_round,
        )  # fmt: skip
        if not store.is_finished:
            log.info("stopped; round %d was next, %s", store.next_round(), store.way_on())
            return 0
        store.write_model(method.spec, method.served())
        extra = {}
        if args.personalise:
            served, epochs = method.served(), args.personalise
            found = personalise(config, method.spec, served, clients, epochs, device)
            extra["personalised"] = found
            for name, group in found["groups"].items():
                print(
                    f"{name}: {group['clients']} clients, accuracy on their own hold-outs "
                    f"{100 * group['before']:.1f} %, after {epochs} local epochs "
                    f"{100 * group['after']:.1f} %"
                )
        if args.out:
            write_json(store, population, args.out, extra)
        export_served(method, data.test, args.export)
    return 0


def load_for(args: argparse.Namespace) -> DataSet:
    """The data of --data. Raises DataError, which for a preset says what files it needs."""
    if args.preset and not Path(args.data).expanduser().exists():
        raise DataError(missing_data(args.preset, args.data))
    return load_dataset(args.data, args.seed, args.examples, args.test_examples)


def add_serve_command(commands: Any) -> None:
    parser = commands.add_parser("serve", help="run the rounds over devices, by ZeroMQ")
    add_run_arguments(parser)
    add = parser.add_argument
    add("--listen", default="tcp://*:5555", help="where devices connect, default %(default)s")
    add("--keys", type=path_flag, default=Path("keys"), help="folder of server.public and .secret")
    add("--clients-file", type=path_flag, help="admitted devices, default KEYS/clients")
    add("--insecure", action="store_true", help="no encryption, admit everybody")
    add("--test", help="common test set: a data source, its test part or else all of it")
    add("--input", help="without --test: shape of one example, e.g. 1x28x28")
    add("--classes", type=int, help="without --test: number of classes")
    add("--min-clients", type=int, default=1, help="devices to wait for before the first round")
    add("--deadline", type=float, default=0.0, help="seconds a job may take, devices plan for it")
    add("--grace", type=float, default=600.0,
        help="seconds after the deadline before a round closes without its stragglers")  # fmt: skip
    add("--quorum", type=float, default=0.5, help="share of participants that must return")
    add("--min-updates", type=int, default=1, help="and so many of them at least")
    add("--mode", choices=("sync", "async"), default="sync",
        help="async: a round ends with its quorum, the others go on and count later")  # fmt: skip
    add("--late", choices=("accept", "drop"), default="accept",
        help="an update of a round that is over: count it, for less, or not")  # fmt: skip
    add("--staleness-half-life", type=float, default=2.0, metavar="ROUNDS",
        help="after which a late update counts half, default %(default)s")  # fmt: skip
    add("--give-up-after", type=duration_flag, default=3600.0, metavar="SECONDS",
        help="end with status 3 when there are too few devices and nothing changes for so long, "
        "0: never; default %(default)s")  # fmt: skip
    add("--memory-budget", type=size_flag, default=BUDGET_BYTES, metavar="SIZE",
        help="of parts on their way at once, e.g. 256M; default 64M")  # fmt: skip
    add("--metrics", metavar="HOST:PORT", help="answer Prometheus there; nobody is asked who it is")
    add_export_flag(parser)
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    test = None
    if args.test:
        _, train_part, test_part = load(args.test)
        test = test_part or train_part
        shape, num_classes = test.input_shape, test.num_classes
    elif args.input and args.classes is not None:
        shape, num_classes = tuple(whole_numbers(args.input, "--input", "x")), args.classes
    else:
        raise ConfigError(
            "give --test SOURCE, or --input and --classes to train without a test set"
        )
    if args.run_dir is None:
        raise ConfigError("serve needs --run-dir, the folder that the run lives in")
    shared = run_config(args, shape, num_classes)
    config = checked(
        replace(
            shared,
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
    method = make_method(config, device)  # a model that cannot be built begins no run
    check_export(args.export)
    keys, admission = None, None
    if args.insecure:
        log.warning("--insecure: nothing is encrypted and every device is admitted")
    else:
        keys = read_keys(args.keys, "server")
        admission = Admission(args.clients_file or args.keys / "clients")
    if args.memory_budget < LEAST_BUDGET_BYTES:
        raise ConfigError(
            f"--memory-budget is {args.memory_budget} bytes, expected at least {LEAST_BUDGET_BYTES}"
        )
    allow_connections(args.min_clients)
    with ExitStack() as stack:
        metrics = (
            stack.enter_context(closing(MetricsServer(args.metrics)))
            if args.metrics is not None
            else None
        )
        hub = Hub(checked_endpoint(args.listen, "--listen"), keys, admission)
        try:
            store = open_store(args.run_dir, config, "serve", args.resume)
        except BaseException:
            hub.close()
            raise
        return serve(args, hub, store, method, test, device, metrics)


def serve(
    args: argparse.Namespace,
    hub: Hub,
    store: Store,
    method: Method,
    test: Examples | None,
    device: torch.device,
    metrics: MetricsServer | None,
) -> int:
    """Rounds over the hub until all are done or a signal arrives; closes hub and store."""
    config = store.config
    terms = Terms(
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
    where = (store.run, store.folder, hub.endpoint)
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
                hub, terms, spool, is_stopping, store.was_counted, store.next_round()
            )
        except EdgeError:
            store.close()
            hub.close()
            raise
        monitor = Monitor(store.folder, store.run, config.rounds, cohort.snapshot)
        if metrics:
            metrics.latest = lambda: monitor.latest
        try:
            with monitor.until_end(lambda: store.is_finished):
                store.write_endpoint(hub.endpoint)
                run_rounds(
                    store, method, cohort, test, device=device,
                    should_stop=lambda: bool(stopping), report=report, phase=monitor.phase,
                )  # fmt: skip
                if store.is_finished:
                    store.write_model(method.spec, method.served())
                    goodbye = FINISHED
                    export_served(method, test, args.export)
        finally:
            if stopping and not store.is_finished:
                said = "stopped; round %d is next, go on with --resume"
                log.info(said, store.next_round(), extra=logs.event("stopped"))
            store.close()
            cohort.close(goodbye, is_final=goodbye == FINISHED)
    return 0


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that gets an entry when SIGTERM or SIGINT arrives; a second SIGINT interrupts."""
    stopping: list[int] = []

    def note(number: int, frame: object) -> None:
        if stopping and number == signal.SIGINT:
            raise KeyboardInterrupt
        stopping.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def print_round(report: RoundReport) -> None:
    """One progress line."""
    totals = report.totals
    last = " / ".join(f"{100 * share:.1f}" for share in report.accuracy) or "-"
    served = " / ".join(f"{100 * share:.1f}" for share in report.accuracy_served) or "-"
    print(
        f"round {report.round}: {totals.returned} of {totals.chosen} returned, "
        f"accuracy per exit {last} %, served {served} %, {totals.wall_s:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
