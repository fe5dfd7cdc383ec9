"""`edge-sdk join` and `edge-sdk keys`: how this device comes to be admitted, and its key pair."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from pathlib import Path
from typing import Any

from edge_sdk.agent.settings import (
    DEFAULT_CONFIG,
    RunSettings,
    Settings,
    default_config,
    parse_config,
    settled,
    template,
    with_values,
    write_config,
)
from edge_sdk.agent.setup import checked_id, default_keys
from edge_sdk.cli.flags import USUAL_KEYS, Only, add_command, path_flag
from edge_sdk.errors import ConfigError, UsageError, typed
from edge_sdk.helpers.files import read_user_text
from edge_sdk.helpers.text import checked_endpoint, user_text
from edge_sdk.protocol.invitation import COPY, MAX_CHARACTERS, InvitationLine, decode_line
from edge_sdk.protocol.keys import (
    DEVICE_KEYS,
    SERVER_KEYS,
    has_keys,
    make_keys,
    read_all_keys,
    read_key,
    read_keys,
    write_public,
)


def add_join_command(commands: Any) -> None:
    parser = add_command(
        commands, "join", "be admitted by a coordinator that invited", "edge-sdk join - --id pi-1"
    )
    add = parser.add_argument
    add(
        "line",
        nargs="+",
        metavar="LINE",
        help="as `edge-coordinator invite` prints it; - asks "
        "for it, or reads it from a pipe, so that no list of processes shows it",
    )
    add(
        "--config",
        type=path_flag,
        metavar="FILE",
        help="written, for `run --config`; default the service's, else your own",
    )
    _add_own_flags(parser)
    parser.set_defaults(run=run_join)


def add_keys_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "keys",
        "make this device's key pair if there is none, print the public key",
        "edge-sdk keys",
        "edge-sdk keys --rotate --config ~/.config/edge-sdk/config.toml",
    )
    add = parser.add_argument
    add("--config", type=path_flag, metavar="FILE", help="take id and keys from there")
    _add_own_flags(parser)
    add(
        "--rotate",
        action="store_true",
        help="change the pair of an admitted device, on the coordinator too",
    )
    add("--coordinator", metavar="tcp://HOST:PORT", help="with --rotate, default the config's")
    add("--server-key", help="with --rotate: its public key or file, default KEYS/server.public")
    parser.only |= {flag: Only("--rotate") for flag in ("--coordinator", "--server-key")}
    parser.set_defaults(run=run_keys)


def _add_own_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", type=path_flag, help=f"folder of keys, {USUAL_KEYS}")
    parser.add_argument("--id", help="this device's name, default the host name")


def run_join(args: argparse.Namespace) -> int:
    from edge_sdk.protocol.join import join

    with typed():
        line = decode_line(_given_line(args.line))
    path = args.config or default_config(default_keys)
    text, settings = _present_config(path)
    with typed():
        client_id = _own_id(args.id, line, settings)
    folder = (args.keys or Path(settings.keys or default_keys())).absolute()
    server_file = folder / f"{SERVER_KEYS}.public"
    values: dict[str, str | bool] = {
        "coordinator": line.endpoint,
        "keys": str(folder),
        "id": client_id,
    }
    if settings.server_key:  # of another coordinator, or the same
        values["server_key"] = str(server_file)
    if settings.insecure:
        values["insecure"] = False
    text = with_values(text, values, str(path))
    is_other = settings.coordinator not in (None, line.endpoint)
    has_left = is_other and not _pins(server_file, line.server_key)
    join(line, folder, client_id)
    try:
        write_public(folder, SERVER_KEYS, line.server_key)
        write_config(path, text)
    except ConfigError as error:
        lacking = ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items())
        raise ConfigError(
            f"{error}; but {client_id} is admitted and its keys are made: join again with the same "
            f"LINE and a --config FILE that can be written, or write into one {lacking}"
        ) from error
    print(f"{client_id} is admitted by {line.endpoint}; keys are in {folder}")
    print(f"wrote {path}")
    if has_left:
        print(
            f"edge-sdk: {path} named the coordinator {settings.coordinator}, where this device "
            "takes part no more; another --config and --keys would have kept both",
            file=sys.stderr,
        )
    print(f"next: {_next_step(path, settings)}")
    return 0


def _pins(server_file: Path, key: bytes) -> bool:
    """Whether this device already takes part in the runs of the coordinator with this key."""
    try:
        return read_key(server_file) == key
    except ConfigError:
        return False


def _given_line(words: list[str]) -> str:
    if words != ["-"]:
        return " ".join(words)
    if sys.stdin.isatty():
        try:
            return getpass.getpass("invitation (it is not shown): ")
        except EOFError:
            return ""
    try:
        return user_text(sys.stdin.buffer.read(4 * MAX_CHARACTERS))  # UTF-16 has two bytes each
    except UnicodeDecodeError as error:
        raise ConfigError(f"the invitation is no text: {error.reason}; {COPY}") from error


def _present_config(path: Path) -> tuple[str, Settings]:
    """The config file's text and settings; without a file the template's. Raises ConfigError."""
    try:
        text = read_user_text(path)
    except FileNotFoundError:
        return template(), Settings()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from error
    return text, parse_config(text, str(path))


def _own_id(given: str | None, line: InvitationLine, settings: Settings) -> str:
    if given and line.name and given != line.name:
        raise ConfigError(f"the invitation is for {line.name!r}, --id says {given!r}")
    return checked_id(given or line.name or settings.id, "--id")


def _next_step(path: Path, settings: Settings) -> str:
    if path == DEFAULT_CONFIG:
        start = "sudo edge-sdk service install --start"
        return start if settings.data else f"set data in {path}, then {start}"
    return f"edge-sdk run --config {path}{'' if settings.data else ' --data YOUR_DATA'}"


def run_keys(args: argparse.Namespace) -> int:
    config = args.config
    if args.rotate and config is None and (usual := default_config(default_keys)).exists():
        config = usual
    flags = {name: getattr(args, name) for name in ("id", "keys", "coordinator", "server_key")}
    settings = settled(config, flags, default_keys)
    with typed():
        client_id = checked_id(settings.id, "--id")
    if args.rotate:
        return _rotate(settings, client_id, config)
    files = f"{settings.keys / DEVICE_KEYS}.public and .secret"
    if has_keys(settings.keys, DEVICE_KEYS):
        keys = read_keys(settings.keys, DEVICE_KEYS)
        print(f"edge-sdk: {files} were there and stay as they are", file=sys.stderr)
        print("on the coordinator run")
    else:
        keys = make_keys(settings.keys, DEVICE_KEYS)
        print(f"wrote {files}; on the coordinator run")
    print(f"  edge-coordinator clients add {client_id} '{keys.public.decode()}'")
    print(f"and copy its server.public to {settings.keys / SERVER_KEYS}.public")
    return 0


def _rotate(settings: RunSettings, client_id: str, config: Path | None) -> int:
    from edge_sdk.protocol.join import rotate

    if settings.insecure:
        raise ConfigError(f"{config} says insecure = true: there is no key to change")
    if settings.coordinator is None:
        raise UsageError("give --coordinator, or a --config FILE that sets coordinator")
    with typed():
        endpoint = checked_endpoint(settings.coordinator, "--coordinator")
    _, server_key = read_all_keys(settings.keys, settings.server_key)
    keys = rotate(endpoint, server_key, settings.keys, client_id)
    print(f"{client_id} has a new public key, {keys.public.decode()}, also on the coordinator")
    print("an agent that runs still has the old one and is refused: restart it")
    return 0
