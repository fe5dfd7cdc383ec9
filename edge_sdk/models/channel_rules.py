"""How layers of torch.nn and of ours hand channels on: of each, which axes of its weights have the
channels of its input, and which begin a group of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from edge_sdk.models.attention import Attention
from edge_sdk.models.channel_axes import Axis, joined

if TYPE_CHECKING:
    from edge_sdk.models.channels import Trace

# Of the trace, the layer and its input: the axis of its output's channels, and which they are.
Rule: TypeAlias = "Callable[[Trace, Any, Tensor], tuple[int, Axis | None]]"


def _product(takes: int, gives: int, axis: int) -> Rule:
    """Convolutions and linear layers: the axes of the weight, and that of the features."""

    def rule(trace: Trace, layer: Any, x: Tensor) -> tuple[int, Axis | None]:
        labels, groups = trace.input_labels(x, axis), getattr(layer, "groups", 1)
        if groups > 1 and groups == layer.in_channels == layer.out_channels:
            return _channelwise(axis)(trace, layer, x)
        given = trace.gives(layer.weight, gives)
        if groups > 1 and (labels is not None or given is not None):
            raise trace.refuse(f"a convolution of {groups} groups")
        trace.holds(layer.weight, takes, labels)
        trace.holds(layer.bias, 0, given)
        return axis, given

    return rule


def _channelwise(axis: int) -> Rule:
    """Normalisations, depthwise convolutions: what comes in goes out, each tensor has its
    channels."""

    def rule(trace: Trace, layer: Any, x: Tensor) -> tuple[int, Axis | None]:
        labels = trace.input_labels(x, axis)
        for tensor in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]:
            trace.holds(tensor, 0, labels)
        return axis, labels

    return rule


def _recurrent(trace: Trace, layer: Any, x: Tensor) -> tuple[int, Axis | None]:
    """Gates one below the other on axis 0, (gates * hidden, inputs); both directions side by side.
    Of what it returns only the sequence is followed."""
    if getattr(layer, "proj_size", 0):
        raise trace.refuse("a recurrent layer with a projection")
    labels = trace.input_labels(x, -1)
    ends = ("", "_reverse") if layer.bidirectional else ("",)
    for number in range(layer.num_layers):
        outputs = []
        for end in ends:
            of: list[Any] = [getattr(layer, f"{kind}_l{number}{end}", None) for kind in RECURRENT]
            trace.holds(of[0], 1, labels)
            if hidden := trace.gives(of[1], 1):
                for tensor in of:
                    trace.holds(tensor, 0, joined([hidden] * (len(of[1]) // len(hidden.groups))))
                outputs.append(hidden)
        labels = joined(outputs) if outputs else None
    return -1, labels


def _attention(trace: Trace, layer: Attention, x: Tensor) -> tuple[int, Axis | None]:
    """One channel is what goes together: a head of keys and values with all that share it."""
    labels, heads = trace.input_labels(x, -1), layer.heads
    units: Axis | None = None
    for part in (layer.k, layer.v, layer.q):
        first, last = _ends(part)
        trace.holds(first.weight, 1, labels)
        if first is not last:  # factors
            trace.holds(last.weight, 1, trace.gives(first.weight, 0))
        if units is None:
            units = trace.gives(last.weight, 0, heads.size)
        held = None if units is None else _spread(units, last.weight.shape[0])
        trace.holds(last.weight, 0, held)
        trace.holds(last.bias, 0, held)
    first, last = _ends(layer.o)
    trace.holds(first.weight, 1, held)
    made = trace.gives(last.weight, 0)
    if first is not last:
        trace.holds(last.weight, 1, trace.gives(first.weight, 0))
    trace.holds(last.bias, 0, made)
    return -1, made


def _ends(layer: Any) -> tuple[Any, Any]:
    """The linear layers that take the input and give the output: of factors two."""
    return (layer[0], layer[-1]) if isinstance(layer, nn.Sequential) else (layer, layer)


def _spread(units: Axis, size: int) -> Axis:
    """The same channels, each with as many more indices as an axis of `size` has."""
    times = size // len(units.groups)
    return Axis(np.repeat(units.groups, times), np.repeat(units.channels, times))


RECURRENT = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
RULES: dict[Any, Rule] = {
    (nn.Conv1d, nn.Conv2d, nn.Conv3d): _product(1, 0, 1),
    (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d): _product(0, 1, 1),
    nn.Linear: _product(1, 0, -1),
    (_NormBase, nn.GroupNorm, nn.PReLU): _channelwise(1),
    nn.LayerNorm: _channelwise(-1),
    nn.RNNBase: _recurrent,
    Attention: _attention,
}
