"""`edge-coordinator emulate`, from its flags to the end: what it runs is in emulate.py."""

from __future__ import annotations

import argparse
import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from msgspec.structs import replace

from coordinator.cli_arguments import ANY_DATA, run_config, whole_numbers
from coordinator.config import RunConfig, checked
from coordinator.emulate import (
    Population,
    check_population,
    check_processes,
    check_writable,
    emulated_clients,
    emulated_cohort,
    personalise,
    write_json,
)
from coordinator.exporting import check_export, export_served
from coordinator.methods import check_method, make_method
from coordinator.presets import missing_data
from coordinator.rounds import run_rounds
from coordinator.running import check_folder, open_store, pick_device, print_round, stop_signals
from edge_sdk.data import DataSet, load_dataset
from edge_sdk.errors import DataError

log = logging.getLogger(__name__)
HOLDOUT = 0.2  # as in the paper


def emulate(args: argparse.Namespace) -> int:
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    population = Population(
        clients=args.clients,
        groups=tuple(whole_numbers(args.groups, "--groups")),
        split=args.split,
        alpha=args.alpha,
        holders=args.holders,
        holdout=HOLDOUT if args.personalise else 0.0,
    )
    check_method(emulate_config(args, population, *ANY_DATA))
    check_population(population, args.exits)
    check_processes(args.processes, device)
    check_folder(args.run_dir, args.resume)
    if args.out:
        check_writable(args.out)
    check_export(args.export)
    data = load_for(args)
    config = emulate_config(args, population, data.train.input_shape, data.train.num_classes)
    method = make_method(config, device)  # a model that cannot be built begins no run
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


def emulate_config(
    args: argparse.Namespace, population: Population, input_shape: tuple[int, ...], num_classes: int
) -> RunConfig:
    """Raises ConfigError naming the flag."""
    return checked(
        replace(
            run_config(args, input_shape, num_classes),
            data=args.data,
            population=population.text(),
            examples=args.examples,
            test_examples=args.test_examples,
        )
    )


def load_for(args: argparse.Namespace) -> DataSet:
    """The data of --data. Raises DataError, which for a preset says what files it needs."""
    if args.preset and not Path(args.data).expanduser().exists():
        raise DataError(missing_data(args.preset, args.data))
    return load_dataset(args.data, args.seed, args.examples, args.test_examples)
