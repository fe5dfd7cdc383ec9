"""`edge-sdk measure`: what this device has."""

from __future__ import annotations

import argparse
import os
import sys

import msgspec

from edge_sdk.cli.flags import (
    Only,
    Subparsers,
    add_command,
    add_memory_cap,
    device_flag,
    print_json,
    print_step,
    rate_flag,
)
from edge_sdk.errors import ConfigError, typed
from edge_sdk.hardware import conditions
from edge_sdk.hardware.boards import check_free, save_board, save_path
from edge_sdk.hardware.measure import measure, measured_board
from edge_sdk.helpers.files import check_output
from edge_sdk.helpers.imports import require_torch
from edge_sdk.helpers.text import mebibytes
from edge_sdk.protocol.messages import DeviceProfile

DEVICE = "cpu or cuda, whose speed is measured"


def add_measure_command(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "measure",
        "memory, compute and platform of this device",
        "edge-sdk measure",
        "edge-sdk measure --save my-pi --link-mbit-s 94",
    )
    add_memory_cap(parser)
    add = parser.add_argument
    add("--device", type=device_flag("cpu", "cuda"), default="cpu", help=DEVICE)
    add("--save", metavar="NAME|FILE.toml", help="write a board file, for --board and emulations")
    add("--link-mbit-s", type=rate_flag, metavar="X", help="with --save: the link's rate, if known")
    add("--force", action="store_true", help="with --save: overwrite")
    add("--json", action="store_true", help="one JSON object")
    parser.only |= {flag: Only("--save") for flag in ("--link-mbit-s", "--force")}
    parser.set_defaults(run=run_measure)


def run_measure(args: argparse.Namespace) -> int:
    lacking = ""
    try:
        require_torch("measuring compute")
    except ConfigError as error:
        if args.save is not None:
            raise
        lacking = str(error)
    with typed():
        path = save_path(args.save) if args.save is not None else None
    if path:
        check_free(path, is_forced=args.force)
        check_output(path, "--save")
    if args.device != "cpu" and not lacking:
        from edge_sdk.training.devices import usable_device

        usable_device(args.device)
    now = conditions.read(with_jetson_stats=True)  # before measuring makes it warm
    if not lacking:
        print_step("measuring compute, about 2 seconds")
        tell_load(os.getloadavg()[0], os.cpu_count() or 1)
    profile = measure(cap_bytes=args.memory_cap, compute=not lacking, device=args.device)
    profile = msgspec.structs.replace(profile, link_mbit_s=args.link_mbit_s)
    if lacking:
        print(f"edge-sdk: compute was not measured: {lacking}", file=sys.stderr)
    if path:
        save_board(measured_board(profile, args.device), path, is_forced=args.force)
    if args.json:
        print_json(msgspec.to_builtins(profile) | {"conditions": msgspec.to_builtins(now)})
    else:
        print(describe_profile(profile))
        print(f"state    {conditions.in_words(now)}")
        if path:
            print(f"saved    {path}")
    return 0


def tell_load(load: float, cores: int) -> None:
    """Say that the speed will be measured too low. load: how many programs wanted to run lately."""
    if load > cores:
        print_step(
            f"this machine is busy, {load:.1f} programs want its {cores} cores: what is measured "
            "is too low, and differs each time; measure again when it is idle"
        )


def describe_profile(profile: DeviceProfile) -> str:
    kind = "emulated board" if profile.is_emulated else "this device"
    link = "not known" if profile.link_mbit_s is None else f"{profile.link_mbit_s:g} Mbit/s"
    speed = "not measured"
    if profile.gflops:
        speed = (
            f"{profile.gflops:.1f} GFLOPS in training, {1e6 * profile.layer_s:.0f} us per layer "
        )
        speed += "and step"
    return (
        f"device   {profile.platform} ({kind}) {profile.board or profile.machine}\n"
        f"memory   {mebibytes(profile.memory_available_bytes)} for training "
        f"(bound: {profile.memory_bound}) of {mebibytes(profile.memory_total_bytes)}\n"
        f"compute  {speed}, {profile.cores:g} cores\n"
        f"link     {link}"
    )
