"""The federated methods by name. A method is a function from a run's settings to a Method.

hypemefed        prefix to each client's exit; factorised hypernetworks fill in the convolutions
                 of missing stages (HypeMeFed, 2024; deviations in generators/svd_mlp.py)
owners-mean      the same without generation: each tensor is the mean over its owners
stage-rotation   owners' mean, where a client also trains one deeper stage, by turns, over a
                 frozen prefix (ours; related: FeDepth 2023, ProFL 2024)
fedavg-s         everyone trains exit 1 only (FedAvg, 2017)
fedavg-l         everyone trains the whole model: the bound, not for weak devices
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from msgspec.structs import replace

from coordinator.config import RunConfig
from coordinator.generators.base import Generator
from coordinator.generators.svd_mlp import SvdMlp
from coordinator.methods.base import Method, Metrics
from coordinator.methods.depthwise import DepthAveraging, Rule, fixed, prefix, rotation
from edge_sdk.errors import ConfigError
from edge_sdk.models import initial_tensors

__all__ = ["METHODS", "Method", "Metrics", "make_method"]
Device: TypeAlias = str | torch.device


def hypemefed(config: RunConfig, device: Device) -> Method:
    shapes = {name: tuple(t.shape) for name, t in initial_tensors(config.model, 0).items()}
    generator = SvdMlp(shapes, config.generator, config.seed, device)
    return _depthwise(config, prefix, generator)


def owners_mean(config: RunConfig, device: Device) -> Method:
    return _depthwise(config, prefix)


def stage_rotation(config: RunConfig, device: Device) -> Method:
    return _depthwise(config, rotation(config.seed))


def fedavg_s(config: RunConfig, device: Device) -> Method:
    shallow = replace(config.model, exit=1)
    return _depthwise(
        replace(config, model=shallow, exit_weights=config.exit_weights[:1]), fixed(1)
    )


def fedavg_l(config: RunConfig, device: Device) -> Method:
    return _depthwise(config, fixed(config.model.exit))


def _depthwise(config: RunConfig, rule: Rule, generator: Generator | None = None) -> Method:
    return DepthAveraging(
        config.model,
        config.plan(),
        rule,
        config.seed,
        config.server,
        generator,
        config.generator.gain,
        config.weighting == "examples",
    )


METHODS: dict[str, Callable[[RunConfig, Device], Method]] = {
    "hypemefed": hypemefed,
    "owners-mean": owners_mean,
    "stage-rotation": stage_rotation,
    "fedavg-s": fedavg_s,
    "fedavg-l": fedavg_l,
}


def make_method(config: RunConfig, device: Device = "cpu") -> Method:
    """The method that the settings name. Raises ConfigError listing the known ones."""
    factory = METHODS.get(config.method)
    if factory is None:
        raise ConfigError(f"unknown method {config.method!r}; known: {', '.join(METHODS)}")
    return factory(config, device)
