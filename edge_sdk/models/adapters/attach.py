"""Adapters onto a model, by a spec's `adapters`, and off it again for its export.

Which modules have one: those whose names match one of the patterns, whole or from a dot on
(`attention.q`, `layers.*.mlp.*`), else those that the kind chooses; in stages from `first` on."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import nn

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.text import one_line
from edge_sdk.models.adapters import dema, lora, pq_lora
from edge_sdk.models.adapters.base import BASIS, Kind
from edge_sdk.models.factorised import is_closed
from edge_sdk.models.staged import StagedModel, drawn_inputs
from edge_sdk.protocol.fields import Adapters
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensor_lists import ADAPTER, some_of, stage_of

KINDS: Mapping[str, Kind] = {
    "lora": cast(Kind, lora),
    "dema": cast(Kind, dema),
    "pq-lora": cast(Kind, pq_lora),
}


def adapted(model: StagedModel, adapters: Adapters | None) -> StagedModel:
    """The model itself, with adapters that leave what it computes as it was. Raises ConfigError for
    a kind that is not known and for a module that cannot have one."""
    if adapters is None:
        return model
    if adapters.kind not in KINDS:
        raise ConfigError(f"--adapt {adapters.kind!r} is none of {', '.join(KINDS)}")
    if adapters.branches > 1 and adapters.kind != "dema":
        raise ConfigError(f"--adapt-branches {adapters.branches} is for --adapt dema; leave it out")
    kind = KINDS[adapters.kind]
    for name in targets_of(model, adapters):
        kind.attach(model.get_submodule(name), name, adapters)
    return model


def targets_of(model: StagedModel, adapters: Adapters) -> list[str]:
    """Names of the modules that get an adapter: none where the model has no such stages. Raises
    ConfigError for one that is asked for inside a layer of torch's own, which never calls it."""
    closed = {
        f"{name}.{child}"
        for name, parent in model.named_modules()
        if is_closed(parent)
        for child, _ in parent.named_modules()
        if child
    }
    if adapters.targets:
        names = [name for name, _ in model.named_modules() if "." in name]
        found = [n for n in names if any(_matches(n, p) for p in adapters.targets)]
        found = [name for name in found if stage_of(name)[0] == "stages"]
        if inside := sorted(closed & set(found)):
            raise ConfigError(
                f"--adapt-targets: {some_of(inside)} lie inside a layer of torch's own, which "
                "computes with their weights by itself; name other layers"
            )
    else:
        found = [n for n in KINDS[adapters.kind].default_targets(model) if n not in closed]
    return [name for name in found if stage_of(name)[1] >= adapters.first]


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")


@torch.no_grad()
def check_adapters(model: StagedModel, spec: ModelSpec) -> None:
    """Raise ConfigError unless the whole model of `spec` has adapters and each is at work."""
    if (adapters := spec.adapters) is None:
        return
    if adapters.first > spec.exit:
        raise ConfigError(
            f"--adapt-from {adapters.first} of a model of {spec.exit} stages; give 1 to {spec.exit}"
        )
    held = {name: m for name, m in model.named_modules() if name.endswith(f".{ADAPTER}")}
    within = [name for name, _ in model.named_modules() if name.startswith("stages.")]
    layers = [n for n in within if isinstance(model.get_submodule(n), (nn.Linear, *lora.CONVS))]
    for pattern in adapters.targets:
        if not any(_matches(name, pattern) for name in within):
            said = f"--adapt-targets {one_line(pattern)} match no module of the stages"
            raise ConfigError(f"{said}; there are {some_of(layers)}")
    if not held:
        behind = f" from stage {adapters.first} on" if adapters.first > 1 else ""
        raise ConfigError(
            f"--adapt {adapters.kind} finds nothing to adapt in family {spec.family!r}{behind}; "
            "name modules as --adapt-targets, or take another kind; its layers are "
            f"{some_of(layers)}"
        )
    seen: set[str] = set()
    handles = [
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
        for name, module in held.items()
    ]
    was_training = model.training
    try:
        model.eval()(drawn_inputs(spec, 2))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if idle := [name.removesuffix(f".{ADAPTER}") for name in held if name not in seen]:
        raise ConfigError(
            f"--adapt-targets: {some_of(idle)} are never called as modules, so an adapter there "
            "would do nothing; name other layers"
        )


def merge_(model: StagedModel) -> None:
    """Make adapters a part of the weights beside them, where that is the same; others stay."""
    for layer in list(model.modules()):
        adapter = layer._modules.get(ADAPTER)
        kind = next((kind for kind, made in _MADE.items() if isinstance(adapter, made)), None)
        if kind and KINDS[kind].merge(layer):
            layer._forward_hooks.clear()
            for part in (ADAPTER, BASIS):
                layer._modules.pop(part, None)


_MADE: Mapping[str, type[nn.Module]] = {"lora": lora.LoRA, "dema": dema.DeMA, "pq-lora": pq_lora.PQ}


def shared_names(adapters: Adapters | None, names: list[str]) -> list[str]:
    """Of a model's tensors those of adapters whose shape is the same in models of any size."""
    if adapters is None or adapters.kind not in KINDS:
        return []
    ends = tuple(f".{ADAPTER}.{name}" for name in KINDS[adapters.kind].SHARED)
    return [name for name in names if ends and name.endswith(ends)]
