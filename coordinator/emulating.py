"""`edge-coordinator emulate`, from its flags to the end: what it runs is in emulate.py."""

from __future__ import annotations

import argparse
import logging
import tempfile
from contextlib import ExitStack
from pathlib import Path

import torch
from msgspec.structs import replace

from coordinator.cli_arguments import run_config, whole_numbers
from coordinator.config import checked
from coordinator.emulate import (
    Population,
    check_writable,
    emulated_clients,
    emulated_cohort,
    personalise,
    write_json,
)
from coordinator.exporting import check_export, export_served
from coordinator.methods import make_method
from coordinator.presets import missing_data
from coordinator.rounds import run_rounds
from coordinator.running import open_store, pick_device, print_round
from edge_sdk.data import DataSet, load_dataset
from edge_sdk.errors import DataError
from edge_sdk.interrupts import stop_signals

log = logging.getLogger(__name__)
HOLDOUT = 0.2  # as in the paper


def emulate(args: argparse.Namespace) -> int:
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
