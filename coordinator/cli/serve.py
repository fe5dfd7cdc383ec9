"""Flags of `edge-coordinator serve`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from coordinator.cli.arguments import add_run_arguments
from coordinator.cli.export import add_export_flag
from coordinator.fleet.flow_control import BUDGET_BYTES
from edge_sdk.cli.flags import add_command, duration_flag, path_flag, size_flag
from edge_sdk.helpers.imports import heavy_imports


def add_serve_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "serve",
        "run the rounds over devices, by ZeroMQ",
        "edge-coordinator serve --run-dir runs/first --test my-test.npz --min-clients 4",
        "edge-coordinator serve --run-dir runs/first --test my-test.npz --min-clients 4 --resume",
    )
    add_run_arguments(parser)
    add = parser.add_argument_group("devices").add_argument
    add("--listen", default="tcp://*:5555", help="where devices connect")
    add("--keys", type=path_flag, default=Path("keys"), help="folder of keys")
    add("--clients-file", type=path_flag, help="admitted devices, default KEYS/clients")
    add("--insecure", action="store_true", help="no encryption, admit everybody")
    add("--memory-budget", type=size_flag, default=BUDGET_BYTES, metavar="SIZE",
        help="of parts on their way at once, e.g. 256M; default 64M")  # fmt: skip
    add = parser.add_argument_group("data").add_argument
    add("--test", help="common test set: a data source, its test part or else all of it")
    add("--input", help="without --test: shape of one example, e.g. 1x28x28")
    add("--classes", type=int, help="without --test: number of classes")
    add = parser.add_argument_group("pace of the rounds").add_argument
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
        help="after which a late update counts half")  # fmt: skip
    add("--give-up-after", type=duration_flag, default=3600.0, metavar="SECONDS",
        help="end with status 3 when there are too few devices and nothing changes for so long, "
        "0: never")  # fmt: skip
    group = parser.add_argument_group("watching and results")
    group.add_argument(
        "--metrics", metavar="HOST:PORT", help="answer Prometheus there; nobody is asked who it is"
    )
    add_export_flag(group)
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    with heavy_imports():
        from coordinator.runs.serving import serve
    return serve(args)
