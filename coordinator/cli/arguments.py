"""Flags that `emulate` and `serve` share, and what they become.

No file of cli/ imports torch or numpy, which takes two seconds: a command's flags are read first,
and what it needs is imported when it runs, in `heavy_imports`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import msgspec

from coordinator.aggregation.registry import RULES
from coordinator.cli.backbones import read_backbones
from coordinator.config import PARTS, Backbone, Options, RunConfig
from coordinator.generators.registry import GENERATORS
from coordinator.methods.registry import METHODS, defaults_of
from coordinator.presets import PRESETS, find_preset
from coordinator.registry import PartRegistry, Registered
from coordinator.settings import Flag, flag_of, flags_of, shared_flags, with_backbones
from coordinator.store.reader import kept_config
from edge_sdk.cli.flags import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_EPOCHS,
    DEFAULT_EXITS,
    MAX_EXITS,
    MAX_THREADS,
    Only,
    Parser,
    adapters_of,
    add_adapters,
    add_cuts,
    device_flag,
    model_parts,
    option_flag,
    path_flag,
    plain_number,
    whole_flag,
)
from edge_sdk.errors import ConfigError
from edge_sdk.helpers.imports import heavy_imports, import_module
from edge_sdk.helpers.text import destination, plain_words
from edge_sdk.protocol.messages import ModelSpec

# Fields of RunConfig: those that every command has that runs rounds
RUN = ["rounds", "init", "freeze", "participants", "seed", "eval_every", "eval_tail"]
LOCAL = ["epochs", "batch_size", "lr", "lr_decay", "optimizer", "momentum", "weight_decay"]
LOSS = ["prox_mu", "exit_weights", "logit_adjustment"]
SHARED = [*RUN, *LOCAL, *LOSS, "holdout", "weighting"]
# What a field of one of PARTS may name
NAMES: dict[str, Iterable[str]] = {"rule": RULES, "name": GENERATORS}
OWN_VALUES = "defaults are those of the --method and --generator that are named"
# Flags that decide about others.
DECIDING = ("method", "aggregation", "generator", "optimizer", "server_optimizer")
OF_METHOD = ("generator", "optimizer")  # of these, a method's own default is what decides
IMPORT = "Python module that registers model families, methods, ... of your own"
REPEATED: Any = {"action": "append", "default": []}  # of a flag that may be given again
ONE_MODEL = ("--model", "--exits", "--cuts", "--option", "--init")  # told by --backbones instead
ANY_DATA: Any = {"input_shape": (1, 1, 1), "num_classes": 2}  # of a model until the data is read


def add_run_arguments(parser: Parser) -> None:
    """What every way of running shares: the method, the model, the training, the run folder."""
    parser.only["--resume"] = Only("--run-dir")
    parser.usage = "%(prog)s [flags]"  # one line: seventy flags would fill a screen
    parser.set_defaults(runs_rounds=True)
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--method", default="hypemefed", choices=METHODS, help="the federated algorithm")
    add("--paper", action="store_true", help="the method as published, instead of what is best")
    add("--preset", choices=sorted(PRESETS), help="model and training of a published experiment")
    add_flags(group, RunConfig, RUN, defaults={"rounds": 20})
    add(
        "--device",
        type=device_flag("auto", "cpu", "cuda"),
        default="auto",
        help="auto, cpu or cuda",
    )
    threads = whole_flag(1, MAX_THREADS)
    add("--threads", type=threads, default=1, help="torch threads on the CPU")
    add("--run-dir", type=path_flag, help="where the run lives")
    add("--resume", action="store_true", help="go on with the run in --run-dir")
    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--model", default="cnn", help="family, or a package's model: torchvision:resnet18")
    add(
        "--exits",
        type=whole_flag(1, MAX_EXITS),
        default=DEFAULT_EXITS,
        help="number of exits of the whole model",
    )
    add_cuts(model)
    add_adapters(model)
    add("--option", type=option_flag, metavar="KEY=VALUE", help="model option", **REPEATED)
    backbones = shared_flags()["backbones"]
    add(backbones.name, type=path_flag, metavar=backbones.metavar, help=backbones.help)
    parser.only |= dict.fromkeys(ONE_MODEL, Only(backbones.name, (None,)))
    add_module_flag(model)
    group = parser.add_argument_group("local training")
    defaults = {"epochs": DEFAULT_EPOCHS, "batch_size": DEFAULT_BATCH_SIZE}
    add_flags(group, RunConfig, [*LOCAL, *LOSS, "holdout"], defaults=defaults)
    group = parser.add_argument_group("aggregation", description=OWN_VALUES)
    add_flags(group, RunConfig, ("weighting",))
    for part in ("aggregation", "server"):
        add_flags(group, PARTS[part], choices=NAMES)
    group = parser.add_argument_group("stages that few clients train", description=OWN_VALUES)
    for part in ("generator", "rotation", "distill"):
        add_flags(group, PARTS[part], choices=NAMES)


def add_module_flag(parser: argparse._ActionsContainer) -> None:
    """--import MODULE, any number of times: a list `imports`."""
    parser.add_argument("--import", dest="imports", metavar="MODULE", help=IMPORT, **REPEATED)


def add_flags(
    parser: argparse._ActionsContainer,
    kind: type[msgspec.Struct],
    fields: Sequence[str] | None = None,
    *,
    defaults: Mapping[str, Any] | None = None,
    choices: Mapping[str, Iterable[str]] | None = None,
) -> None:
    """A flag for each described field of a struct, or for the named ones. defaults, choices: of the
    command line where they are not the struct's own, by field."""
    for field, flag in flags_of(kind).items():
        if fields is not None and field not in fields:
            continue
        default = (defaults or {}).get(field, flag.default)
        more: dict[str, Any] = {"help": flag.help, "default": default}
        if flag.kind is bool:
            more["action"] = argparse.BooleanOptionalAction
        else:
            more["metavar"] = flag.metavar
            more["choices"] = (choices or {}).get(field, flag.choices) or None
            more["type"] = str if more["choices"] else _parse(flag)
        if flag.is_list and flag.default:
            more["default"] = ",".join(map(str, flag.default))
        parser.add_argument(flag.name, **more)


def _parse(flag: Flag) -> Callable[[str], Any]:
    """From the command line to what the field takes, for argparse."""
    plain = {int: whole_flag(), float: plain_number}.get(flag.kind, str)

    def parse(text: str) -> Any:
        value = _numbers(text) if flag.is_list else plain(text)
        try:
            return msgspec.convert(value, flag.hint)
        except msgspec.ValidationError as error:
            expected = plain_words(str(error).partition(" - at ")[0])
            raise argparse.ArgumentTypeError(f"{text!r}, {expected}") from error

    return parse


def _numbers(text: str) -> list[float]:
    try:
        return [plain_number(part) for part in text.split(",")]
    except argparse.ArgumentTypeError as error:
        wanted = "expected numbers with commas, e.g. 1,1,0.5"
        raise argparse.ArgumentTypeError(f"{text!r}, {wanted}") from error


def taken(
    args: argparse.Namespace, kind: type[msgspec.Struct], fields: Sequence[str] | None = None
) -> dict[str, Any]:
    """The values of a struct's flags, by field."""
    flags = flags_of(kind).items()
    return {
        field: getattr(args, flag.destination)
        for field, flag in flags
        if fields is None or field in fields
    }


def run_config(args: argparse.Namespace, fields: Sequence[str], **settings: Any) -> RunConfig:
    """The settings of a run, whose model gets its shapes from the data. fields: of RunConfig, which
    have flags; settings: those that have none. Raises ConfigError."""
    values = {name: taken(args, kind) for name, kind in PARTS.items()}
    for part, kind in own_kinds(args).items():
        (values[part] if part else settings)["own"] = taken(args, kind)
    parts = {name: kind(**values[name]) for name, kind in PARTS.items()}
    family, exits, options = model_parts(args)
    parts_of_model: Any = {"options": options, "adapters": adapters_of(args)}
    model = ModelSpec(family=family, exit=exits, **parts_of_model, **ANY_DATA)
    settings |= {"method": args.method, "model": model, **taken(args, RunConfig, fields), **parts}
    return with_backbones(RunConfig(**settings), _backbones(args))


def _backbones(args: argparse.Namespace) -> tuple[Backbone, ...]:
    """Those of --backbones. A run that goes on has its own, should the file be gone."""
    if args.backbones is None:
        return ()
    if args.resume and not args.backbones.exists():
        return kept_config(args.run_dir).backbones
    return read_backbones(args.backbones)


def own_kinds(args: argparse.Namespace) -> dict[str, type[Options]]:
    """What the chosen method, rule and generator have of their own, by the part of RunConfig that
    holds it; "" for RunConfig itself."""
    kinds = {part: kind[name].options for part, kind, name in _chosen_parts(args) if name in kind}
    return {part: options for part, options in kinds.items() if options}


def _chosen_parts(args: argparse.Namespace) -> tuple[tuple[str, PartRegistry[Any], str], ...]:
    return (
        ("", METHODS, args.method),
        ("aggregation", RULES, args.aggregation),
        ("generator", GENERATORS, args.generator),
    )


def _is_ours(part: Registered[Any]) -> bool:
    return part.make.__module__.split(".")[0] == "coordinator"


class CommandParser(Parser):
    """Of a command. One that runs rounds takes a value from the command line, else from the preset,
    the method, the generator, the flag; what the chosen ones have of their own becomes flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own: set[type[Options]] = set()
        self._hidden: set[str] = set()  # flags that do not count with the method that is named

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises ConfigError for a module that cannot be imported."""
        parse = super().parse_known_args
        if not self.get_default("runs_rounds"):
            return parse(args, namespace)
        with heavy_imports():
            named = _named(args)
            for module in named.imports:
                import_module(module)
            preset = find_preset(named.preset).flags if named.preset in PRESETS else {}
            named.is_named = named.method is not None
            for name in DECIDING:  # the command line, else the preset, else the parser
                if getattr(named, name) is None:
                    default = None if name in OF_METHOD else self.get_default(name)
                    setattr(named, name, preset.get(name, default))
            if named.method in METHODS:
                values = _method_values(named)
                named.generator = named.generator or values.get("generator", "none")
                self._add_own_flags(named)
                self.set_defaults(**values | preset)
                self._limit_flags(named)
                self._hidden = self._useless_flags(named.method) if named.is_named else set()
            return parse(args, namespace)

    def format_help(self) -> str:
        with _without_help(self, self._hidden):
            return super().format_help()

    def error(self, message: str) -> NoReturn:
        if re.match(r"argument --(method|aggregation|generator): invalid choice", message):
            message += "; load your own with --import MODULE"
        if found := re.match(r"unrecognized arguments: (--[a-z0-9-]+)", message):
            message += _whose(found[1])
        super().error(message)

    def _limit_flags(self, chosen: argparse.Namespace) -> None:
        """Refuse flags without effect, but of a run that goes on: there they are compared with what
        it began with, when they may not have been refused."""
        parts = _chosen_parts(chosen)
        self.own |= {name for _, kind, name in parts if name in kind and not _is_ours(kind[name])}
        kinds: tuple[type[Options], ...] = (RunConfig, *PARTS.values())
        for options in kinds:
            for flag in flags_of(options).values():
                if flag.only and chosen.resume:
                    self.only.pop(flag.name, None)
                elif flag.only:
                    self.only[flag.name] = Only(flag.only[0], flag.only[1:])

    def _useless_flags(self, name: str) -> set[str]:
        """Of the shared flags those that the method has no place for, and what counts only with
        such a one."""
        method = METHODS[name]
        found = {flag.name for path, flag in shared_flags().items() if not method.has_place(path)}
        found |= {flag for flag, only in self.only.items() if only.flag in found}
        return found | ({"--paper"} if not method.paper else set())

    def _add_own_flags(self, chosen: argparse.Namespace) -> None:
        for part, kind in own_kinds(chosen).items():
            if kind in self._own:
                continue
            self._own.add(kind)
            try:
                add_flags(self.add_argument_group(f"{part or 'method'} of its own"), kind)
            except argparse.ArgumentError as error:
                raise ConfigError(
                    f"{kind.__module__}.{kind.__name__}: {error}; rename the field"
                ) from error


def _whose(name: str) -> str:
    """Of a flag that nothing chosen has: what has it of its own, as the end of an error's text."""
    with heavy_imports():
        owners = [
            f"--{registry.kind.split()[0]} {part}"
            for registry in (METHODS, RULES, GENERATORS)
            for part in registry
            if (kind := registry[part].options)
            and name in [flag.name for flag in flags_of(kind).values()]
        ]
    return f"; it is of {' and '.join(owners)}" if owners else ""


@contextmanager
def _without_help(parser: argparse.ArgumentParser, flags: Collection[str]) -> Iterator[None]:
    """Inside, the parser's help leaves out these flags, and groups of nothing else."""
    groups = [(group, group.title, group.description) for group in parser._action_groups]
    actions = [(a, a.help) for a in parser._actions if set(a.option_strings) & set(flags)]
    for action, _ in actions:
        action.help = argparse.SUPPRESS
    for group, *_ in groups:
        if all(action.help == argparse.SUPPRESS for action in group._group_actions):
            group.title = group.description = None
    try:
        yield
    finally:
        for action, said in actions:
            action.help = said
        for group, title, description in groups:
            group.title, group.description = title, description


def _named(args: Sequence[str]) -> argparse.Namespace:
    """What is named before anything else is understood: with it the other flags, and their
    defaults, are. Nothing is shortened: --serve would be taken for --server-optimizer."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="imports", action="append", nargs="?", default=[])
    for name in ("--paper", "--resume"):
        parser.add_argument(name, action="store_true")
    for name in ("preset", *DECIDING):
        parser.add_argument("--" + name.replace("_", "-"), dest=name, nargs="?")
    found = parser.parse_known_args(args)[0]
    found.imports = [module for module in found.imports if module]
    return found


def _method_values(named: argparse.Namespace) -> dict[str, Any]:
    """The values that the named method and generator have where no flag gives another, by flag."""
    generator = named.generator if named.generator in GENERATORS else ""
    values = defaults_of(
        named.method,
        is_paper=named.paper,
        local=named.optimizer or "",
        optimizer=named.server_optimizer,
        generator=generator,
    )
    return {destination(flag_of(path)): value for path, value in values.items()}
