"""Flags that several subcommands share."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeAlias

import msgspec

from edge_sdk.errors import ConfigError, UsageError
from edge_sdk.helpers.text import destination, one_line, parse_option, parse_size, plain_words
from edge_sdk.protocol.fields import Adapters

Parse: TypeAlias = Callable[[str], float]
MAX_THREADS = 1024
DEFAULT_EXITS = 3  # of a model where neither --exits nor --cuts tells
MAX_EXITS, MOST_IDS = 100, 10_000_000  # as in messages.ModelSpec
MOST = 2**31 - 1  # of examples, clients, lines, ...
USUAL_KEYS = "default ~/.config/edge-sdk, or keys in the service's own state folder"  # of a device
# A round's training where no flag tells: what a run asks of its devices, and `plan` predicts.
DEFAULT_EPOCHS, DEFAULT_BATCH_SIZE = 2, 32
DEFAULT_MOMENTUM = 0.9  # of sgd


def print_step(step: str) -> None:
    """Say what a command does for seconds: a line on stderr, as stdout is for results."""
    print(f"edge-sdk: {step}", file=sys.stderr, flush=True)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Tells each flag's default, unless its text does, and leaves an example as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        is_told = "default" in text or isinstance(action.default, bool)
        if is_told or not isinstance(action.default, int | float | str | Path):
            return text
        if action.default in ("", argparse.SUPPRESS):
            return text
        return f"{text}; default %(default)s"


def add_command(commands: Any, name: str, about: str, *examples: str) -> Parser:
    """A subcommand: `about` in the list of commands and above its flags, examples below them."""
    parser: Parser = commands.add_parser(
        name,
        help=about,
        description=f"{about[0].upper()}{about[1:]}.",
        epilog="\n  ".join([f"example{'s' * (len(examples) > 1)}:", *examples]),
        formatter_class=HelpFormatter,
    )
    return parser


def add_memory_cap(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--memory-cap",
        type=size_flag,
        metavar="512M",
        help="most that training may use in all; K, M and G are powers of 1024",
    )


def add_imports(parser: argparse._ActionsContainer) -> None:
    """--import MODULE, any number of times: a list `imports`, or None."""
    said = "Python module that registers your model families or readers"
    parser.add_argument("--import", dest="imports", action="append", metavar="MODULE", help=said)


def whole_flag(least: int = -(2**63), most: int = 2**63) -> Callable[[str], int]:
    """A whole number within bounds, for argparse."""
    wanted = "a whole number"
    if most < 2**63:
        wanted += f" from {least} to {most}"

    def parse(text: str) -> int:
        found = re.fullmatch(r"\s*[+-]?[0-9]{1,30}\s*", text)
        if not found or not least <= int(text) <= most:
            raise argparse.ArgumentTypeError(f"{text!r}, expected {wanted}")
        return int(text)

    return parse


def number_flag(least: float, most: float, wanted: str, *, is_open: bool = False) -> Parse:
    """A number from `least` (is_open: above it) to `most`, for argparse. wanted: in words."""

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not (least < number if is_open else least <= number) or not number <= most:
            raise argparse.ArgumentTypeError(f"{text!r}, expected {wanted}")
        return number

    return parse


def whole_numbers_flag(text: str) -> tuple[int, ...]:
    """(17, 17, 16) of 17,17,16, for argparse."""
    parts = text.split(",")
    if not all(re.fullmatch("[0-9]{1,9}", part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}, expected whole numbers, e.g. 4,4,2")
    return tuple(map(int, parts))


LARGEST = sys.float_info.max
plain_number = number_flag(-LARGEST, LARGEST, "a number")
rate_flag = number_flag(0, 1e6, "Mbit/s such as 94 or 7.5", is_open=True)
duration_flag = number_flag(0, 1e9, "seconds, 0 or more")
share_flag = number_flag(0, 1, "a share from 0 to 1")
part_flag = number_flag(0, 1, "a share above 0, at most 1", is_open=True)


def path_flag(text: str) -> Path:
    """A path for argparse; an empty one would be the current folder."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a path")
    return Path(text)


class Only(NamedTuple):
    """Another flag with which a flag counts. values: of the other; (): any that is not nothing."""

    flag: str
    values: tuple[object, ...] = ()


class Parser(argparse.ArgumentParser):
    """What is wrong with the command line is one line and status 2. No value may be empty, as of a
    script's variable that is not set, and no number NaN or infinite. A flag is its whole name: a
    shortened one could mean another, or another one tomorrow.

    only: by flag, with what it counts; typed elsewhere it is refused, as it would have no effect.
    own: values of such other flags that are not this project's, and may take any."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})
        self.only: dict[str, Only] = {}
        self.own: set[object] = set()
        for kind, parse in {int: whole_flag(), float: plain_number, Path: path_flag}.items():
            self.register("type", kind, parse)

    def error(self, message: str) -> NoReturn:
        said = one_line(message, max_length=2000)
        self.exit(2, f"{self.prog}: {said}; see {self.prog} --help\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises SystemExit, also for empty values and flags without effect."""
        found, rest = super().parse_known_args(args, namespace)
        if rest and self.get_default("run"):  # of a command, whose --help is named
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        # Parsed again with None for every default, what is not None was typed.
        nothing = argparse.Namespace(**dict.fromkeys(vars(found)))
        typed = vars(super().parse_known_args(args, nothing)[0])
        for action in self._actions:  # not those of a command, which has looked itself
            value = typed.get(action.dest)
            if value == "" or (isinstance(value, list) and "" in value):
                name = "/".join(action.option_strings) or action.dest
                self.error(f"argument {name}: '', expected a value")
        for flag, only in self.only.items():
            value = getattr(found, destination(only.flag), None)
            if typed.get(destination(flag)) is None or value in self.own:
                continue
            if not (value in only.values if only.values else value):
                self.error(f"{flag} {_without(only, value)}; leave it out, or {_with(only)}")
        return found, rest


def _without(only: Only, value: object) -> str:
    if value is True:
        return f"has no effect with {only.flag}"
    is_given = value not in (None, False, 0)
    return f"has no effect {f'with {only.flag} {value}' if is_given else f'without {only.flag}'}"


def _with(only: Only) -> str:
    if only.values and only.values[0] in (None, False):
        return f"leave out {only.flag}"
    return f"give {only.flag} {' or '.join(map(str, only.values))}".rstrip()


def device_flag(*names: str) -> Callable[[str], str]:
    """Where torch computes: one of `names`, or cuda:N; for argparse."""

    def parse(text: str) -> str:
        if text not in names and not re.fullmatch("cuda:[0-9]{1,3}", text):
            raise argparse.ArgumentTypeError(f"{text!r}, expected {', '.join(names)} or cuda:N")
        return text

    return parse


def shape_flag(text: str) -> tuple[int, ...]:
    """(1, 28, 28) of 1x28x28, for argparse."""
    sizes = text.lower().split("x")
    if not all(re.fullmatch("[0-9]{1,9}", size) and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}, expected sizes such as 1x28x28")
    shape = tuple(map(int, sizes))
    if len(shape) == 3 and shape[-1] in (1, 3) and min(shape[:2]) > 4:
        height, width, channels = shape
        step = f"give {channels}x{height}x{width}"
        raise argparse.ArgumentTypeError(f"{text!r}, which looks like HxWxC; {step}")
    return shape


def option_flag(text: str) -> tuple[str, Any]:
    """parse_option for argparse, where a wrong one is wrong usage."""
    try:
        return parse_option(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def model_parts(args: argparse.Namespace) -> tuple[str, int, dict[str, Any]]:
    """Family, exits and options of --model FAMILY, or PACKAGE:NAME of a package's model, with
    --exits, --cuts and --option: what is cut by names has as many exits as names. Raises
    UsageError."""
    family, sign, name = args.model.partition(":")
    options = dict(args.option)
    if sign:
        options["model"] = name
    cuts = args.cuts or ("auto" if sign and "cuts" not in options else "")
    if not cuts:
        return family, args.exits, options
    if "cuts" in options:
        raise UsageError("--cuts and --option cuts say the same; give one of them")
    if cuts == "auto":
        return family, args.exits, options | {"cuts": f"auto:{args.exits}"}
    count = len(cuts.split(","))
    if args.exits not in (count, DEFAULT_EXITS):
        raise UsageError(f"--cuts names {count} modules for --exits {args.exits}; give one of them")
    return family, count, options | {"cuts": cuts}


def add_cuts(parser: argparse._ActionsContainer) -> None:
    """--cuts, beside --model and --exits."""
    parser.add_argument(
        "--cuts",
        metavar="auto",
        help="of a package's model: names of modules with commas, an exit behind each, or auto: "
        "as many as --exits, at about equal operations (what such a model has without --cuts)",
    )


def add_adapters(parser: argparse._ActionsContainer) -> None:
    """--adapt and what goes with it, beside --model; see adapters_of."""
    add = parser.add_argument
    add("--adapt", metavar="KIND", help="train adapters alone: lora, dema or pq-lora")
    add("--adapt-rank", type=whole_flag(1, 4096), metavar="N", help="of adapters (8)")
    add("--adapt-branches", type=whole_flag(1, 64), metavar="N", help="of dema (1)")
    add(
        "--adapt-targets",
        metavar="PATTERNS",
        help="modules that have one, e.g. attention.q,attention.v (the kind's own)",
    )
    add(
        "--adapt-from",
        type=whole_flag(1, MAX_EXITS),
        metavar="STAGE",
        help="stages before it have none, and run once (1)",
    )


def adapters_of(args: argparse.Namespace) -> Adapters | None:
    """What the flags ask for; None: nothing. Raises UsageError for a detail without --adapt."""
    asked = args.adapt_targets
    if asked is not None and not all(asked.split(",")):
        got = one_line(repr(asked))
        raise UsageError(f"--adapt-targets is {got}, expected patterns of names, commas between")
    given = {
        "rank": args.adapt_rank,
        "branches": args.adapt_branches,
        "targets": None if asked is None else asked.split(","),
        "first": args.adapt_from,
    }
    given = {name: value for name, value in given.items() if value is not None}
    is_off = args.adapt in (None, "none")
    if is_off and given:
        name = {"first": "from"}.get(next(iter(given)), next(iter(given)))
        raise UsageError(f"--adapt-{name} counts with --adapt KIND; give that, or leave it out")
    if is_off:
        return None
    try:
        return msgspec.convert({"kind": args.adapt, **given}, Adapters)
    except msgspec.ValidationError as error:
        raise UsageError(f"--adapt {one_line(args.adapt)}: {plain_words(str(error))}") from error


def size_flag(text: str) -> int:
    """parse_size for argparse, where a wrong size is wrong usage."""
    try:
        return parse_size(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"


def print_json(value: object) -> None:
    print(json.dumps(value, indent=2))
