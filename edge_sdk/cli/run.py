"""`edge-sdk run`: take part in training."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_sdk.agent.options import AgentOptions
from edge_sdk.agent.pipe import TrainerOptions
from edge_sdk.agent.settings import read_config
from edge_sdk.agent.setup import (
    calibration_file,
    checked_id,
    default_keys,
    device_secrets,
    make_agent,
    measure_here,
    saved_updates_folder,
)
from edge_sdk.cli.flags import MAX_THREADS, add_memory_cap, path_flag, whole_flag
from edge_sdk.errors import ConfigError
from edge_sdk.hardware import conditions
from edge_sdk.hardware.boards import board
from edge_sdk.hardware.measure import emulated
from edge_sdk.helpers.text import checked_endpoint
from edge_sdk.protocol.keys import has_next_keys
from edge_sdk.protocol.messages import DeviceProfile

log = logging.getLogger(__name__)


def add_run_command(commands: Any) -> None:
    parser = commands.add_parser("run", help="take part: connect, train what fits, go on")
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="settings; flags given here win over them")
    add("--coordinator", metavar="tcp://HOST:PORT")
    add("--data", help="this device's own data, a file or folder; never leaves it")
    add("--id", help="this device's name, default the host name")
    add("--keys", type=path_flag, help=f"folder of keys, default {default_keys()}")
    add("--server-key", help="the coordinator's public key or its file, default KEYS/server.public")
    add("--insecure", action="store_true", default=None, help="no encryption, no identity check")
    add_memory_cap(parser)
    add("--threads", type=whole_flag(0, MAX_THREADS), help="torch threads, default all cores")
    add("--device", help="cpu or cuda, where training runs; default cpu")
    add("--import", dest="imports", action="append", metavar="MODULE",
        help="Python module that registers your model families")  # fmt: skip
    add("--board", help="emulate this board: its memory, speed and link instead of this machine's")
    add("--host-gflops", type=float, default=0.0, help="with --board: speed of one thread here")
    add("--host-layer-us", type=float, default=0.0, help="with --board: overhead of a layer here")
    add("--ignore-conditions", action="store_true", default=None,
        help="train the same when hot, throttled or on a low battery")  # fmt: skip
    add("--log-json", action="store_true", help="log one JSON object per line, for programs")
    add("--once", action="store_true", help="end when the coordinator's run ends")
    parser.set_defaults(run=run_device, usage_error=parser.error)


def settle(args: argparse.Namespace) -> None:
    """Fill in what no flag gave: from the config file, else the default. Raises ConfigError."""
    given = read_config(args.config).given() if args.config else {}
    defaults = {
        "keys": default_keys(), "insecure": False, "threads": 0, "device": "cpu", "imports": [],
        "ignore_conditions": False,
    }  # fmt: skip
    for name, value in (defaults | given).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.keys = Path(args.keys)


def run_device(args: argparse.Namespace) -> int:
    """Runs until stopped by a signal, or with --once until the coordinator's run ends."""
    settle(args)
    for name in ("coordinator", "data"):
        if getattr(args, name) is None and args.config:
            raise ConfigError(f"{args.config} does not set {name}; add it there")
        if getattr(args, name) is None:
            args.usage_error(f"give --{name}, or a --config FILE that sets {name}")
    client_id = checked_id(args.id, "--id")
    endpoint = checked_endpoint(args.coordinator, "--coordinator")
    secrets = device_secrets(args.keys, args.server_key, args.insecure, "--server-key")
    if not args.insecure and has_next_keys(args.keys):
        log.warning("a change of this device's key was cut short: run edge-sdk keys --rotate again")
    options = AgentOptions(
        client_id=client_id,
        trainer=TrainerOptions(
            data=str(args.data),
            threads=args.threads,
            device=args.device,
            measure_compute=args.board is None,
            calibration="" if args.board else calibration_file(),
            saved_updates="" if args.board else saved_updates_folder(client_id, endpoint, secrets),
            imports=tuple(args.imports),
        ),
        measure=make_measure(args),
        conditions=None if args.board or args.ignore_conditions else conditions.read,
        is_once=args.once,
        notify_socket=os.environ.pop("NOTIFY_SOCKET", ""),  # the trainer has nothing to say there
    )
    agent = make_agent(endpoint, secrets, options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()
    return 0


def make_measure(args: argparse.Namespace) -> Callable[[int], DeviceProfile]:
    """What the agent calls to know its profile: this machine's, or an emulated board's."""
    cap_bytes: int | None = args.memory_cap
    if args.board is None:
        return measure_here(cap_bytes)
    if args.host_gflops <= 0:
        raise ConfigError("--board needs --host-gflops, the GFLOP/s of one thread here")
    profile = emulated(board(args.board), args.host_gflops, args.host_layer_us / 1e6)
    if cap_bytes is not None and cap_bytes < profile.memory_available_bytes:
        from msgspec.structs import replace

        profile = replace(profile, memory_available_bytes=cap_bytes, memory_bound="cap")
    return lambda own_bytes: profile
