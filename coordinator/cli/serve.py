"""Flags of `edge-coordinator serve`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coordinator.cli.arguments import SHARED, add_flags, add_run_arguments, run_config
from coordinator.cli.export import add_export_flag
from coordinator.config import RunConfig
from coordinator.fleet.flow_control import BUDGET_BYTES
from coordinator.settings import shaped
from edge_sdk.cli.flags import (
    MOST_IDS,
    Only,
    add_command,
    duration_flag,
    path_flag,
    shape_flag,
    size_flag,
    whole_flag,
)
from edge_sdk.errors import UsageError
from edge_sdk.helpers.imports import heavy_imports
from edge_sdk.protocol.fields import MAX_OUTPUTS
from edge_sdk.tasks.metrics import METRICS

if TYPE_CHECKING:
    from coordinator.runs.serving import ServeSettings

# Fields of RunConfig
PACE = ["min_clients", "deadline_s", "grace_s", "quorum", "min_updates"]
LATE = ["mode", "late", "staleness_half_life"]
INPUT = "shape of an example; with --test that set's"
CLASSES = "classes, or outputs of another task; with --test at least that set's"
TASK = "what they mean, default that of --test, else classify; see docs/tasks.md"
VOCABULARY = "examples are token ids below N"
GIVE_UP = "end with status 3 when devices are too few and nothing changes for so long, 0: never"


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
    said = "of parts on their way at once, e.g. 256M; default 64M"
    add("--memory-budget", type=size_flag, default=BUDGET_BYTES, metavar="SIZE", help=said)
    add = parser.add_argument_group("data").add_argument
    add("--test", help="common test set: a data source, its test part or else all of it")
    add("--input", type=shape_flag, metavar="1x28x28", help=INPUT)
    add("--classes", type=whole_flag(1, MAX_OUTPUTS), help=CLASSES)
    add("--task", choices=METRICS, help=TASK)
    add("--vocabulary", type=whole_flag(1, MOST_IDS), metavar="N", help=VOCABULARY)
    group = parser.add_argument_group("pace of the rounds")
    add_flags(group, RunConfig, [*PACE, *LATE], defaults={"quorum": 0.5})
    add = group.add_argument
    add("--give-up-after", type=duration_flag, default=3600.0, metavar="SECONDS", help=GIVE_UP)
    group = parser.add_argument_group("watching and results")
    group.add_argument(
        "--metrics", metavar="HOST:PORT", help="answer Prometheus there; nobody is asked who it is"
    )
    add_export_flag(group)
    parser.only |= {
        "--keys": Only("--insecure", (False,)),
        "--clients-file": Only("--insecure", (False,)),
        "--eval-every": Only("--test"),
        "--eval-tail": Only("--test"),
    }
    parser.set_defaults(run=run_serve)


def run_serve(args: argparse.Namespace) -> int:
    with heavy_imports():
        from coordinator.runs.serving import serve
    serve(*serve_settings(args))
    return 0


def serve_settings(args: argparse.Namespace) -> tuple[RunConfig, ServeSettings]:
    """What `serve` is called with. Raises UsageError for what lacks."""
    from coordinator.runs.serving import ServeSettings

    config = run_config(args, [*SHARED, *PACE, *LATE], data=args.test or "")
    if not args.test:
        if args.input is None or args.classes is None:
            raise UsageError(
                "give --test SOURCE, or --input and --classes to train without a test set"
            )
        config = shaped(
            config,
            args.input,
            args.classes,
            task=args.task or "classify",
            vocabulary=args.vocabulary or 0,
        )
    if args.run_dir is None:
        raise UsageError("serve needs --run-dir, the folder that the run lives in")
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
        imports=tuple(args.imports),
        input_shape=args.input,
        num_classes=args.classes,
        task=args.task,
        vocabulary=args.vocabulary,
    )
    return config, settings
