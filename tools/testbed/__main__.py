"""A whole testbed on one machine: a coordinator and emulated boards as real processes.

    python -m tools.testbed --rounds 20 --devices raspberry-pi-4=4,jetson-nano=4,jetson-tx2=4

Real: the processes, the sockets on loopback, CURVE, the data (each device holds its own shard and
nobody else's), the training, every byte. Emulated: the boards. A board's memory, speed and link
come from profiles/*.toml; its seconds are its trainer's CPU seconds here times the ratio of the
speeds, its link's seconds are bytes over the profile's rate. Wall clock on one crowded machine
means little and is shown beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from rich.console import Console

from coordinator.cli.arguments import REPEATED, CommandParser
from coordinator.cli.serve import add_serve_command, serve_settings
from coordinator.config import RunConfig
from coordinator.methods.registry import METHODS, defaults_of, make_method
from coordinator.runs.serving import ServeSettings, check_serve
from coordinator.settings import shaped
from edge_sdk.capacity.choice import choose_exit
from edge_sdk.capacity.costs import seconds
from edge_sdk.capacity.counting import each_variant_cost, segment_costs
from edge_sdk.cli.flags import (
    DEFAULT_EPOCHS,
    DEFAULT_EXITS,
    Parser,
    add_cuts,
    duration_flag,
    model_parts,
    option_flag,
)
from edge_sdk.data.loading import Examples, load
from edge_sdk.data.partition import check_alpha
from edge_sdk.errors import ConfigError, EdgeError
from edge_sdk.hardware.boards import board
from edge_sdk.hardware.speed import measure_gflops, measure_layer_s
from edge_sdk.models import build
from edge_sdk.protocol.messages import ModelSpec
from tools.testbed.boards import DEFAULT_DEVICES, Device, Host, parse_devices, prepare
from tools.testbed.progress import follow, tell

TRAINING = {"epochs": DEFAULT_EPOCHS, "batch_size": 16, "lr": 2e-3}
START_S = 60.0  # for the coordinator to listen
FAREWELL_S = 20.0  # for devices to end after the run


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        said = "those of edge-coordinator serve follow --"
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; {said}")
    console = Console()
    try:
        return run(args, console)
    except EdgeError as error:
        print(f"testbed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("testbed: interrupted", file=sys.stderr)
        return 130


def make_parser() -> argparse.ArgumentParser:
    description = "Train on a testbed of emulated boards."
    parser = Parser(prog="python -m tools.testbed", description=description)
    add = parser.add_argument
    add("--rounds", type=int, default=20)
    add("--devices", default=DEFAULT_DEVICES, help="BOARD|FILE.toml=COUNT,..., default %(default)s")
    add("--data", default="digits", help="digits, or a folder or file; see docs/data.md")
    add("--examples", type=int, help="use a stratified subset of the training data")
    add("--method", default="hypemefed", choices=METHODS)
    add("--seed", type=int, default=0)
    add("--run-dir", type=Path, help="default runs/testbed-TIME")
    add("--alpha", type=float, default=0.5, help="Dirichlet label skew between devices")
    add("--participants", type=int, help="devices per round, default all")
    add("--model", default="cnn")
    add("--exits", type=int, default=DEFAULT_EXITS)
    add_cuts(parser)
    add("--option", type=option_text, metavar="KEY=VALUE", help="model option", **REPEATED)
    add("--backbones", type=Path, metavar="FILE.toml", help="several models instead of one")
    for name, value in TRAINING.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(value), help=f"default the method's or its paper's own, else {value}")
    add("serve", nargs="*", help="after --: flags of edge-coordinator serve, e.g. -- --mode async")
    add(
        "--deadline",
        type=deadline_flag,
        default="auto",
        metavar="SECONDS",
        help="board seconds that a job may take; auto: the least with which every device can train "
        "exit 1, and alone each stage that a method with rotation gives it; 0: none",
    )
    return parser


def deadline_flag(text: str) -> float | str:
    """Seconds or "auto", for argparse."""
    return text if text == "auto" else duration_flag(text)


def option_text(text: str) -> str:
    """Itself, as the coordinator is given it; for argparse, which refuses what is none."""
    option_flag(text)
    return text


def run(args: argparse.Namespace, console: Console) -> int:
    started = time.monotonic()
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    folder = (args.run_dir or Path("runs") / f"testbed-{stamp}").resolve()
    if (folder / "run.sqlite").exists():
        raise ConfigError(f"{folder} holds a run already; choose another --run-dir")
    check_flags(args, folder)
    tell(console, f"reading {args.data}")
    check_model(args)
    tell(console, "measuring the speed of one thread here")
    host = Host(measure_gflops(threads=1), measure_layer_s(threads=1))
    tell(console, f"splitting {args.data} among the boards ({args.devices})")
    devices = prepare(args, folder, host)
    if args.deadline == "auto":
        tell(console, "counting what training takes on each board, for the deadline")
    deadline_s = choose_deadline(args, folder, devices)
    tell(console, f"starting the coordinator and {len(devices)} boards, each with a trainer")
    with contextlib.ExitStack() as stack:
        stack.enter_context(terminating())
        command = serve_command(args, folder, len(devices), deadline_s)
        log = folder / "coordinator.log"
        server = stack.enter_context(process("coordinator.cli", command, log))
        endpoint = wait_for_endpoint(folder, server)
        boards = []
        for device in devices:
            command, log = device_command(device, endpoint, host), device.folder / "device.log"
            boards.append(stack.enter_context(process("edge_sdk.cli", command, log)))
        announce(console, args, devices, deadline_s, endpoint)
        prepared = time.monotonic()
        follow(console, folder, server, dict(zip(devices, boards, strict=True)), args.rounds)
        trained = time.monotonic()
        deadline = trained + FAREWELL_S
        for child in boards:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.1, deadline - time.monotonic()))
    if server.returncode:
        tail = (folder / "coordinator.log").read_text().splitlines()[-5:]
        raise ConfigError(f"coordinator ended with {server.returncode}: " + " | ".join(tail))
    console.print()
    subprocess.run([sys.executable, "-m", "tools.testbed.report", str(folder)], check=True)
    console.print(
        f"\nwhole time {time.monotonic() - started:.0f} s, of it rounds {trained - prepared:.0f} s "
        f"(one {os.cpu_count()}-core machine plays {len(devices)} boards and the coordinator)\n"
        f"run: {folder}\nmodel: {written_model(folder)}\n"
        f"logs: {folder / 'coordinator.log'}, {folder / 'devices'}/*/device.log\n"
        f"again: {sys.executable} -m tools.testbed.report {folder}",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def written_model(folder: Path) -> str:
    """Where the finished run's model is, or that there is none."""
    file = folder / "model.safetensors"
    found = [file] if file.exists() else sorted(folder.glob("model-*.safetensors"))
    return ", ".join(map(str, found)) or "none for all, each client has its own"


def check_flags(args: argparse.Namespace, folder: Path) -> None:
    """Refuse what the coordinator or a board would refuse, before data is read or anything is
    written. Raises ConfigError."""
    platforms = parse_devices(args.devices)
    for name, _ in platforms:
        board(name)
    check_alpha(args.alpha)
    check_serve(*coordinator_settings(args, folder, sum(count for _, count in platforms)))


def coordinator_settings(
    args: argparse.Namespace, folder: Path, num_devices: int
) -> tuple[RunConfig, ServeSettings]:
    """What the coordinator will be started with, but for a deadline that is not chosen yet."""
    given_s = 0.0 if args.deadline == "auto" else args.deadline
    parser = argparse.ArgumentParser(prog="edge-coordinator")
    add_serve_command(parser.add_subparsers(parser_class=CommandParser))
    return serve_settings(parser.parse_args(serve_command(args, folder, num_devices, given_s)))


def check_model(args: argparse.Namespace) -> None:
    """Refuse a model that cannot be built before anything is written. Raises ConfigError."""
    _, train, _ = load(args.data)
    if not args.backbones:  # else the coordinator's own settings are checked, see check_flags
        build(spec_of(args, train, args.exits))


def spec_of(args: argparse.Namespace, examples: Examples, exit: int) -> ModelSpec:
    given = {**vars(args), "option": [option_flag(text) for text in args.option]}
    family, exits, options = model_parts(argparse.Namespace(**given))
    return ModelSpec(
        family=family,
        input_shape=examples.input_shape,
        num_classes=examples.num_classes,
        task=examples.task,
        vocabulary=examples.vocabulary,
        exit=min(exit, exits),
        options=options,
    )


def choose_deadline(args: argparse.Namespace, folder: Path, devices: Sequence[Device]) -> float:
    """Board seconds. auto: the least, with 5 % to spare, that leaves no device out, and none for
    good without a stage that rotation gives it and its memory holds: a stage alone may take longer
    than exit 1. So fast boards, and slow ones with little data, train deeper exits, or larger
    variants."""
    if args.deadline != "auto":
        return float(args.deadline)
    if args.method in ("fedavg", "fedavg-l"):
        return 0.0  # everyone trains the whole model, however long it takes
    config, _ = coordinator_settings(args, folder, len(devices))
    data = devices[0].examples
    about: Any = {"task": data.task, "vocabulary": data.vocabulary}
    config = shaped(config, data.input_shape, data.num_classes, **about)
    offer = make_method(config, "cpu").offer()
    rotates = METHODS[args.method].has_place("rotation.mode") and config.rotation.mode != "off"
    model = offer.model if rotates else replace(offer.model, exit=1)
    slowest = 0.0
    for device in devices:
        count = len(device.examples)
        given = {"num_examples": count, "epochs": config.epochs}
        if offer.variants:
            (cost,) = each_variant_cost(offer.variants[:1], offer.plan, count, 0)
            slowest = max(slowest, seconds(cost, device.profile, count, config.epochs))
            continue
        costs = segment_costs(model, offer.plan, count, 0)
        for row in choose_exit(costs, device.profile, deadline_s=None, **given).rows:
            if row.first == row.last and (row.is_feasible or row.first == 1):
                slowest = max(slowest, row.seconds or 0.0)
    return 1.05 * slowest


def serve_command(
    args: argparse.Namespace, folder: Path, num_devices: int, deadline_s: float
) -> list[str]:
    """Without what was not given: a flag beats the method's own value."""
    command = ["serve", "--listen", "tcp://127.0.0.1:*", "--run-dir", str(folder)]
    command += ["--keys", str(folder / "keys"), "--test", str(folder / "test.npz")]
    command += ["--method", args.method, "--rounds", str(args.rounds), "--seed", str(args.seed)]
    if args.backbones:
        command += ["--backbones", str(args.backbones)]
    else:
        command += ["--model", args.model, "--exits", str(args.exits)]
    command += ["--cuts", args.cuts] if args.cuts else []
    own = defaults_of(args.method, is_paper="--paper" in args.serve)
    for name, value in TRAINING.items():
        given = getattr(args, name)
        if given is not None or name not in own:
            command += ["--" + name.replace("_", "-"), str(value if given is None else given)]
    command += ["--min-clients", str(num_devices), "--deadline", str(deadline_s)]
    command += [part for option in args.option for part in ("--option", option)]
    if args.participants is not None:
        command += ["--participants", str(args.participants)]
    return command + args.serve


def device_command(device: Device, endpoint: str, host: Host) -> list[str]:
    command = ["run", "--coordinator", endpoint, "--data", str(device.folder / "data.npz")]
    command += ["--id", device.name, "--keys", str(device.folder), "--board", device.board]
    command += ["--host-gflops", str(host.gflops), "--host-layer-us", str(1e6 * host.layer_s)]
    return [*command, "--threads", "1", "--once"]


@contextlib.contextmanager
def process(module: str, command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process that is ended on the way out if it still runs."""
    own = {"OMP_NUM_THREADS": "1", "CACHE_DIRECTORY": str(log.parent / "cache")}
    environment = os.environ | own
    with log.open("wb") as file:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    try:
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


@contextlib.contextmanager
def terminating() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that no child is left behind."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def wait_for_endpoint(folder: Path, server: subprocess.Popen[bytes]) -> str:
    """Where the coordinator listens, once it says so."""
    file = folder / "endpoint"
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and server.poll() is None:
        if file.exists() and (text := file.read_text().strip()):
            return text
        time.sleep(0.1)
    tail = (folder / "coordinator.log").read_text().splitlines()[-3:]
    raise ConfigError("the coordinator did not start: " + " | ".join(tail))


def announce(
    console: Console,
    args: argparse.Namespace,
    devices: Sequence[Device],
    deadline_s: float,
    endpoint: str,
) -> None:
    sizes = sorted(len(device.examples) for device in devices)
    limit = f"{deadline_s:.3g} board seconds as predicted" if deadline_s else "none"
    tell(
        console,
        f"{len(devices)} emulated boards ({args.devices}) with {sizes[0]} to {sizes[-1]} examples "
        f"of {args.data}\nmethod {args.method}, {args.rounds} rounds, deadline of a job {limit}, "
        f"CURVE on {endpoint}",
    )


if __name__ == "__main__":
    sys.exit(main())
