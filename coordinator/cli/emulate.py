"""Flags of `edge-coordinator emulate`."""

from __future__ import annotations

import argparse
from typing import Any

from coordinator.cli.arguments import add_run_arguments
from coordinator.cli.export import add_export_flag
from coordinator.config import SPLITS
from edge_sdk.cli.flags import add_command, path_flag, whole_flag
from edge_sdk.helpers.imports import heavy_imports


def add_emulate_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "emulate",
        "run the rounds over clients in this process",
        "edge-coordinator emulate --rounds 5 --participants 10 --run-dir runs/emulated",
    )
    add_run_arguments(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="digits", help="digits, a folder or a file; see README.md")
    add("--examples", type=int, help="stratified subset of the training data")
    add("--test-examples", type=int, help="stratified subset of the test data")
    add = parser.add_argument_group("clients").add_argument
    add("--clients", type=int, default=50, help="how many share the data")
    add("--groups", default="17,17,16", help="clients per exit, shallow first")
    add("--split", choices=SPLITS, default="dirichlet", help="of the data among clients")
    add("--alpha", type=float, default=0.5, help="Dirichlet label skew")
    add("--holders", type=float, default=1.0, metavar="SHARE",
        help="share of the weak clients that can hold a deeper stage")  # fmt: skip
    add("--processes", type=whole_flag(1, 1024), default=1, help="clients trained at once")
    add("--personalise", type=whole_flag(1, 100_000), metavar="EPOCHS",
        help="at the end, fine-tune the model at every client; each keeps a fifth of its examples "
        "for testing")  # fmt: skip
    group = parser.add_argument_group("watching and results")
    group.add_argument("--out", type=path_flag, help="write the rounds as JSON here")
    add_export_flag(group)
    parser.set_defaults(run=run_emulate)


def run_emulate(args: argparse.Namespace) -> int:
    with heavy_imports():
        from coordinator.runs.emulating import emulate
    return emulate(args)
