"""Where to cut a module by itself: at about equal operations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models.cutting.recording import Ref, record
from edge_sdk.models.cutting.stages import Cut, Cutter
from edge_sdk.models.flops import FlopCounter

CONTAINERS = (nn.Sequential, nn.ModuleList)
POOLS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)


def auto_cuts(
    module: nn.Module, inputs: Callable[[int], Tensor], count: int, num_classes: int
) -> list[str]:
    """Names of `count` modules to cut behind, the last one before the head begins, the others so
    that each stage has about as many operations. A module that gives another number of outputs than
    num_classes has no head. Blocks are not cut into, unless one has more operations than a stage is
    to have. Raises ConfigError for a module with fewer places."""
    flops = _module_flops(module, inputs(2))
    found: dict[str, float] = {}
    for parts in (count, 4 * count, 16 * count):
        if len(found) < count:

            def is_open(name: str, layer: nn.Module, parts: int = parts) -> bool:
                return type(layer) in CONTAINERS or flops.get(name, 0.0) * parts > flops[""]

            cutter = Cutter(module, record(module, inputs, is_open))
            found = _places(module, cutter, num_classes)
    if len(found) < count:
        names = ", ".join(found) or "none"
        raise ConfigError(
            f"it has {len(found)} places where one tensor passes, expected {count} for as many "
            f"exits ({names}); ask for fewer exits"
        )
    places, spent = list(found), list(found.values())
    chosen: list[int] = []
    for number in range(1, count):
        first = chosen[-1] + 1 if chosen else 0
        free = range(first, len(places) - (count - number))
        goal = spent[-1] * number / count
        chosen.append(min(free, key=lambda place: abs(spent[place] - goal)))
    return [places[place] for place in [*chosen, -1]]


def _places(module: nn.Module, cutter: Cutter, num_classes: int) -> dict[str, float]:
    """Operations up to each place to cut, by its module's name, in the order in which they run, up
    to where the head begins. Of places between which nothing is computed the last; of names of one
    place the shortest."""
    end = cutter.output
    if end is None:
        raise ConfigError("the module returns no tensor; return its outputs first")
    places: dict[Ref, Cut] = {}
    pools = []
    for name in cutter.names():
        with suppress(ConfigError):
            cut = cutter.cut_at(name)
            is_end = cut.ref == end and cut.features.shape[-1] != num_classes
            if not (is_end or cutter.passes_alone(cut.ref, end)):
                continue
            if _is_pool(module.get_submodule(name)):
                pools.append(cut.ref.call)
            elif cut.ref not in places or len(name) < len(places[cut.ref].name):
                places[cut.ref] = cut
    cuts = sorted(places.values(), key=lambda cut: cut.ref.call)
    cuts = [cut for cut in cuts if cut.ref.call < min(pools, default=cut.ref.call + 1)]
    if any(len(cut.features.shape) > 2 for cut in cuts):  # what is but a vector is the head's
        cuts = [cut for cut in cuts if len(cut.features.shape) > 2]
    last_of = {cutter.flops(cut.ref): cut.name for cut in cuts}
    return {name: flops for flops, name in last_of.items() if flops}


def _is_pool(layer: nn.Module) -> bool:
    """Whether a head begins with it: it makes one of all positions."""
    has_weights = any(True for _ in layer.parameters())
    return not has_weights and any(isinstance(each, POOLS) for each in layer.modules())


def _module_flops(module: nn.Module, x: Tensor) -> dict[str, float]:
    """Operations of each module, by name; "" is the whole."""
    found: dict[str, float] = {}
    counter, begun, handles = FlopCounter(), list[float](), []

    def before(*_: object) -> None:
        begun.append(counter.total)

    def after_of(name: str) -> Callable[..., None]:
        def after(*_: object) -> None:
            found[name] = found.get(name, 0.0) + counter.total - begun.pop()

        return after

    training = {layer: layer.training for layer in module.modules()}
    for name, layer in module.named_modules():
        handles.append(layer.register_forward_pre_hook(before))
        handles.append(layer.register_forward_hook(after_of(name)))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), counter:
            module.eval()(x)
    finally:
        for handle in handles:
            handle.remove()
        for layer, was in training.items():
            layer.training = was
    return found
