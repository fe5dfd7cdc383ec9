"""`edge-sdk plan`: every exit of a model, what it costs here, and whether it fits."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec

from edge_sdk.agent.setup import memory_calibration_file
from edge_sdk.capacity.choice import Choice, as_chosen, choose_exit, in_words
from edge_sdk.capacity.costs import (
    TRAINER_ENVIRONMENT,
    SegmentCost,
    memory_savings,
    peak_bytes,
    seconds,
)
from edge_sdk.cli.flags import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_EPOCHS,
    DEFAULT_EXITS,
    DEFAULT_MOMENTUM,
    MAX_EXITS,
    MOST,
    MOST_IDS,
    Subparsers,
    adapters_of,
    add_adapters,
    add_command,
    add_cuts,
    add_imports,
    add_memory_cap,
    duration_flag,
    model_parts,
    option_flag,
    part_flag,
    print_json,
    print_step,
    shape_flag,
    whole_flag,
)
from edge_sdk.cli.measure import describe_profile, tell_load
from edge_sdk.errors import ConfigError, TrainerError, UsageError, typed
from edge_sdk.hardware.boards import board, board_names
from edge_sdk.hardware.limits import least_bound
from edge_sdk.hardware.measure import emulated, measure
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.hardware.speed import measure_gflops, measure_layer_s
from edge_sdk.helpers.imports import import_module, require_torch
from edge_sdk.helpers.text import mebibytes, one_line, plain_words
from edge_sdk.protocol.fields import MAX_OUTPUTS
from edge_sdk.protocol.messages import DeviceProfile, ModelSpec, Plan
from edge_sdk.protocol.tensor_lists import frozen_prefixes
from edge_sdk.tasks.metrics import METRICS

DEFAULT_EXAMPLES = 1000  # a device's shard where neither --data nor --examples tells
PLAN_SPEED_S = 0.3  # of sampling GFLOPS: three samples do for a prediction
OF_DATA = ("input_shape", "num_classes", "task", "vocabulary")  # of ModelSpec
FLAGS = {  # of fields of ModelSpec
    "family": "--model",
    "exit": "--exits",
    "input_shape": "--input",
    "num_classes": "--classes",
    "options": "--option",
}
# A trial is for memory alone: threads that wait sleep, else on busy cores they compute for seconds.
IDLE_WAITING = {"OMP_WAIT_POLICY": "passive"}
TRIAL = """
import pathlib, sys, msgspec
from edge_sdk.training.calibration import trainer_baseline
cache = pathlib.Path(sys.argv[1]) if sys.argv[1] else None
print(msgspec.json.encode(trainer_baseline(cache)).decode())
"""


def add_plan_command(subparsers: Subparsers) -> None:
    parser = add_command(
        subparsers,
        "plan",
        "predicted memory and time of every exit of a model, and the choice",
        "edge-sdk plan --model cnn --data my-data.npz",
        "edge-sdk plan --model cnn --input 1x28x28 --classes 10 --board raspberry-pi-4",
    )
    model = parser.add_argument_group("model")
    said = "family, e.g. cnn, or a package's model, e.g. torchvision:resnet18"
    model.add_argument("--model", required=True, help=said)
    model.add_argument(
        "--exits",
        type=whole_flag(1, MAX_EXITS),
        default=DEFAULT_EXITS,
        help="exits of the whole model",
    )
    add_cuts(model)
    model.add_argument(
        "--classes",
        type=whole_flag(1, MAX_OUTPUTS),
        help="classes, or outputs of another task; with --data at least its own, the default",
    )
    model.add_argument("--task", choices=METRICS, help="default that of --data, else classify")
    model.add_argument(
        "--vocabulary",
        type=whole_flag(1, MOST_IDS),
        metavar="N",
        help="examples are token ids below N",
    )
    model.add_argument("--input", type=shape_flag, metavar="1x28x28", help="shape of one example")
    model.add_argument(
        "--width", type=part_flag, default=1.0, help="of a narrower model: its share of channels"
    )
    model.add_argument(
        "--rank",
        type=part_flag,
        default=1.0,
        help="share of its rank that a layer after the first stage keeps, as two factors",
    )
    model.add_argument(
        "--option",
        type=option_flag,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the model, e.g. channels=16,32,64",
    )
    add_adapters(model)
    add_imports(model)
    training = parser.add_argument_group("training")
    batch, epochs = whole_flag(2, 1_000_000), whole_flag(1, 100_000)  # as in messages.Plan
    training.add_argument("--data", help="data set; gives --input, --classes and --examples")
    training.add_argument(
        "--examples",
        type=whole_flag(1, MOST),
        help=f"local examples, default {DEFAULT_EXAMPLES}",
    )
    training.add_argument("--batch-size", type=batch, default=DEFAULT_BATCH_SIZE, help="of a step")
    training.add_argument("--epochs", type=epochs, default=DEFAULT_EPOCHS, help="of a round")
    training.add_argument("--optimizer", choices=("sgd", "adam"), default="sgd", help="of a step")
    training.add_argument(
        "--freeze",
        default="",
        metavar="WHAT",
        help="not trained, and sent once: backbone (all stages), stages=1,2, or all but adapters",
    )
    training.add_argument("--deadline", type=duration_flag, metavar="S", help="seconds for a round")
    add_memory_cap(parser)
    parser.add_argument("--board", help=f"predict for {', '.join(board_names())}, or a .toml file")
    parser.add_argument("--explain", action="store_true", help="everything that was tried")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.set_defaults(run=run_plan, usage_error=parser.error)


def run_plan(args: argparse.Namespace) -> int:
    require_torch("edge-sdk plan")
    with typed():
        for module in args.imports or ():
            import_module(module)
    family, exits, options = model_parts(args)
    adapters = adapters_of(args)
    with typed():  # before the data are read
        frozen = frozen_prefixes(args.freeze, exits, has_adapters=adapters is not None)
    shape, num_examples, data_bytes = _local_data(args)
    spec = checked(
        ModelSpec,
        family=family,
        **shape,
        exit=exits,
        width=args.width,
        rank=args.rank,
        adapters=adapters,
        options=options,
    )
    plan = checked(
        Plan,
        segments=[{"first": 1, "last": exits}],
        epochs=args.epochs,
        batch_size=args.batch_size,
        optimizer=args.optimizer,
        momentum=DEFAULT_MOMENTUM if args.optimizer == "sgd" else 0.0,
        frozen=frozen,
    )
    from edge_sdk.capacity.counting import segment_costs
    from edge_sdk.models.checking import checked_model

    with typed(), memory_errors("making the model"):
        cuts = checked_model(spec).cuts  # before seconds of measuring
    profile = _profile(args.board, args.memory_cap)
    print_step("starting a trial trainer, for the memory that one needs")
    trial = _trial_trainer()
    runtime_bytes = trial.pop("runtime_bytes") + data_bytes
    print_step("counting what every part of the model takes")
    with memory_errors("while counting what the model takes"):
        costs = segment_costs(spec, plan, num_examples, runtime_bytes, **trial)
    choice = choose_exit(
        costs, profile, deadline_s=args.deadline, num_examples=num_examples, epochs=plan.epochs
    )
    if args.json:
        told = {"profile": profile, "cuts": cuts, "costs": costs, "choice": choice}
        print_json(msgspec.to_builtins(told))
        return 0
    print(describe_profile(profile))
    parts = {"width": spec.width, "rank": spec.rank}
    cut = "".join(f", {name} {share:g}" for name, share in parts.items() if share < 1)
    name = ":".join(filter(None, [spec.family, str(spec.options.get("model", ""))]))
    print(
        f"model    {name}, input {'x'.join(map(str, spec.input_shape))}, "
        f"{spec.num_classes} {METRICS[spec.task].outputs}, {spec.exit} exits{cut}\n"
        f"{_cuts(cuts)}"
        f"training {plan.epochs} x {num_examples} examples, batch {plan.batch_size}, "
        f"{plan.optimizer}; predicted:\n"
    )
    if plan.frozen:
        kept_bytes = max(cost.kept_bytes for cost in costs)
        held = args.freeze or "backbone"
        held += f", beside {adapters.kind} of rank {adapters.rank}" if adapters else ""
        print(f"frozen   {held}: {mebibytes(kept_bytes)} travel once, then are kept\n")
    print(_table(costs, choice, profile, num_examples))
    if args.explain:
        print(_explain(costs, profile))
    stages = ", ".join(map(str, choice.stages)) or "none"
    chosen = f"exit {choice.exit}" if choice.exit else "nothing fits: no exit can be trained here"
    print(f"\n{chosen}; deeper stages that fit alone: {stages}; {choice.reason}")
    return 0


def checked(kind: type[Any], **fields: Any) -> Any:
    """A struct of the protocol from a person's values. Raises UsageError naming the flag."""
    try:
        return msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        expected, _, place = str(error).partition(" - at ")
        name = re.sub(r"\W*(\w+).*", r"\1", place)
        flag, value = FLAGS.get(name, f"--{name}"), one_line(repr(fields.get(name)))
        raise UsageError(f"{flag} is {value}, {plain_words(expected)}; see --help") from error


def _local_data(args: argparse.Namespace) -> tuple[dict[str, Any], int, int]:
    """What the data that will train say of their model, how many examples they are, and bytes."""
    from edge_sdk.data.examples import MIN_BATCH
    from edge_sdk.data.loading import as_asked, load_shard

    if args.examples is not None and args.examples < MIN_BATCH:
        args.usage_error(f"--examples {args.examples}: at least {MIN_BATCH} are needed")
    if args.data:
        asked = args.input, args.classes, args.task, args.vocabulary
        shard = as_asked(load_shard(args.data), args.data, *asked)
        data_bytes = shard.x.nbytes + shard.y.nbytes
        num_examples = args.examples or len(shard)
        return {name: getattr(shard, name) for name in OF_DATA}, num_examples, data_bytes
    if args.input is None or args.classes is None:
        args.usage_error("give --input and --classes, or --data to take them from")
    num_examples = args.examples or DEFAULT_EXAMPLES
    example_bytes = (8 if args.vocabulary else 4) * math.prod(args.input) + 8  # and the label
    told = (args.input, args.classes, args.task or "classify", args.vocabulary or 0)
    return dict(zip(OF_DATA, told, strict=True)), num_examples, num_examples * example_bytes


def _profile(board_name: str | None, cap_bytes: int | None) -> DeviceProfile:
    """The profile of this device, or of the named board, within a cap on memory."""
    with typed():
        named = None if board_name is None else board(board_name)
    print_step(f"measuring compute {'' if named is None else 'of one thread '}here")
    tell_load(os.getloadavg()[0], os.cpu_count() or 1)
    if named is None:
        return measure(cap_bytes=cap_bytes, speed_s=PLAN_SPEED_S)
    profile = emulated(named, measure_gflops(PLAN_SPEED_S, threads=1), measure_layer_s(threads=1))
    available_bytes, bound = least_bound(profile.memory_available_bytes, None, cap_bytes, 0)
    return msgspec.structs.replace(
        profile, memory_available_bytes=available_bytes, memory_bound=bound
    )


def _trial_trainer() -> dict[str, Any]:
    """The fields of a training.calibration.TrainerBaseline, from a real trainer on this machine:
    this process imports more than one does."""
    cache = ""
    with suppress(ConfigError):  # without a home nothing is kept
        cache = memory_calibration_file()
    result = subprocess.run(
        [sys.executable, "-c", TRIAL, cache],
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


def _table(
    costs: Sequence[SegmentCost], choice: Choice, profile: DeviceProfile, num_examples: int
) -> str:
    """One line per exit and deeper single stage, columns aligned."""
    lines = [
        ("trains", "parameters", "Mflop", "peak memory", "cache", "s/epoch", "s/round", "fits")
    ]
    for cost, row in zip(costs, choice.rows, strict=True):
        local = msgspec.structs.replace(profile, link_mbit_s=None)
        run = as_chosen(cost, row)
        how = in_words(run, cost)
        once_s, twice_s = (seconds(run, local, num_examples, epochs) for epochs in (1, 2))
        lines.append(
            (
                _name(cost),
                f"{cost.gradient_bytes // 4:,}",
                f"{(cost.flops_per_example + cost.frozen_flops_per_example) / 1e6:,.1f}",
                f"{mebibytes(row.peak_bytes)} ± {row.error_bytes / 1024**2:.1f}",
                mebibytes(row.cache_bytes) if row.cache_bytes else "-",
                f"{twice_s - once_s:.2f}",
                "-" if row.seconds is None else f"{row.seconds:.2f}",
                f"yes{', ' * bool(how)}{how}" if row.is_feasible else f"no: {row.reason}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    shown = []
    for line in lines:
        cells = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        shown.append("  ".join([line[0].ljust(widths[0]), *cells[1:-1], line[-1]]))
    return "\n".join(shown)


def _cuts(cuts: Sequence[str]) -> str:
    """A line that says behind which module each exit of a package's model stands."""
    exits = [f"exit {number} behind {name}" for number, name in enumerate(cuts, 1)]
    return f"cuts     {', '.join(exits)}\n" if exits else ""


def _explain(costs: Sequence[SegmentCost], profile: DeviceProfile) -> str:
    """What is tried to make each exit and stage fit, in that order, up to what fits."""
    available = profile.memory_available_bytes
    lines = [f"\ntried in this order, {mebibytes(available)} available:"]
    for cost in costs:
        lines.append(f"  {_name(cost)}")
        for tried in memory_savings(cost):
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
