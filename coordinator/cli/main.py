"""`edge-coordinator`: the coordinator's command line. Values are checked here, once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from coordinator.cli.arguments import CommandParser
from coordinator.cli.clients import add_clients_command, add_invite_command, add_keys_command
from coordinator.cli.emulate import add_emulate_command
from coordinator.cli.export import add_export_command
from coordinator.cli.history import add_history_command
from coordinator.cli.methods import add_methods_command
from coordinator.cli.serve import add_serve_command
from coordinator.cli.status import add_status_command
from edge_sdk.cli.flags import HelpFormatter, Parser
from edge_sdk.errors import EdgeError, ExportError, QuorumError, status_of, typed
from edge_sdk.helpers import logs
from edge_sdk.helpers.imports import heavy_imports, import_module
from edge_sdk.helpers.interrupts import INTERRUPTED, ends_unread, is_unread
from edge_sdk.version import __version__

# Exit statuses; 2: typed wrong; 1: any other error.
GAVE_UP = 3  # too few devices for too long
NOT_EXPORTED = 4  # the run is finished and its model is there, but --export failed at the end
OWN_STATUS: dict[type[EdgeError], int] = {QuorumError: GAVE_UP, ExportError: NOT_EXPORTED}
COMMANDS: tuple[Callable[[Any], None], ...] = (
    add_emulate_command,
    add_serve_command,
    add_keys_command,
    add_clients_command,
    add_invite_command,
    add_export_command,
    add_status_command,
    add_history_command,
    add_methods_command,
)


def make_parser() -> Parser:
    parser = Parser(
        prog="edge-coordinator",
        description="Federated learning over unequal devices.",
        epilog="edge-coordinator COMMAND --help: its flags, and an example",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"edge-coordinator {__version__}")
    parser.add_argument("--debug", action="store_true", help="log everything, show tracebacks")
    parser.add_argument("--log-json", action="store_true", help="log one JSON object per line")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=CommandParser
    )
    for add in COMMANDS:
        add(commands)
    for command in commands.choices.values():  # it may stand before or after the command
        command.add_argument(
            "--log-json", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
        )
    return parser


@ends_unread
def main(argv: Sequence[str] | None = None) -> int:
    form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    try:
        with typed():
            args = make_parser().parse_args(argv)
    except EdgeError as error:
        if "--log-json" in (sys.argv if argv is None else argv):
            logs.set_up(is_json=True, is_debug=False, form=form)
        logs.last_words("edge-coordinator", error)
        return status_of(error)
    logs.set_up(is_json=args.log_json, is_debug=args.debug, form=form)
    try:
        with heavy_imports():
            for module in getattr(args, "imports", []):
                import_module(module)
        return int(args.run(args))
    except EdgeError as error:
        if args.debug and type(error) not in OWN_STATUS:
            raise
        logs.last_words("edge-coordinator", error)
        return OWN_STATUS.get(type(error), status_of(error))
    except BrokenPipeError:
        if not (getattr(args, "runs_rounds", False) and is_unread()):
            raise
        said = "nobody reads its standard output any more, so the run stopped; go on with --resume"
        logs.last_words("edge-coordinator", EdgeError(said))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
