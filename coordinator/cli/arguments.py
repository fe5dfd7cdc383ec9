"""Flags that `emulate` and `serve` share, and what they become.

Neither this nor another cli_*.py imports torch or numpy, which takes two seconds: a command's flags
are read first, and what it needs is imported when it runs, in `heavy_imports`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import get_args, get_type_hints

import msgspec

from coordinator.config import (
    AggregationOptions,
    DistillOptions,
    GeneratorOptions,
    RotationOptions,
    ServerOptions,
)
from coordinator.defaults import METHODS, defaults_of
from coordinator.presets import PRESETS, find_preset
from edge_sdk.cli.flags import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_EPOCHS,
    MAX_THREADS,
    path_flag,
    whole_flag,
)
from edge_sdk.errors import ConfigError

OWN_VALUES = "a method has values of its own for some of these where no flag is given"


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every way of running shares: the method, the model, the training, the run folder."""
    parser.usage = "%(prog)s [flags]"  # one line: seventy flags would fill a screen
    add = parser.add_argument_group("run").add_argument
    add("--method", default="hypemefed", choices=sorted(METHODS), help="the federated algorithm")
    add("--paper", action="store_true", help="hypemefed as published, instead of what is best")
    add("--preset", choices=sorted(PRESETS), help="model and training of a published experiment")
    add("--rounds", type=int, default=20, help="of the whole run")
    add("--participants", type=int, help="clients per round, default all")
    add("--seed", type=int, default=0, help="of every draw")
    add("--eval-every", type=int, default=1, help="rounds from one evaluation to the next")
    add("--eval-tail", type=int, default=1, help="last rounds that are always evaluated")
    add("--device", default="auto", help="auto, cpu or cuda")
    add("--threads", type=whole_flag(1, MAX_THREADS), default=1,
        help="torch threads on the CPU")  # fmt: skip
    add("--run-dir", type=path_flag, help="where the run lives")
    add("--resume", action="store_true", help="go on with the run in --run-dir")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="cnn", help="model family")
    add("--exits", type=int, default=3, help="number of exits of the whole model")
    add("--option", action="append", default=[], metavar="KEY=VALUE", help="model option")
    add("--import", dest="imports", action="append", default=[], metavar="MODULE",
        help="Python module that registers your model families")  # fmt: skip
    add = parser.add_argument_group("local training").add_argument
    add("--epochs", type=int, default=DEFAULT_EPOCHS, help="local epochs")
    add("--batch-size", type=int, default=DEFAULT_BATCH_SIZE, help="of a local step")
    add("--lr", type=float, default=1e-3, help="of local steps")
    add("--optimizer", choices=("adam", "sgd"), default="adam", help="of local steps")
    add("--momentum", type=float, default=0.0, help="of local SGD")
    add("--weight-decay", type=float, default=0.0, help="added to the gradient, times the weights")
    add("--prox-mu", type=float, default=0.0, help="FedProx's pull to the received weights")
    add("--exit-weights", default="", help="of the joint loss, e.g. 1,1,2; default all ones")
    add_server_arguments(parser)
    add_generation_arguments(parser)
    parser.set_defaults(own_parser=parser)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """From updates to aggregate, global and served model."""
    group = parser.add_argument_group("aggregation", description=OWN_VALUES)
    add, server, aggregation = group.add_argument, ServerOptions(), AggregationOptions()
    add("--weighting", choices=("examples", "equal"), default="examples", help="of clients")
    add("--aggregation", choices=choices(AggregationOptions, "rule"), default=aggregation.rule,
        help="how updates become one model")  # fmt: skip
    add("--trim", type=float, default=aggregation.trim, help="trimmed-mean: share at each end")
    add("--clip", type=float, default=aggregation.clip, metavar="FACTOR",
        help="bound an update's movement to FACTOR medians of earlier ones, 0: off")  # fmt: skip
    add("--server-optimizer", choices=choices(ServerOptions, "optimizer"), default=server.optimizer,
        help="of the step from the global model to the aggregate")  # fmt: skip
    add("--server-momentum", type=float, default=server.momentum, help="of that step")
    add(
        "--server-lr", type=float, default=server.lr, help="fedadam, fedyogi: about a weight's step"
    )
    add("--damping", type=float, default=server.damping, help="0 owners' mean, 1 stale copy")
    add("--ema", type=float, default=server.ema, help="decay of the served average")
    add("--serve", choices=choices(ServerOptions, "serve"), default=server.serve,
        help="that average, or the last global model")  # fmt: skip


def add_generation_arguments(parser: argparse.ArgumentParser) -> None:
    """How clients come to stages that they do not train by themselves."""
    group = parser.add_argument_group("stages that few clients train", description=OWN_VALUES)
    add, generator, rotation = group.add_argument, GeneratorOptions(), RotationOptions()
    add("--generator", choices=choices(GeneratorOptions, "name"), default=generator.name,
        help="what fills stages that a client lacks")  # fmt: skip
    add("--generate", choices=choices(GeneratorOptions, "generate"), help="which tensors")
    add("--gain", type=float, default=generator.gain, help="weight of generated tensors, 0 to 1")
    add("--rank", type=int, help="of factors, or of update-regression's memory")
    add("--hidden", type=int, default=generator.hidden, help="width of the networks")
    add("--fit-epochs", type=int, default=generator.epochs, help="of the networks, each round")
    add("--owners-per-step", type=int, default=generator.owners_per_step, help="0: all in one step")
    add("--memory-rows", type=int, default=generator.memory_rows,
        help="updates that update-regression remembers")  # fmt: skip
    add("--rotation", choices=choices(RotationOptions, "mode"), default=rotation.mode,
        help="a deeper stage for weak clients: beside their prefix, or instead of it")  # fmt: skip
    add("--rotation-stages", type=int, default=rotation.stages, help="at most a round, 0: all")
    add("--rotation-draw", choices=choices(RotationOptions, "draw"), default=rotation.draw,
        help="needy: rather stages with few owners")  # fmt: skip
    distill = DistillOptions()
    add("--distill", choices=choices(DistillOptions, "direction"), default=distill.direction,
        help="between a client's exits")  # fmt: skip
    add("--distill-weight", type=float, default=distill.weight, help="in the loss")
    add("--distill-temperature", type=float, default=distill.temperature, help="of the softmax")
    add("--distill-ramp", type=int, default=distill.ramp_rounds, help="rounds to the full weight")


def choices(options: type[msgspec.Struct], field: str) -> tuple[str, ...]:
    """The values that a setting may have, from its declaration."""
    return get_args(get_type_hints(options)[field])


def settle(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse with the values that the preset and then the method have; the command line wins.
    Raises ConfigError for flags that do not go together."""
    args = parser.parse_args(argv)
    if not hasattr(args, "paper"):
        return args
    if args.resume and args.run_dir is None:
        raise ConfigError("--resume needs --run-dir, the folder of the run to go on with")
    preset = find_preset(args.preset).flags if args.preset else {}
    args.own_parser.set_defaults(**preset)
    args = parser.parse_args(argv)
    if args.paper and args.method != "hypemefed":
        raise ConfigError(f"--paper is hypemefed's, not {args.method}'s; leave one of them out")
    chosen = defaults_of(args.method, args.paper, args.server_optimizer)
    args.own_parser.set_defaults(**{**chosen, **preset})
    return parser.parse_args(argv)
