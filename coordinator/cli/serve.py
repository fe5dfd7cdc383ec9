"""Flags of `edge-coordinator serve`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from coordinator.cli.arguments import RUN, add_flags, add_run_arguments, run_config
from coordinator.cli.export import add_export_flag
from coordinator.config import RunConfig
from coordinator.fleet.flow_control import BUDGET_BYTES
from coordinator.settings import whole_numbers
from edge_sdk.cli.flags import duration_flag, path_flag, size_flag
from edge_sdk.errors import ConfigError
from edge_sdk.helpers.imports import heavy_imports

FLEET = (  # of RunConfig, by rounds over real devices
    "deadline_s", "grace_s", "quorum", "min_updates", "mode", "late", "staleness_half_life",
    "min_clients",
)  # fmt: skip


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
    add_flags(parser, RunConfig, FLEET, defaults={"quorum": 0.5})
    add("--give-up-after", type=duration_flag, default=3600.0, metavar="SECONDS",
        help="end with status 3 when there are too few devices and nothing changes for so long, "
        "0: never; default %(default)s")  # fmt: skip
    add("--memory-budget", type=size_flag, default=BUDGET_BYTES, metavar="SIZE",
        help="of parts on their way at once, e.g. 256M; default 64M")  # fmt: skip
    add("--metrics", metavar="HOST:PORT", help="answer Prometheus there; nobody is asked who it is")
    add_export_flag(parser)
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    with heavy_imports():
        from coordinator.runs.serving import ServeSettings, serve
    config = run_config(args, (*RUN, *FLEET), data=args.test or "")
    if args.input and args.classes is not None and not args.test:
        shape = tuple(whole_numbers(args.input, "--input", "x"))
        given = replace(config.model, input_shape=shape, num_classes=args.classes)
        config = replace(config, model=given)
    elif not args.test:
        raise ConfigError(
            "give --test SOURCE, or --input and --classes to train without a test set"
        )
    if args.run_dir is None:
        raise ConfigError("serve needs --run-dir, the folder that the run lives in")
    settings = ServeSettings(
        folder=args.run_dir,
        is_resumed=args.resume,
        endpoint=args.listen,
        keys=None if args.insecure else args.keys,
        clients_file=args.clients_file,
        device=args.device,
        threads=args.threads,
        give_up_after_s=args.give_up_after,
        budget_bytes=args.memory_budget,
        metrics=args.metrics,
        export=args.export,
    )
    return serve(config, settings)
