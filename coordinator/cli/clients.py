"""`edge-coordinator keys`, `clients` and `invite`: the coordinator's key pair, and who may join.

All of it is files in the folder of keys; a coordinator that serves sees each change at once."""

from __future__ import annotations

import argparse
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import Any

from coordinator.admission.client_list import (
    Admission,
    add_client,
    ensure_list,
    parse_clients,
    read_list,
    remove_client,
)
from coordinator.admission.invitations import Invitation, withdraw, write_invitation
from coordinator.admission.join import in_words
from coordinator.admission.pending import forget_pending, read_pending
from edge_sdk.cli.flags import add_command, path_flag
from edge_sdk.errors import ConfigError, UsageError, typed
from edge_sdk.helpers.files import locked, why_not
from edge_sdk.helpers.text import checked_endpoint, split_endpoint
from edge_sdk.protocol.fields import CLIENT_NAME
from edge_sdk.protocol.invitation import InvitationLine, encode_line
from edge_sdk.protocol.keys import SERVER_KEYS, check_key, make_keys, read_key

PORT = 5555  # of `serve --listen` by default
LEAST_HOURS, MOST_HOURS = 1 / 60, 24.0 * 366


def add_keys_command(commands: Any) -> None:
    parser = add_command(
        commands, "keys", "make the coordinator's key pair", "edge-coordinator keys --keys keys"
    )
    parser.add_argument("--keys", type=path_flag, default=Path("keys"), help="folder of keys")
    parser.set_defaults(run=run_keys)


def run_keys(args: argparse.Namespace) -> int:
    make_keys(args.keys, SERVER_KEYS)
    print(f"wrote {args.keys}/server.public and server.secret; invite devices with")
    print(f"  edge-coordinator invite --keys {args.keys}")
    return 0


def add_clients_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "clients",
        "the list of admitted devices: add, remove (revoke), list, pending",
        "edge-coordinator clients list",
        "edge-coordinator clients remove pi-1",
    )
    parser.add_argument(
        "action",
        choices=("add", "remove", "list", "pending"),
        help="pending: keys of devices that were turned away, the last one at the end",
    )
    parser.add_argument("name", nargs="?", help="of the device")
    parser.add_argument("public_key", nargs="?", help="40 characters, as `edge-sdk keys` prints")
    _add_folder_flags(parser)
    parser.set_defaults(run=run_clients)


def _add_folder_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=path_flag, default=Path("keys"), help="folder of keys")
    said = "default KEYS/clients; invitations and pending keys lie beside it"
    parser.add_argument("--clients-file", type=path_flag, help=said)


def run_clients(args: argparse.Namespace) -> int:
    path = args.clients_file or args.keys / "clients"
    wanted = {"add": 2, "remove": 1}.get(args.action, 0)
    if sum(value is not None for value in (args.name, args.public_key)) != wanted:
        needs = ("nothing more", "NAME", "NAME and PUBLIC_KEY")[wanted]
        raise UsageError(f"clients {args.action} needs {needs}; see clients --help")
    if args.action == "add":
        with typed():
            key = check_key(args.public_key, "PUBLIC_KEY")
        add_client(path, args.name, key)
        forget_pending(path.with_name("pending"), key)
    elif args.action == "remove":
        _remove(path, args.name)
    elif args.action == "list":
        _print_list(path)
    else:
        _print_pending(path)
    return 0


def _remove(path: Path, name: str) -> None:
    """Invitations first: the device could come back with one as long as it stands. A file of them
    that is damaged invites nobody, so it keeps no device in."""
    gone, problem = list[Invitation](), ""
    invitations = path.with_name("invitations")
    _check_folder(path.parent)
    try:
        with locked(path.parent):
            gone = withdraw(invitations, name)
    except ConfigError as error:
        problem = str(error)
    except OSError as error:
        raise ConfigError(f"{invitations} cannot be written: {why_not(error)}") from error
    if gone:
        print(f"withdrew {len(gone)} invitation{'s' * (len(gone) > 1)} of {name}", flush=True)
    if remove_client(path, name):
        print(f"removed {name}; a running coordinator takes nothing from it any more")
    elif not gone:
        known = ", ".join(sorted(Admission(path).names())[:20]) or "none"
        raise ConfigError(f"no client {name!r} in {path}; known: {known}")
    if problem:
        raise ConfigError(f"{name}'s invitations are not withdrawn: {problem}")


def _check_folder(folder: Path) -> None:
    """Raise ConfigError unless it can be told which files lie in it."""
    try:
        os.stat(f"{folder}/.")  # the dot asks for the right to search it
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(f"there is no folder {folder}; give --keys or --clients-file") from error
    except OSError as error:
        raise ConfigError(
            f"folder {folder} cannot be read: {error.strerror}; run this as the user whose it is"
        ) from error


def _print_list(path: Path) -> None:
    """Standard output gets a line NAME KEY per client and nothing else."""
    clients = Admission(path).names()
    for name, key in sorted(clients.items()):
        print(name, key.decode())
    if not clients:
        _say(f"no clients in {path} yet; admit one with `edge-coordinator invite`")


def _print_pending(path: Path) -> None:
    """Standard output gets KEY FIRST LAST TRIES, times in UTC, for `clients add NAME KEY`."""
    _check_folder(path.parent)
    known = parse_clients(read_list(path), str(path))
    found = read_pending(path.with_name("pending"))
    pending = [key for key in found if key.public_key.encode() not in known]
    for key in pending:
        first, last = in_words(key.first), in_words(key.last)
        print(f"{key.public_key}  first {first}, last {last}, tries {key.tries}")
    if not pending:
        _say("no keys are pending; a device's shows here once `serve` has turned it away")


def add_invite_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "invite",
        "print a line with which one device admits itself: edge-sdk join LINE",
        "edge-coordinator invite --name pi-1 --endpoint tcp://192.168.1.5:5555",
    )
    add = parser.add_argument
    add("--name", help="the only name it admits; default: what the device calls itself")
    said = f"where devices reach it; default this host's address, port {PORT}"
    add("--endpoint", metavar="tcp://HOST:PORT", help=said)
    add("--valid", type=hours_flag, default=24.0, metavar="HOURS", help="default %(default)g")
    _add_folder_flags(parser)
    parser.set_defaults(run=run_invite)


def hours_flag(text: str) -> float:
    """For argparse."""
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not LEAST_HOURS <= hours <= MOST_HOURS:
        wanted = f"expected hours up to {MOST_HOURS:g}, a minute (0.017) or more"
        raise argparse.ArgumentTypeError(f"{text!r}, {wanted}")
    return hours


def run_invite(args: argparse.Namespace) -> int:
    """Standard output gets the line and nothing else."""
    import zmq

    if args.name is not None and not re.match(CLIENT_NAME, args.name):
        raise UsageError(f"--name {args.name!r} is not 1 to 64 letters, digits, dots, - or _")
    with typed():
        endpoint = _endpoint(args.endpoint)
    server_key = read_key(args.keys / f"{SERVER_KEYS}.public")
    clients = args.clients_file or args.keys / "clients"
    ensure_list(clients)
    public, secret = zmq.curve_keypair()
    expires = time.time() + 3600 * args.valid
    invitation = Invitation(public_key=public.decode(), expires=expires, name=args.name)
    path = clients.with_name("invitations")
    try:
        with locked(path.parent):
            write_invitation(path, invitation)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {why_not(error)}") from error
    if args.name in Admission(clients).names():
        _say(
            f"{args.name} is in the list: only its present key can use this. To admit another, "
            f"`edge-coordinator clients remove {args.name}` and invite again"
        )
    who = args.name or "one device"
    _say(f"for {who}, until {in_words(expires)}; on the device: edge-sdk join LINE")
    print(encode_line(InvitationLine(endpoint, args.name or "", server_key, secret)))
    return 0


def _endpoint(given: str | None) -> str:
    """Raises ConfigError."""
    if given is not None:
        endpoint = checked_endpoint(given, "--endpoint")
        if not endpoint.isascii() or len(endpoint) > 300:
            raise ConfigError(f"--endpoint {given!r} is not ASCII, or longer than 300 characters")
        if split_endpoint(endpoint)[0] in ("*", "0.0.0.0", "::"):
            raise ConfigError(f"--endpoint {given!r} is no address that a device can connect to")
        return endpoint
    endpoint = f"tcp://{own_address()}:{PORT}"
    _say(f"assumed that devices reach this coordinator at {endpoint}; else give --endpoint")
    return endpoint


def own_address() -> str:
    """This host's address on the route to the outside. Raises ConfigError."""
    # Addresses for examples; UDP sends nothing by this.
    outside = ((socket.AF_INET, "192.0.2.1", "{}"), (socket.AF_INET6, "2001:db8::1", "[{}]"))
    problem: OSError | None = None
    for family, address, form in outside:
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((address, 9))
                return form.format(probe.getsockname()[0])
        except OSError as error:
            problem = problem or error
    raise ConfigError(
        f"this host's own address is not found: {problem}; give --endpoint tcp://HOST:PORT"
    ) from problem


def _say(text: str) -> None:
    print(f"edge-coordinator: {text}", file=sys.stderr)
