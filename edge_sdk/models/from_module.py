"""Any torch module as a multi-exit model, cut by the names of its own modules:

    model = from_module(resnet18(num_classes=10), ["layer1", "layer2", "layer3", "layer4"],
                        input_shape=(3, 32, 32), num_classes=10)

Behind each cut stands an exit; stage e is what the module computes between two cuts. Its tensors
keep their names: `stages.1.layer2.0.conv1.weight` is the module's `layer2.0.conv1.weight`. What
follows the last cut is the last exit, if it gives the outputs that are asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase

from edge_sdk.errors import ConfigError
from edge_sdk.models.cutting.auto import auto_cuts
from edge_sdk.models.cutting.heads import MakeExit, channel_axes, exit_for
from edge_sdk.models.cutting.recording import record
from edge_sdk.models.cutting.stages import CONSTANT, Cut, Cutter, nearest
from edge_sdk.models.staged import StagedModel
from edge_sdk.models.structure import check_structure

MATRICES = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase)


def from_module(
    module: nn.Module,
    cuts: Sequence[str] | str,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    exits: str | MakeExit = "pool-linear",
    exit: int | None = None,
    keep_head: bool = True,
    vocabulary: int = 0,
    task: str = "classify",
) -> StagedModel:
    """The stages and exits of a module, which is used up.

    cuts: names of modules, shallow first, or "auto:N" for N of them at about equal operations.
    exits: "pool-linear", of a sequence of tokens also "class-token" or "last-token", or a function
    from the shape of the features, without the examples, and the number of outputs to a module.
    exit: how many exits, those of all cuts by default: a family's `build` gives spec.exit.
    keep_head: whether what follows the last cut is the last exit, where its outputs fit.
    vocabulary: above 0 where the input is ids. Raises ConfigError for cuts that do not exist, or
    that a skip connection passes, and for what cannot be followed."""

    whole_bytes = sum(t.nbytes for t in [*module.parameters(), *module.buffers()])

    def inputs(count: int) -> Tensor:
        if vocabulary:
            return torch.zeros(count, *input_shape, dtype=torch.int64)
        return torch.rand(count, *input_shape, generator=torch.Generator().manual_seed(count))

    names = named_cuts(module, cuts, inputs, num_classes)
    opened = {name[:end] for name in names for end, sign in enumerate(name) if sign == "."}

    def is_open(name: str, _: nn.Module) -> bool:
        return name in opened

    cutter = Cutter(module, record(module, inputs, is_open))
    cuts_there = [cutter.cut_at(name) for name in names]
    kept = len(names) if exit is None else exit
    if not 1 <= kept <= len(names):
        raise ConfigError(f"{kept} exits of {len(names)} cuts, expected 1 to {len(names)}")
    last, shallow = cuts_there[-1], cuts_there[:kept]
    is_asked = keep_head and kept == len(names) and _gives(cutter, last, num_classes, task)
    is_own = is_asked and _follows(cutter, last)
    parts = cutter.stages(shallow, cutter.output if is_own else None)
    for part, given in zip(parts, [cutter.input, *(c.features for c in shallow)], strict=False):
        _drop_counters_(part)
        if given.is_written:
            _leave_input_(part)
    heads: list[nn.Module] = []
    axes = channel_axes(module, inputs(2), is_open, shallow)
    for cut, axis in zip(shallow, axes, strict=True):
        if is_own and cut is last:
            heads.append(parts[-1])
        elif callable(exits):
            heads.append(exits(cut.features.shape[1:], num_classes))
        else:
            heads.append(exit_for(cut, axis, exits, num_classes, task))
    stages = parts[:kept]
    model = StagedModel(stages, heads, main_weights=_matrices(stages))
    model.cuts = tuple(names)
    model.whole_bytes = whole_bytes
    if is_asked and not is_own:
        model.doubt = (
            f"the module's own last layers use more than what passes the cut {last.name!r}, so the "
            "last exit is a new one; cut elsewhere, or say keep_head=False"
        )
    check_structure(model, kept)
    return model


def module_names(model: StagedModel) -> dict[str, str]:
    """By the name of a tensor of a model that from_module made, its name in that module: what a
    family registers as `names`, so that weights of the module can be read."""
    return {
        f"{kind}.{number}.{name}": name
        for kind, parts in (("stages", model.stages), ("exits", model.exits))
        for number, part in enumerate(parts)
        if isinstance(part, fx.GraphModule)
        for name in part.state_dict()
        if not name.startswith(CONSTANT)
    }


def named_cuts(
    module: nn.Module,
    cuts: Sequence[str] | str,
    inputs: Callable[[int], Tensor],
    num_classes: int,
) -> list[str]:
    """The names in `cuts`, which may ask for any. Raises ConfigError for one that is no module's,
    with the nearest, and for one that stands there twice."""
    if isinstance(cuts, str):
        found = re.fullmatch(r"auto:([1-9]\d{0,2})", cuts)
        if found:
            return auto_cuts(module, inputs, int(found[1]), num_classes)
        raise ConfigError(f'cuts {cuts!r}, expected names of modules, or "auto:4" for 4 exits')
    known = [name for name, _ in module.named_modules() if name]
    for name in cuts:
        if name not in known:
            raise ConfigError(f"cut {name!r}: there is no such module; {nearest(name, known)}")
    if not cuts or len(set(cuts)) < len(cuts):
        raise ConfigError(f"cuts {', '.join(cuts) or '()'}, expected names of different modules")
    return list(cuts)


def _gives(cutter: Cutter, last: Cut, num_classes: int, task: str) -> bool:
    """Whether the module gives the outputs of the last exit."""
    positions = last.features.shape[1:-1] if task == "tokens" else ()
    wanted, end = (2, *positions, num_classes), cutter.output
    return end is not None and cutter.made(end).shape == wanted


def _follows(cutter: Cutter, last: Cut) -> bool:
    """Whether what the module gives is made of what passes the last cut alone."""
    end = cutter.output
    return end is not None and (end == last.ref or cutter.passes_alone(last.ref, end))


def _leave_input_(part: nn.Module) -> None:
    """Have the activations of a part whose input is written into work on tensors of their own: an
    exit and the next stage share it."""
    for layer in part.modules():
        if getattr(layer, "inplace", None) is True:
            layer.inplace = False  # type: ignore[assignment]


def _drop_counters_(part: nn.Module) -> None:
    """BatchNorm with a fixed momentum counts its batches for nobody, and an integer has no mean
    over clients."""
    for layer in part.modules():
        if isinstance(layer, _NormBase) and layer.momentum is not None:
            layer.num_batches_tracked = None


def _matrices(stages: Sequence[nn.Module]) -> list[str]:
    """Weights of convolutions, linear and recurrent layers: no embeddings, no positions."""
    return [
        f"stages.{number}.{path}.{name}"
        for number, stage in enumerate(stages)
        for path, layer in stage.named_modules()
        if isinstance(layer, MATRICES)
        for name, weight in layer.named_parameters(recurse=False)
        if weight.ndim >= 2
    ]
