"""`edge-sdk run`: take part in training."""

from __future__ import annotations

import argparse
import logging
import os
import signal
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from edge_sdk.agent.options import AgentOptions
from edge_sdk.agent.settings import RunSettings, settled
from edge_sdk.agent.setup import (
    checked_id,
    default_keys,
    device_secrets,
    make_agent,
    measure_here,
    trainer_options,
)
from edge_sdk.cli.flags import (
    MAX_EXITS,
    MAX_THREADS,
    USUAL_KEYS,
    Only,
    add_command,
    add_imports,
    add_memory_cap,
    device_flag,
    number_flag,
    option_flag,
    path_flag,
    whole_flag,
)
from edge_sdk.errors import ConfigError, typed
from edge_sdk.hardware import conditions
from edge_sdk.hardware.boards import board
from edge_sdk.hardware.measure import emulated
from edge_sdk.helpers.text import checked_endpoint
from edge_sdk.protocol.keys import has_next_keys
from edge_sdk.protocol.messages import DeviceProfile

log = logging.getLogger(__name__)


def add_run_command(commands: Any) -> None:
    parser = add_command(
        commands,
        "run",
        "take part: connect, train what fits, go on",
        "edge-sdk run --config ~/.config/edge-sdk/config.toml",
        "edge-sdk run --coordinator tcp://192.168.1.5:5555 --data my-data.npz --id pi-1",
    )
    add = parser.add_argument_group("who and with whom").add_argument
    add("--config", type=path_flag, metavar="FILE", help="settings; flags given here win over them")
    add("--coordinator", metavar="tcp://HOST:PORT", help="where it listens")
    add("--data", help="this device's own data, a file or folder; never leaves it")
    add("--id", help="this device's name, default the host name")
    add("--keys", type=path_flag, help=f"folder of keys, {USUAL_KEYS}")
    add("--server-key", help="the coordinator's public key or its file, default KEYS/server.public")
    add("--insecure", action="store_true", default=None, help="no encryption, no identity check")
    add("--once", action="store_true", help="end when the coordinator's run ends")
    add("--log-json", action="store_true", help="log one JSON object per line, for programs")
    training = parser.add_argument_group("training")
    add = training.add_argument
    add_memory_cap(training)
    add("--threads", type=whole_flag(0, MAX_THREADS), help="torch threads, default all cores")
    add(
        "--device",
        type=device_flag("cpu", "cuda"),
        help="cpu or cuda, where training runs; default cpu",
    )
    add_imports(training)
    add("--augment", metavar="MODULE:FUNCTION", help="changes each training batch, e.g. flips it")
    add(
        "--ignore-conditions",
        action="store_true",
        default=None,
        help="train the same when hot, throttled or on a low battery",
    )
    own = parser.add_argument_group("a model of this device's own, for runs that never see it")
    add = own.add_argument
    add("--model", metavar="FAMILY", help="its family, e.g. cnn; without it the run names one")
    add("--exits", type=whole_flag(1, MAX_EXITS), help="its exits, default 1")
    said = "of it, e.g. channels=16,32"
    add("--option", type=option_flag, action="append", metavar="KEY=VALUE", help=said)
    add = parser.add_argument_group("emulation").add_argument
    speed = number_flag(0, 1e9, "GFLOP/s above 0", is_open=True)
    layer = number_flag(0, 1e9, "microseconds, 0 or more")
    add("--board", help="emulate this board: its memory, speed and link instead of this machine's")
    add("--host-gflops", type=speed, default=0.0, help="with --board: speed of one thread here")
    add("--host-layer-us", type=layer, default=0.0, help="with --board: overhead of a layer here")
    parser.only |= {
        "--keys": Only("--insecure", (None,)),
        "--server-key": Only("--insecure", (None,)),
        "--exits": Only("--model"),
        "--option": Only("--model"),
        "--host-gflops": Only("--board"),
        "--host-layer-us": Only("--board"),
    }
    parser.set_defaults(run=run_device, usage_error=parser.error)


def run_device(args: argparse.Namespace) -> int:
    """Runs until stopped by a signal, or with --once until the coordinator's run ends."""
    flags = {name: getattr(args, name) for name in RunSettings.__struct_fields__}
    settings = settled(args.config, flags, default_keys)
    for name in ("coordinator", "data"):
        if getattr(settings, name) is None and args.config:
            raise ConfigError(f"{args.config} does not set {name}; add it there")
        if getattr(settings, name) is None:
            args.usage_error(f"give --{name}, or a --config FILE that sets {name}")
    with typed():
        client_id = checked_id(settings.id, "--id")
        endpoint = checked_endpoint(settings.coordinator or "", "--coordinator")
    secrets = device_secrets(settings, "--server-key")
    if not settings.insecure and has_next_keys(settings.keys):
        log.warning("a change of this device's key was cut short: run edge-sdk keys --rotate again")
    is_emulated = args.board is not None
    measure = measure_here(settings.memory_cap)
    if is_emulated:
        host_layer_s = args.host_layer_us / 1e6
        with typed():
            measure = measure_board(args.board, args.host_gflops, host_layer_s, settings.memory_cap)
    options = AgentOptions(
        client_id=client_id,
        trainer=trainer_options(settings, client_id, secrets, is_emulated=is_emulated),
        measure=measure,
        conditions=None if is_emulated or settings.ignore_conditions else conditions.read,
        is_once=args.once,
        own_model=settings.own_model,
        notify_socket=os.environ.pop("NOTIFY_SOCKET", ""),  # the trainer has nothing to say there
    )
    agent = make_agent(endpoint, secrets, options)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: agent.stop())
    agent.run()
    return 0


def measure_board(
    name: str, host_gflops: float, host_layer_s: float, cap_bytes: int | None
) -> Callable[[int], DeviceProfile]:
    """The function by which the agent learns an emulated board's profile, which never changes.
    host_gflops, host_layer_s: of one thread here. Raises ConfigError."""
    if host_gflops <= 0:
        raise ConfigError("--board needs --host-gflops, the GFLOP/s of one thread here")
    profile = emulated(board(name), host_gflops, host_layer_s)
    if cap_bytes is not None and cap_bytes < profile.memory_available_bytes:
        profile = replace(profile, memory_available_bytes=cap_bytes, memory_bound="cap")
    return lambda own_bytes: profile
