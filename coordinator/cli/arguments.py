"""Flags that `emulate` and `serve` share, and what they become.

No file of cli/ imports torch or numpy, which takes two seconds: a command's flags are read first,
and what it needs is imported when it runs, in `heavy_imports`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
RUN = ["rounds", "participants", "seed", "eval_every", "eval_tail"]
LOCAL = ["epochs", "batch_size", "lr", "optimizer", "momentum", "weight_decay"]
LOSS = ["prox_mu", "exit_weights"]
SHARED = [*RUN, *LOCAL, *LOSS, "weighting"]
# What a field of one of PARTS may name
NAMES: dict[str, Iterable[str]] = {"rule": RULES, "name": GENERATORS}
OWN_VALUES = "a method or generator has values of its own for some where no flag is given"
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
            self._add_own_flags(named)  # those of what is named are in --help
            first = parse(args)[0]
            if first.resume and first.run_dir is None:
                raise ConfigError("--resume needs --run-dir, the folder of the run to go on with")
            preset = find_preset(first.preset).flags if first.preset else {}
            self.set_defaults(**preset)
            chosen = parse(args)[0]
            which = {"is_paper": chosen.paper, "optimizer": chosen.server_optimizer}
            generator = defaults_of(chosen.method, **which).get("generator.name", "none")
            self.set_defaults(**{"generator": generator, **preset})
            chosen = parse(args)[0]
            values = defaults_of(chosen.method, **which, generator=chosen.generator)
            self.set_defaults(
                **{destination(flag_of(path)): values[path] for path in values} | preset
            )
            self._add_own_flags(chosen)
            return parse(args, namespace)

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
    """What is named before anything else is understood: with it the other flags are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--import", dest="imports", action="append", nargs="?", default=[])
    for name in ("--method", "--aggregation", "--generator"):
        parser.add_argument(name, nargs="?")
    found = parser.parse_known_args(args)[0]
    found.imports = [module for module in found.imports if module]
    return found
