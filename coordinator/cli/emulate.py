"""Flags of `edge-coordinator emulate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coordinator.cli.arguments import RUN, add_flags, add_run_arguments, run_config
from coordinator.cli.export import add_export_flag
from coordinator.config import SPLITS, RunConfig
from coordinator.presets import missing_data
from coordinator.settings import whole_numbers
from edge_sdk.cli.flags import path_flag, whole_flag
from edge_sdk.errors import DataError
from edge_sdk.helpers.imports import heavy_imports

SUBSETS = ("examples", "test_examples")  # of RunConfig


def add_emulate_command(commands: Any) -> None:
    parser = commands.add_parser("emulate", help="run the rounds over clients in this process")
    add_run_arguments(parser)
    parser.add_argument(
        "--data", default="digits", help="digits, a folder or a file; see README.md"
    )
    add_flags(parser, RunConfig, SUBSETS)
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
    with heavy_imports():
        from coordinator.cohorts.population import Population
        from coordinator.runs.emulating import HOLDOUT, EmulateSettings, emulate
    population = Population(
        clients=args.clients,
        groups=tuple(whole_numbers(args.groups, "--groups")),
        split=args.split,
        alpha=args.alpha,
        holders=args.holders,
        holdout=HOLDOUT if args.personalise else 0.0,
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
    config = run_config(args, (*RUN, *SUBSETS), data=args.data)
    return emulate(config, population, settings)
