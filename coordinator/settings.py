"""From flags and presets to one checked RunConfig, and what differs between two."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from coordinator.config import (
    AggregationOptions,
    DistillOptions,
    GeneratorOptions,
    RotationOptions,
    RunConfig,
    ServerOptions,
)
from coordinator.defaults import GENERATE, RANK
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.messages import ModelSpec, Plan

# In place of a data set's input shape and number of classes, to check settings before it is read.
ANY_DATA = ((1, 1, 1), 2)


def run_config(
    args: argparse.Namespace, input_shape: tuple[int, ...], num_classes: int
) -> RunConfig:
    """The settings that both commands share; `checked` is for the caller. Raises ConfigError, and
    DataError for data of one class."""
    if num_classes < 2:
        source = getattr(args, "data", None) or getattr(args, "test", None) or "--classes"
        raise DataError(
            f"{source}: got {num_classes} class, expected at least 2 to tell apart; give other data"
        )
    model = ModelSpec(
        family=args.model,
        input_shape=tuple(input_shape),
        num_classes=num_classes,
        exit=args.exits,
        options=model_options(args.option),
    )
    server = ServerOptions(
        optimizer=args.server_optimizer,
        momentum=args.server_momentum,
        lr=args.server_lr,
        damping=args.damping,
        ema=args.ema,
        serve=args.serve,
    )
    aggregation = AggregationOptions(rule=args.aggregation, trim=args.trim, clip=args.clip)
    generate: Any = args.generate or GENERATE.get(args.generator, "conv")
    generator = GeneratorOptions(
        name=args.generator,
        generate=generate,
        gain=args.gain,
        rank=RANK.get(args.generator, GeneratorOptions().rank) if args.rank is None else args.rank,
        hidden=args.hidden,
        epochs=args.fit_epochs,
        owners_per_step=args.owners_per_step,
        memory_rows=args.memory_rows,
    )
    distill = DistillOptions(
        direction=args.distill,
        weight=args.distill_weight,
        temperature=args.distill_temperature,
        ramp_rounds=args.distill_ramp,
    )
    return RunConfig(
        method=args.method,
        model=model,
        rounds=args.rounds,
        participants=args.participants,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        optimizer=args.optimizer,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        prox_mu=args.prox_mu,
        exit_weights=numbers(args.exit_weights, "--exit-weights"),
        weighting=args.weighting,
        seed=args.seed,
        eval_every=args.eval_every,
        eval_tail=args.eval_tail,
        server=server,
        aggregation=aggregation,
        generator=generator,
        rotation=RotationOptions(
            mode=args.rotation, stages=args.rotation_stages, draw=args.rotation_draw
        ),
        distill=distill,
    )


def model_options(pairs: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts: whole numbers, comma lists of them, numbers, true/false, else text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals and text):
            raise ConfigError(f"--option {pair!r} is not KEY=VALUE, e.g. channels=32,64,128")
        options[key] = _value(text)
    return options


def _value(text: str) -> int | float | str | bool | tuple[int, ...]:
    if text in ("true", "false"):
        return text == "true"
    if "," in text:
        return tuple(whole_numbers(text, "--option"))
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def whole_numbers(text: str, flag: str, separator: str = ",") -> list[int]:
    """Numbers from "17,17,16". Raises ConfigError naming the flag."""
    try:
        return [int(part) for part in text.split(separator)]
    except ValueError as error:
        raise ConfigError(
            f"{flag} {text!r} is not whole numbers, e.g. {separator.join(('4', '4', '2'))}"
        ) from error


def numbers(text: str, flag: str) -> tuple[float, ...]:
    """Numbers from "1,1,0.5"; none from "". Raises ConfigError naming the flag."""
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise ConfigError(f"{flag} {text!r} is not numbers with commas, e.g. 1,1,0.5") from error


Checked = TypeVar("Checked")


FLAGS = {  # of the settings whose flag is not named as their last part is
    "data": "--data (serve: --test)",
    "deadline_s": "--deadline",
    "grace_s": "--grace",
    "model.family": "--model",
    "model.exit": "--exits",
    "model.options": "--option",
    "model.input_shape": "--input",
    "model.num_classes": "--classes",
    "server.optimizer": "--server-optimizer",
    "server.momentum": "--server-momentum",
    "server.lr": "--server-lr",
    "aggregation.rule": "--aggregation",
    "generator.name": "--generator",
    "generator.epochs": "--fit-epochs",
    "rotation.mode": "--rotation",
    "rotation.stages": "--rotation-stages",
    "rotation.draw": "--rotation-draw",
    "distill.direction": "--distill",
    "distill.weight": "--distill-weight",
    "distill.temperature": "--distill-temperature",
    "distill.ramp_rounds": "--distill-ramp",
    "population.holdout": "--personalise",
}


def checked(config: RunConfig) -> RunConfig:
    """The same config, its constraints checked, and those of the plan that devices get: a struct
    made in Python is not by itself. Raises ConfigError naming the flag."""
    good = _converted(config, RunConfig)
    if good.exit_weights and len(good.exit_weights) != good.model.exit:
        raise ConfigError(
            f"{len(good.exit_weights)} exit weights for {good.model.exit} exits; give one each"
        )
    if good.mode == "async" and good.late == "drop":
        raise ConfigError(
            "--late drop has no place with --mode async, where most updates come late; leave it out"
        )
    if good.exit_weights and not any(good.exit_weights):
        raise ConfigError("--exit-weights are all 0, so nothing would be trained; give one above 0")
    _converted(good.plan(good.rounds), Plan)
    return good


def _converted(settings: msgspec.Struct, kind: type[Checked]) -> Checked:
    value: Any = msgspec.to_builtins(settings)
    try:
        return msgspec.convert(value, type=kind)
    except msgspec.ValidationError as error:
        expected, _, place = str(error).partition(" - at ")
        found = re.search(r"\$\.([a-z0-9_.]+)", place)
        if not found:
            raise ConfigError(f"setting refused: {error}; see --help") from error
        for part in found[1].split("."):
            value = value[part]
        raise ConfigError(
            f"{flag_of(found[1])} is {one_line(repr(value))}: {expected}; see --help"
        ) from error


def flag_of(setting: str) -> str:
    """The flag of a setting such as "generator.epochs"."""
    return FLAGS.get(setting, "--" + setting.rpartition(".")[2].replace("_", "-"))


def differences(old: RunConfig, new: RunConfig) -> str:
    """The settings that differ, with both values; "" if none do."""
    before, now = _flat(old), _flat(new)
    return ", ".join(
        f"{flag_of(key)} {one_line(repr(before.get(key)))} (now {one_line(repr(now.get(key)))})"
        for key in dict.fromkeys([*before, *now])
        if before.get(key) != now.get(key)
    )


def _flat(config: RunConfig) -> dict[str, object]:
    """Every setting by its path."""
    whole = msgspec.to_builtins(config)
    if config.population:
        whole["population"] = json.loads(config.population)
    flat: dict[str, object] = {}
    for key, value in whole.items():
        inner = value.items() if isinstance(value, dict) else ()
        flat |= {f"{key}.{name}": item for name, item in inner} if inner else {key: value}
    return flat
