"""Flags of `edge-coordinator export`, and of the export at the end of a run."""

from __future__ import annotations

import argparse
from typing import Any

from coordinator.cli.arguments import REPEATED
from edge_sdk.cli.flags import MAX_EXITS, Only, add_command, path_flag, whole_flag
from edge_sdk.helpers.imports import heavy_imports


def add_export_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "export",
        "a run's served model, or a client's part, as ONNX",
        "edge-coordinator export --run runs/first --out model",
    )
    add = parser.add_argument
    add(
        "--run",
        dest="run_dir",
        type=path_flag,
        required=True,
        metavar="DIR",
        help="folder of the run",
    )
    add("--out", type=path_flag, required=True, metavar="DIR", help="folder to write")
    part = parser.add_mutually_exclusive_group()
    part.add_argument(
        "--exit", type=whole_flag(1, MAX_EXITS), help="deepest exit to keep, default all"
    )
    part.add_argument("--client", metavar="ID", help="the part that this client can run")
    add("--backbone", metavar="NAME", help="of a run with several, this one")
    add("--data", help="real examples to check it on, default the run's own test set")
    said = "Python module that registers your model families"
    add("--import", dest="imports", metavar="MODULE", help=said, **REPEATED)
    parser.only["--backbone"] = Only("--client", (None,))
    parser.set_defaults(run=run_export)


def add_export_flag(parser: argparse._ActionsContainer) -> None:
    """For the commands that run rounds."""
    parser.add_argument(
        "--export", type=path_flag, metavar="DIR", help="at the end, write the served model as ONNX"
    )


def run_export(args: argparse.Namespace) -> int:
    with heavy_imports():
        from coordinator.runs.exporting import export_run
    chosen = {"client_id": args.client, "exit": args.exit, "backbone": args.backbone}
    export_run(args.run_dir, args.out, **chosen, data=args.data)
    return 0
