"""Flags of `edge-coordinator emulate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coordinator.cli.arguments import SHARED, add_flags, add_run_arguments, run_config
from coordinator.cli.export import add_export_flag
from coordinator.config import ROTATING, SPLITS, RunConfig
from coordinator.presets import missing_data
from edge_sdk.cli.flags import (
    MOST,
    Only,
    add_command,
    number_flag,
    path_flag,
    share_flag,
    whole_flag,
    whole_numbers_flag,
)
from edge_sdk.errors import DataError
from edge_sdk.helpers.imports import heavy_imports

SUBSETS = ("examples", "test_examples")  # fields of RunConfig
PERSONALISE = "at the end, fine-tune the model at every client; --holdout, or a fifth, tests it"


def add_emulate_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "emulate",
        "run the rounds over emulated clients, in one process or several",
        "edge-coordinator emulate --rounds 5 --participants 10 --run-dir runs/emulated",
    )
    add_run_arguments(parser)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", default="digits", help="digits, a folder or a file; see docs/data.md"
    )
    add_flags(group, RunConfig, SUBSETS)
    add = parser.add_argument_group("clients").add_argument
    alpha = number_flag(0, 1e300, "a number above 0", is_open=True)
    add("--clients", type=whole_flag(1, MOST), default=50, help="how many share the data")
    said = "clients per exit, shallow first; default as many at each"
    add("--groups", type=whole_numbers_flag, default=(), metavar="17,17,16", help=said)
    add("--split", choices=SPLITS, default="dirichlet", help="of the data among clients")
    add("--alpha", type=alpha, default=0.5, help="Dirichlet label skew")
    said = "share of the weak clients that can hold a deeper stage"
    add("--holders", type=share_flag, default=1.0, metavar="SHARE", help=said)
    said = (
        "of each group, of a method that offers several models; default the largest that fits, or "
        "of --backbones one after the other"
    )
    add("--variants", type=whole_numbers_flag, default=(), metavar="1,2,4", help=said)
    add("--processes", type=whole_flag(1, 1024), default=1, help="clients trained at once")
    add("--personalise", type=whole_flag(1, 100_000), metavar="EPOCHS", help=PERSONALISE)
    group = parser.add_argument_group("watching and results")
    group.add_argument("--out", type=path_flag, help="write the rounds as JSON here")
    add_export_flag(group)
    parser.only |= {
        "--alpha": Only("--split", ("dirichlet",)),
        "--holders": Only("--rotation", ROTATING[1:]),
    }
    parser.set_defaults(run=run_emulate)


def run_emulate(args: argparse.Namespace) -> int:
    with heavy_imports():
        from coordinator.cohorts.population import Population, even_groups
        from coordinator.runs.emulating import HOLDOUT, EmulateSettings, emulate
    if args.personalise and not args.holdout:
        args.holdout = HOLDOUT
    config = run_config(args, [*SHARED, *SUBSETS], data=args.data)
    population = Population(
        clients=args.clients,
        groups=args.groups or even_groups(args.clients, config.num_groups),
        split=args.split,
        alpha=args.alpha,
        holders=args.holders,
        variants=args.variants,
    )
    settings = EmulateSettings(
        folder=args.run_dir,
        is_resumed=args.resume,
        device=args.device,
        threads=args.threads,
        processes=args.processes,
        imports=tuple(args.imports),
        personal_epochs=args.personalise or 0,
        out=args.out,
        export=args.export,
    )
    if args.preset and not Path(args.data).expanduser().exists():
        raise DataError(missing_data(args.preset, args.data))
    emulate(config, population, settings)
    return 0
