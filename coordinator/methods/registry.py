"""The federated methods by name. A method is a function from a run's settings to a Method.

hypemefed        prefix to each client's exit, with the run's stage rotation and generator: as
                 published (HypeMeFed, 2024) with `--paper`, else what measured best
owners-mean      each tensor is the mean over its owners; no generator
stage-rotation   the same, where a client also trains one deeper stage, by turns, over a frozen
                 prefix (methods/rotation.py)
stale-copy       what the published code amounts to: clients count with the weights they were sent
                 for stages that they do not train
fedavg-s         everyone trains exit 1 only (FedAvg, 2017)
fedavg-l         everyone trains the whole model: the bound, not for weak devices
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from msgspec.structs import replace

from coordinator.config import RunConfig
from coordinator.generators.registry import make_generator
from coordinator.methods.base import Method
from coordinator.methods.depthwise import DepthAveraging
from coordinator.methods.rotation import Rule, fixed, rotation
from edge_sdk.errors import ConfigError
from edge_sdk.hardware.process_memory import memory_errors
from edge_sdk.models import find_family

Device: TypeAlias = str | torch.device


def hypemefed(config: RunConfig, device: Device) -> Method:
    generator = make_generator(config.model, config.generator, config.seed, device)
    return DepthAveraging(config, _rotation(config), generator)


def owners_mean(config: RunConfig, device: Device) -> Method:
    return DepthAveraging(config, _rotation(config))


def stage_rotation(config: RunConfig, device: Device) -> Method:
    return owners_mean(config, device)


def stale_copy(config: RunConfig, device: Device) -> Method:
    return owners_mean(replace(config, server=replace(config.server, damping=1.0)), device)


def fedavg_s(config: RunConfig, device: Device) -> Method:
    shallow = replace(config.model, exit=1)
    config = replace(config, model=shallow, exit_weights=config.exit_weights[:1])
    return DepthAveraging(config, fixed(1))


def fedavg_l(config: RunConfig, device: Device) -> Method:
    return DepthAveraging(config, fixed(config.model.exit))


def _rotation(config: RunConfig) -> Rule:
    return rotation(config.rotation, config.seed, config.deadline_s)


METHODS: dict[str, Callable[[RunConfig, Device], Method]] = {
    "hypemefed": hypemefed,
    "owners-mean": owners_mean,
    "stage-rotation": stage_rotation,
    "stale-copy": stale_copy,
    "fedavg-s": fedavg_s,
    "fedavg-l": fedavg_l,
}


FIXED = ("fedavg-s", "fedavg-l")


def check_method(config: RunConfig) -> None:
    """Raise ConfigError for an unknown method or family, and for settings that the method has no
    place for: all that can be told before the data's shape is known."""
    if config.method not in METHODS:
        raise ConfigError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    if config.generator.name != "none" and config.method != "hypemefed":
        raise ConfigError(
            f"method {config.method!r} generates nothing, so --generator {config.generator.name} "
            "has no place there; use --method hypemefed"
        )
    if config.rotation.mode != "off" and config.method in FIXED:
        raise ConfigError(
            f"method {config.method!r} has the same stages for everybody, so --rotation "
            f"{config.rotation.mode} has no place there; leave it out"
        )
    if config.rotation.mode == "off" and config.method == "stage-rotation":
        raise ConfigError(
            "method 'stage-rotation' with --rotation off is owners-mean; use --method owners-mean "
            "or --rotation add"
        )
    find_family(config.model.family)


def make_method(config: RunConfig, device: Device = "cpu") -> Method:
    """The method that the settings name. Raises ConfigError as `check_method`, and for a model that
    cannot be built."""
    check_method(config)
    with memory_errors(f"making {config.method} with generator {config.generator.name}"):
        return METHODS[config.method](config, device)
