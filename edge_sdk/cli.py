"""`edge-sdk`: what this device has, how deep it could train, and use of what was trained.

A subcommand is one `add_*_command(subparsers)` that sets `run`, a function of the parsed
arguments; COMMANDS lists them. An EdgeError becomes one line and exit status 1, wrong usage 2;
`--debug` shows the traceback instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import msgspec

from edge_sdk import __version__, conditions, logs
from edge_sdk.boards import board, board_names, check_free, save_board, save_path
from edge_sdk.capacity import (
    TRAINER_ENVIRONMENT,
    Choice,
    SegmentCost,
    choose_exit,
    in_words,
    levers,
    mebibytes,
    memory_errors,
    peak_bytes,
    pulled,
    seconds,
)
from edge_sdk.cli_flags import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_EPOCHS,
    HelpFormatter,
    add_command,
    add_memory_cap,
    duration_flag,
    import_module,
    rate_flag,
    tell,
)
from edge_sdk.cli_infer import (
    add_calibrate_command,
    add_export_command,
    add_infer_command,
    add_infer_report_command,
)
from edge_sdk.cli_join import add_join_command, add_keys_command
from edge_sdk.cli_run import add_run_command
from edge_sdk.cli_service import add_doctor_command, add_service_command
from edge_sdk.device import calibration_file
from edge_sdk.errors import ConfigError, EdgeError, TrainerError
from edge_sdk.interrupts import INTERRUPTED, ends_unread
from edge_sdk.profile import (
    DeviceProfile,
    emulated,
    least_bound,
    measure,
    measure_gflops,
    measure_layer_s,
    measured_board,
)
from edge_sdk.torch_extra import require_torch
from edge_sdk.wire import ModelSpec, Plan

Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
DEFAULT_EXAMPLES = 1000  # a device's shard where neither --data nor --examples tells
PLAN_SPEED_S = 0.3  # of sampling GFLOPS: three samples do for a prediction
# A trial is for memory alone: threads that wait sleep, else on busy cores they compute for seconds.
IDLE_WAITING = {"OMP_WAIT_POLICY": "passive"}
TRIAL = """
import pathlib, sys, msgspec
from edge_sdk.calibration import trial
print(msgspec.json.encode(trial(pathlib.Path(sys.argv[1]))).decode())
"""


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
    add("--device", default="cpu", help="cpu or cuda, whose speed is measured")
    add("--save", metavar="NAME|FILE.toml", help="write a board file, for --board and emulations")
    add("--link-mbit-s", type=rate_flag, metavar="X", help="with --save: the link's rate, if known")
    add("--force", action="store_true", help="with --save: overwrite")
    add("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run_measure)


def run_measure(args: argparse.Namespace) -> int:
    lacking = ""
    try:
        require_torch("measuring compute")
    except ConfigError as error:
        if args.save is not None:
            raise
        lacking = str(error)
    path = save_path(args.save) if args.save is not None else None
    if path:
        check_free(path, is_forced=args.force)
    if args.device != "cpu" and not lacking:
        from edge_sdk.trainer import usable_device

        usable_device(args.device)
    now = conditions.read(with_jetson_stats=True)  # before measuring makes it warm
    if not lacking:
        tell("measuring compute, about 2 seconds")
    profile = measure(cap_bytes=args.memory_cap, compute=not lacking, device=args.device)
    profile = msgspec.structs.replace(profile, link_mbit_s=args.link_mbit_s)
    if lacking:
        print(f"edge-sdk: compute was not measured: {lacking}", file=sys.stderr)
    if path:
        save_board(measured_board(profile, args.device), path, is_forced=args.force)
    if args.json:
        _print_json(msgspec.to_builtins(profile) | {"conditions": msgspec.to_builtins(now)})
    else:
        print(_describe(profile))
        print(f"state    {conditions.in_words(now)}")
        if path:
            print(f"saved    {path}")
    return 0


def add_plan_command(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "plan",
        "predicted memory and time of every exit of a model, and the choice",
        "edge-sdk plan --model cnn --data my-data.npz",
        "edge-sdk plan --model cnn --input 1x28x28 --classes 10 --board raspberry-pi-4",
    )
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, help="family, e.g. cnn")
    model.add_argument("--exits", type=int, default=3, help="exits of the whole model")
    model.add_argument("--classes", type=int, help="classes; not needed with --data")
    model.add_argument("--input", type=parse_shape, metavar="1x28x28", help="shape of one example")
    model.add_argument(
        "--option",
        type=parse_option,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the model, e.g. channels=16,32,64",
    )
    model.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="MODULE",
        help="Python module that registers your model families",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--data", help="data set; gives --input, --classes and --examples")
    training.add_argument(
        "--examples", type=int, help=f"local examples, default {DEFAULT_EXAMPLES}"
    )
    training.add_argument("--batch-size", type=int, default=DEFAULT_BATCH_SIZE, help="of a step")
    training.add_argument("--epochs", type=int, default=DEFAULT_EPOCHS, help="of a round")
    training.add_argument("--optimizer", choices=("sgd", "adam"), default="adam", help="of a step")
    training.add_argument("--deadline", type=duration_flag, metavar="S", help="seconds for a round")
    add_memory_cap(parser)
    parser.add_argument("--board", help=f"predict for {', '.join(board_names())}, or a .toml file")
    parser.add_argument("--explain", action="store_true", help="everything that was tried")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run_plan, usage_error=parser.error)


def run_plan(args: argparse.Namespace) -> int:
    require_torch("edge-sdk plan")
    for module in args.imports:
        import_module(module)
    input_shape, num_classes, num_examples, data_bytes = _local_data(args)
    spec = checked(
        ModelSpec,
        family=args.model,
        input_shape=input_shape,
        num_classes=num_classes,
        exit=args.exits,
        options=dict(args.option),
    )
    plan = checked(
        Plan,
        segments=[{"first": 1, "last": args.exits}],
        epochs=args.epochs,
        batch_size=args.batch_size,
        optimizer=args.optimizer,
    )
    from edge_sdk.models import build
    from edge_sdk.models.costs import segment_costs

    with memory_errors("making the model"):
        build(spec)  # refuses what cannot be built before seconds of measuring
    profile = _profile(args.board, args.memory_cap)
    tell("starting a trial trainer, for the memory that one needs")
    trial = _trial_trainer()
    runtime_bytes = trial.pop("runtime_bytes") + data_bytes
    tell("counting what every part of the model takes")
    with memory_errors("while counting what the model takes"):
        costs = segment_costs(spec, plan, num_examples, runtime_bytes, **trial)
    choice = choose_exit(
        costs, profile, deadline_s=args.deadline, num_examples=num_examples, epochs=plan.epochs
    )
    if args.json:
        _print_json(msgspec.to_builtins({"profile": profile, "costs": costs, "choice": choice}))
        return 0
    print(_describe(profile))
    print(
        f"model    {spec.family}, input {'x'.join(map(str, spec.input_shape))}, "
        f"{spec.num_classes} classes, {spec.exit} exits\n"
        f"training {plan.epochs} x {num_examples} examples, batch {plan.batch_size}, "
        f"{plan.optimizer}; predicted:\n"
    )
    print(_table(costs, choice, profile, num_examples))
    if args.explain:
        print(_explain(costs, profile))
    stages = ", ".join(map(str, choice.stages)) or "none"
    print(f"\nexit {choice.exit}; deeper stages that fit alone: {stages}; {choice.reason}")
    return 0


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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
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
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return status


def parse_shape(text: str) -> tuple[int, ...]:
    """(1, 28, 28) of 1x28x28."""
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}, expected sizes such as 1x28x28")
    return tuple(map(int, sizes))


def parse_option(text: str) -> tuple[str, Any]:
    """("channels", (16, 32)) of channels=16,32; also a number, true, false, else text."""
    key, separator, value = text.partition("=")
    if not key or not separator:
        raise argparse.ArgumentTypeError(f"{text!r}, expected KEY=VALUE")
    if "," in value:
        parts = [part for part in value.split(",") if part]
        if not all(part.isdecimal() for part in parts):
            raise argparse.ArgumentTypeError(f"{text!r}, expected integers between the commas")
        return key, tuple(map(int, parts))
    try:
        plain = json.loads(value)
    except ValueError:
        return key, value
    return key, plain if isinstance(plain, int | float | bool) else value


def checked(kind: type[Any], **fields: Any) -> Any:
    """A wire struct from a person's values. Raises ConfigError naming the field."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(
            f"{kind.__name__} refused: {error}; correct the flag of that name"
        ) from error


def _local_data(args: argparse.Namespace) -> tuple[tuple[int, ...], int, int, int]:
    """Input shape, number of classes, number of examples and bytes of the data that will train."""
    if args.examples is not None and args.examples < 2:
        args.usage_error(f"--examples {args.examples}: at least 2 are needed")
    if args.data:
        from edge_sdk.data import load_shard

        shard = load_shard(args.data)
        data_bytes = shard.x.nbytes + shard.y.nbytes
        num_examples = args.examples or len(shard)
        return (
            args.input or shard.input_shape,
            shard.num_classes if args.classes is None else args.classes,
            num_examples,
            data_bytes,
        )
    if args.input is None or args.classes is None:
        args.usage_error("give --input and --classes, or --data to take them from")
    num_examples = args.examples or DEFAULT_EXAMPLES
    example_bytes = 8  # the label
    values = 1
    for size in args.input:
        values *= size
    return args.input, args.classes, num_examples, num_examples * (example_bytes + 4 * values)


def _profile(board_name: str | None, cap_bytes: int | None) -> DeviceProfile:
    """This device, or the named board; the cap counts for both."""
    named = None if board_name is None else board(board_name)
    tell(f"measuring compute {'' if named is None else 'of one thread '}here")
    if named is None:
        return measure(cap_bytes=cap_bytes, speed_s=PLAN_SPEED_S)
    profile = emulated(named, measure_gflops(PLAN_SPEED_S, threads=1), measure_layer_s(threads=1))
    available_bytes, bound = least_bound(profile.memory_available_bytes, None, cap_bytes, 0)
    return msgspec.structs.replace(
        profile, memory_available_bytes=available_bytes, memory_bound=bound
    )


def _trial_trainer() -> dict[str, Any]:
    """The fields of a calibration.Trainer, from a real one on this machine: this process imports
    more than a trainer does."""
    result = subprocess.run(
        [sys.executable, "-c", TRIAL, calibration_file()],
        env={**os.environ, **TRAINER_ENVIRONMENT, **IDLE_WAITING},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        raise TrainerError(f"a trial trainer ended with status {result.returncode}: {last}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def _describe(profile: DeviceProfile) -> str:
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


def _table(
    costs: Sequence[SegmentCost], choice: Choice, profile: DeviceProfile, num_examples: int
) -> str:
    """One line per exit and deeper single stage, columns aligned."""
    lines = [("trains", "parameters", "peak memory", "cache", "s/epoch", "s/round", "fits")]
    for cost, row in zip(costs, choice.rows, strict=True):
        local = msgspec.structs.replace(profile, link_mbit_s=None)
        run = pulled(cost, row)
        how = in_words(run, cost)
        once_s, twice_s = (seconds(run, local, num_examples, epochs) for epochs in (1, 2))
        lines.append(
            (
                _name(cost),
                f"{cost.gradient_bytes // 4:,}",
                f"{mebibytes(row.peak_bytes)} ± {row.error_bytes / 1024**2:.1f}",
                mebibytes(row.cache_bytes) if row.cache_bytes else "-",
                f"{twice_s - once_s:.2f}",
                "-" if row.seconds is None else f"{row.seconds:.2f}",
                f"yes{', ' * bool(how)}{how}" if row.is_feasible else f"no: {row.reason}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:-1], strict=True)]
            + [line[-1]]
        )
        for line in lines
    )


def _explain(costs: Sequence[SegmentCost], profile: DeviceProfile) -> str:
    """Per exit and stage what is tried to make it fit, in that order, up to what fits."""
    available = profile.memory_available_bytes
    lines = [f"\ntried in this order, {mebibytes(available)} available:"]
    for cost in costs:
        lines.append(f"  {_name(cost)}")
        for tried in levers(cost):
            peak = peak_bytes(tried)
            lines.append(
                f"    {in_words(tried, cost) or 'as planned'}: runtime "
                f"{mebibytes(tried.runtime_bytes)}, in all {mebibytes(peak)}"
                f"{': fits' if peak <= available else ''}"
            )
            if peak <= available:
                break
    return "\n".join(lines)


def _name(cost: SegmentCost) -> str:
    return f"exit {cost.last}" if cost.first == 1 else f"stage {cost.first} alone"


def _print_json(value: object) -> None:
    print(json.dumps(value, indent=2))


if __name__ == "__main__":
    sys.exit(main())
