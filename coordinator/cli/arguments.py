"""Flags that `emulate` and `serve` share, and what they become.

No file of cli/ imports torch or numpy, which takes two seconds: a command's flags are read first,
and what it needs is imported when it runs, in `heavy_imports`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from coordinator.aggregation.registry import RULES
from coordinator.config import PARTS, Options, RunConfig
from coordinator.generators.registry import GENERATORS
from coordinator.methods.registry import METHODS, defaults_of
from coordinator.presets import PRESETS, find_preset
from coordinator.registry import PartRegistry
from coordinator.settings import destination, flag_of, flags_of, numbers
from edge_sdk.cli.flags import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_EPOCHS,
    MAX_THREADS,
    option_flag,
    path_flag,
    whole_flag,
)
from edge_sdk.errors import ConfigError
from edge_sdk.helpers.imports import heavy_imports, import_module
from edge_sdk.protocol.messages import ModelSpec

# Fields of RunConfig: those that every command has that runs rounds
RUN = ["rounds", "init", "participants", "seed", "eval_every", "eval_tail"]
LOCAL = ["epochs", "batch_size", "lr", "optimizer", "momentum", "weight_decay"]
LOSS = ["prox_mu", "exit_weights"]
SHARED = [*RUN, *LOCAL, *LOSS, "weighting"]
# What a field of one of PARTS may name
NAMES: dict[str, Iterable[str]] = {"rule": RULES, "name": GENERATORS}
OWN_VALUES = "defaults are those of the --method and --generator that are named"
# Flags that decide about others.
DECIDING = ("method", "aggregation", "generator", "server_optimizer")
IMPORT = "Python module that registers model families, methods, ... of your own"
REPEATED: Any = {"action": "append", "default": []}  # of a flag that may be given again
ANY_DATA: Any = {"input_shape": (1, 1, 1), "num_classes": 2}  # of a model until the data is read


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """What every way of running shares: the method, the model, the training, the run folder."""
    parser.usage = "%(prog)s [flags]"  # one line: seventy flags would fill a screen
    parser.set_defaults(runs_rounds=True)
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--method", default="hypemefed", choices=METHODS, help="the federated algorithm")
    add("--paper", action="store_true", help="the method as published, instead of what is best")
    add("--preset", choices=sorted(PRESETS), help="model and training of a published experiment")
    add_flags(group, RunConfig, RUN, defaults={"rounds": 20})
    add("--device", default="auto", help="auto, cpu or cuda")
    threads = whole_flag(1, MAX_THREADS)
    add("--threads", type=threads, default=1, help="torch threads on the CPU")
    add("--run-dir", type=path_flag, help="where the run lives")
    add("--resume", action="store_true", help="go on with the run in --run-dir")
    add = parser.add_argument_group("model").add_argument
    add("--model", default="cnn", help="model family")
    add("--exits", type=int, default=3, help="number of exits of the whole model")
    add("--option", type=option_flag, metavar="KEY=VALUE", help="model option", **REPEATED)
    add("--import", dest="imports", metavar="MODULE", help=IMPORT, **REPEATED)
    group = parser.add_argument_group("local training")
    defaults = {"epochs": DEFAULT_EPOCHS, "batch_size": DEFAULT_BATCH_SIZE}
    add_flags(group, RunConfig, [*LOCAL, *LOSS], defaults=defaults)
    group = parser.add_argument_group("aggregation", description=OWN_VALUES)
    add_flags(group, RunConfig, ("weighting",))
    for part in ("aggregation", "server"):
        add_flags(group, PARTS[part], choices=NAMES)
    group = parser.add_argument_group("stages that few clients train", description=OWN_VALUES)
    for part in ("generator", "rotation", "distill"):
        add_flags(group, PARTS[part], choices=NAMES)


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
        elif flag.is_list:
            more["default"] = ",".join(map(str, flag.default))
        else:
            more |= {"type": flag.kind, "metavar": flag.metavar}
            more["choices"] = (choices or {}).get(field, flag.choices) or None
        parser.add_argument(flag.name, **more)


def taken(
    args: argparse.Namespace, kind: type[msgspec.Struct], fields: Sequence[str] | None = None
) -> dict[str, Any]:
    """The values of a struct's flags, by field. Raises ConfigError."""
    values = {}
    for field, flag in flags_of(kind).items():
        if fields is None or field in fields:
            value = getattr(args, flag.destination)
            values[field] = numbers(value, flag.name) if flag.is_list else value
    return values


def run_config(args: argparse.Namespace, fields: Sequence[str], **settings: Any) -> RunConfig:
    """The settings of a run, whose model gets its shapes from the data. fields: of RunConfig, which
    have flags; settings: those that have none. Raises ConfigError."""
    values = {name: taken(args, kind) for name, kind in PARTS.items()}
    for part, kind in own_kinds(args).items():
        (values[part] if part else settings)["own"] = taken(args, kind)
    parts = {name: kind(**values[name]) for name, kind in PARTS.items()}
    options = dict(args.option)
    model = ModelSpec(family=args.model, exit=args.exits, options=options, **ANY_DATA)
    settings |= {"method": args.method, "model": model, **taken(args, RunConfig, fields), **parts}
    return RunConfig(**settings)


def own_kinds(args: argparse.Namespace) -> dict[str, type[Options]]:
    """What the chosen method, rule and generator have of their own, by the part of RunConfig that
    holds it; "" for RunConfig itself."""
    chosen: tuple[tuple[str, PartRegistry[Any], str], ...] = (
        ("", METHODS, args.method),
        ("aggregation", RULES, args.aggregation),
        ("generator", GENERATORS, args.generator),
    )
    kinds = {part: kind[name].options for part, kind, name in chosen if name in kind}
    return {part: options for part, options in kinds.items() if options}


class CommandParser(argparse.ArgumentParser):
    """Of a command. One that runs rounds takes a value from the command line, else from the preset,
    the method, the generator, the flag; what the chosen ones have of their own becomes flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._own: set[type[Options]] = set()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Raises ConfigError for a module that cannot be imported, and flags that do not go
        together."""
        parse = super().parse_known_args
        if not self.get_default("runs_rounds"):
            return parse(args, namespace)
        with heavy_imports():
            named = _named(args)
            for module in named.imports:
                import_module(module)
            preset = find_preset(named.preset).flags if named.preset in PRESETS else {}
            for name in DECIDING:  # the command line, else the preset, else the parser
                if getattr(named, name) is None:
                    default = None if name == "generator" else self.get_default(name)
                    setattr(named, name, preset.get(name, default))
            if named.method in METHODS:
                values = _method_values(named)
                self.set_defaults(**values | preset)
                named.generator = named.generator or values.get("generator", "none")
                self._add_own_flags(named)
            found = parse(args, namespace)
            if found[0].resume and found[0].run_dir is None:
                raise ConfigError("--resume needs --run-dir, the folder of the run to go on with")
            return found

    def error(self, message: str) -> NoReturn:
        if re.match(r"argument --(method|aggregation|generator): invalid choice", message):
            message += "; load your own with --import MODULE"
        super().error(message)

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


def _named(args: Sequence[str]) -> argparse.Namespace:
    """What is named before anything else is understood: with it the other flags, and their
    defaults, are. Shortened flags count, as where all are parsed."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--import", dest="imports", action="append", nargs="?", default=[])
    parser.add_argument("--paper", action="store_true")
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
        optimizer=named.server_optimizer,
        generator=generator,
    )
    return {destination(flag_of(path)): value for path, value in values.items()}
