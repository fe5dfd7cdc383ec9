"""`edge-sdk`: what this device has, how deep it could train, and use of what was trained.

A subcommand is one `add_*_command(subparsers)` that sets `run`, a function of the parsed
arguments; COMMANDS lists them. An EdgeError becomes one line and exit status 1,
what is typed wrong 2; `--debug` shows the traceback instead."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from edge_sdk.cli.calibrate import add_calibrate_command, add_infer_report_command
from edge_sdk.cli.export import add_export_command
from edge_sdk.cli.flags import HelpFormatter, Parser, Subparsers
from edge_sdk.cli.infer import add_infer_command
from edge_sdk.cli.join import add_join_command, add_keys_command
from edge_sdk.cli.measure import add_measure_command
from edge_sdk.cli.plan import add_plan_command
from edge_sdk.cli.run import add_run_command
from edge_sdk.cli.service import add_doctor_command, add_service_command
from edge_sdk.errors import EdgeError, status_of
from edge_sdk.helpers import logs
from edge_sdk.helpers.interrupts import INTERRUPTED, ends_unread
from edge_sdk.version import __version__

COMMANDS: tuple[Callable[[Subparsers], None], ...] = (
    add_measure_command,
    add_plan_command,
    add_run_command,
    add_join_command,
    add_keys_command,
    add_export_command,
    add_infer_command,
    add_calibrate_command,
    add_infer_report_command,
    add_service_command,
    add_doctor_command,
)


def make_parser() -> Parser:
    parser = Parser(
        prog="edge-sdk",
        description="Federated learning on a device.",
        epilog="edge-sdk COMMAND --help: its flags, and an example",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="tracebacks instead of one line")
    parser.add_argument("--version", action="version", version=f"edge-sdk {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(subparsers)
    for command in subparsers.choices.values():  # --debug may stand before or after the command
        command.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


@ends_unread
def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    is_json = getattr(args, "log_json", False)
    logs.set_up(is_json=is_json, is_debug=args.debug, form="%(asctime)s %(levelname)s %(message)s")
    try:
        status: int = args.run(args)
    except EdgeError as error:
        if args.debug:
            raise
        logs.last_words("edge-sdk", error)
        return status_of(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    return status
