"""To which group of channels each index of each tensor's axes belongs, found by running a model
once: no family says it.

A layer of torch.nn with weights gives a group of channels (its outputs) and takes those of its
input. What lies between layers (pools, sums, concatenations, flattening, transposes, anything) is
followed by trying it: each function is called again with some channels of its input changed, and
the entries of its output that change with channel c are c's. Channels that are added to each other
are one group: a block and its shortcut are cut alike. Only what a width takes away is followed; a
function that mixes those channels (softmax over them, a product of features) is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edge_sdk.errors import ConfigError
from edge_sdk.models.channel_axes import NO_GROUP, Axis, Integers
from edge_sdk.models.channel_rules import RULES, Rule
from edge_sdk.models.staged import StagedModel


@dataclass(frozen=True)
class Channels:
    """axes: of each tensor that a width makes smaller, by its name, then by the axis; sizes: of
    each group, in the whole and in the narrow model."""

    axes: Mapping[str, Mapping[int, Axis]]
    sizes: Mapping[int, tuple[int, int]]


def trace_channels(model: StagedModel, narrow: Mapping[str, Tensor], x: Tensor) -> Channels:
    """model: the whole one, in eval mode, thrown away after; narrow: the tensors of the narrow one,
    of the same names; x: (B, *input_shape). Raises ConfigError, without the family's name, for what
    cannot be followed."""
    trace = Trace(model, narrow)
    with torch.no_grad(), _Between(trace):
        model(x)
    return trace.found()


class Trace:
    def __init__(self, model: StagedModel, narrow: Mapping[str, Tensor]) -> None:
        self._names: dict[int, str] = {}
        self._cuts: dict[tuple[str, int], tuple[int, int]] = {}  # sizes of axes that get smaller
        self._axes: dict[str, dict[int, Axis]] = {}  # of parameters and buffers
        self._features: dict[int, tuple[Tensor, int, Axis]] = {}  # the tensor, so that its id stays
        self._sizes: list[tuple[int, int]] = []
        self._same_as: list[int] = []  # a group's parent, itself if it is one of its own
        self._at_work: list[str] = []
        self.layers = 0  # that are at work: what happens inside of one is its rule's
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._names[id(tensor)] = name
            for axis, sizes in enumerate(zip(tensor.shape, narrow[name].shape, strict=True)):
                if sizes[0] != sizes[1]:
                    self._cuts[name, axis] = sizes
        for name, module in model.named_modules():
            rule = next((rule for kinds, rule in RULES.items() if isinstance(module, kinds)), None)
            module.register_forward_pre_hook(self._entering(name, rule))
            module.register_forward_hook(self._leaving(rule), with_kwargs=True)
            own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            for tensor in own if rule is None else ():
                self._note_lone(tensor)

    def _entering(self, name: str, rule: Rule | None) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            self._at_work.append(f"{name} ({type(module).__name__})" if name else "the model")
            self.layers += rule is not None

        return enter

    def _leaving(self, rule: Rule | None) -> Callable[..., None]:
        def leave(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if rule is not None and self.layers == 1:  # what layers of a layer do is its rule's
                given = next(_tensors([args, kwargs]))
                made = next(_tensors(output))
                axis, labels = rule(self, module, given)
                if labels is not None:
                    self.label(made, axis % made.ndim, labels)
            self.layers -= rule is not None
            self._at_work.pop()

        return leave

    def _note_lone(self, tensor: Tensor) -> None:
        """A tensor of no known layer: where one axis gets smaller, a group that sums and products
        with features join to theirs."""
        name = self._names[id(tensor)]
        axes = [axis for axis in range(tensor.ndim) if (name, axis) in self._cuts]
        if len(axes) == 1 and (labels := self.gives(tensor, axes[0])):
            self.label(tensor, axes[0], labels)

    def refuse(self, why: str) -> ConfigError:
        where = f" in {self._at_work[-1]}" if self._at_work else ""
        return ConfigError(
            f"which channels a narrower model takes of it cannot be told: {why}{where}; take a "
            "method that cuts by depth, or layers of torch.nn that keep channels apart"
        )

    def label(self, tensor: Tensor, axis: int, labels: Axis) -> None:
        self._features[id(tensor)] = tensor, axis, labels

    def labels_of(self, tensor: Tensor) -> tuple[int, Axis] | None:
        found = self._features.get(id(tensor))
        return None if found is None else found[1:]

    def input_labels(self, x: Tensor, axis: int) -> Axis | None:
        """Those of a layer's input, whose channels lie along `axis`."""
        if (found := self.labels_of(x)) is None:
            return None
        if found[0] != axis % x.ndim:
            raise self.refuse(f"its input has channels along axis {found[0]}, expected {axis}")
        return found[1]

    def gives(self, tensor: Tensor, axis: int, each: int = 1) -> Axis | None:
        """The group that begins with this axis, so many indices in a row of `each` channel; None:
        no width makes it smaller."""
        name = self._names[id(tensor)]
        if (held := self._axes.get(name, {}).get(axis)) is not None:
            return held  # the layer is called again, or another of the same weights was
        if (name, axis) not in self._cuts:
            return None
        size = tensor.shape[axis] // each
        group, small = len(self._sizes), self._cuts[name, axis][1] // each
        self._sizes.append((size, small))
        self._same_as.append(group)
        channels = np.repeat(np.arange(size), each)
        self.holds(tensor, axis, Axis(np.full(len(channels), group), channels))
        return self._axes[name][axis]

    def holds(self, tensor: Tensor | None, axis: int, labels: Axis | None) -> None:
        """The axis of a parameter or buffer has these channels."""
        name = self._names.get(id(tensor), "")
        if tensor is None or labels is None or (name, axis) not in self._cuts:
            return
        if len(labels.groups) != tensor.shape[axis]:
            raise self.refuse(f"{name} has {tensor.shape[axis]} for {len(labels.groups)} channels")
        held = self._axes.setdefault(name, {})
        held[axis] = self.merged(held[axis], labels) if axis in held else labels

    def merged(self, one: Axis, other: Axis) -> Axis:
        """Two axes that are laid upon each other: their groups are the same from now on."""
        is_both = (one.groups != NO_GROUP) & (other.groups != NO_GROUP)
        pairs = zip(one.groups[is_both].tolist(), other.groups[is_both].tolist(), strict=True)
        for first, second in set(pairs):
            a, b = self._root(first), self._root(second)
            if self._sizes[a] != self._sizes[b]:
                sizes = f"{self._sizes[a][0]} and {self._sizes[b][0]}"
                raise self.refuse(f"groups of {sizes} channels are laid upon each other")
            self._same_as[b] = a
        if (one.channels[is_both] != other.channels[is_both]).any():
            raise self.refuse("channels are laid upon each other in another order")
        is_one = one.groups != NO_GROUP
        return Axis(
            np.where(is_one, one.groups, other.groups),
            np.where(is_one, one.channels, other.channels),
        )

    def _root(self, group: int) -> int:
        while self._same_as[group] != group:
            group = self._same_as[group]
        return group

    def follow(
        self,
        call: Callable[[Callable[[Tensor], Tensor]], Any],
        inputs: list[Tensor],
        outputs: list[Tensor],
        what: str,
    ) -> None:
        """Label what a function between layers made. call(change): the function again, with
        `change` of each tensor that it was given."""
        found: list[tuple[int, Axis] | None] = [None] * len(outputs)
        for tensor in inputs:
            axis, labels = self._features[id(tensor)][1:]
            for number, codes in enumerate(_responses(call, self._features, tensor, axis)):
                if (codes < 0).any():
                    raise self.refuse(f"{what} mixes channels")
                if not codes.any():
                    continue
                if (place := _along(codes)) is None:
                    raise self.refuse(f"{what} takes channels one by one or scatters them")
                at, line = place
                chosen = Axis(
                    np.where(line > 0, labels.groups[line - 1], NO_GROUP),
                    np.where(line > 0, labels.channels[line - 1], 0),
                )
                if (before := found[number]) is not None:
                    if before[0] != at:
                        raise self.refuse(f"{what} lays channels across each other")
                    chosen = self.merged(before[1], chosen)
                found[number] = at, chosen
        for tensor, labelled in zip(outputs, found, strict=True):
            if labelled is not None:
                self.label(tensor, *labelled)

    def found(self) -> Channels:
        """Raises ConfigError for an axis that gets smaller and was met by no layer."""
        for name, axis in self._cuts:
            if axis not in self._axes.get(name, {}):
                big, small = self._cuts[name, axis]
                raise self.refuse(f"axis {axis} of {name}, from {big} to {small}, is of no layer")
        roots = [self._root(group) for group in range(len(self._sizes))]
        table = np.array([*roots, NO_GROUP])  # the last is what NO_GROUP, -1, finds
        axes = {
            name: {axis: Axis(table[held.groups], held.channels) for axis, held in each.items()}
            for name, each in self._axes.items()
        }
        return Channels(axes, {root: self._sizes[root] for root in roots})


class _Between(TorchFunctionMode):
    """Passes on each call of a torch function, and has the trace follow those between layers."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self._trace = trace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, trace = kwargs or {}, self._trace
        if trace.layers:
            return func(*args, **kwargs)
        given = {id(t): t for t in _tensors([args, kwargs]) if trace.labels_of(t) is not None}
        what = getattr(func, "__name__", str(func))
        if given and what == "__setitem__":
            raise trace.refuse("a tensor is written in place")
        result = func(*args, **kwargs)
        if given and (made := list(_tensors(result))):

            def call(change: Callable[[Tensor], Tensor]) -> Any:
                return func(*_changed(list(args), change), **_changed(kwargs, change))

            trace.follow(call, list(given.values()), made, what)
        return result


def _responses(
    call: Callable[[Callable[[Tensor], Tensor]], Any],
    labelled: Mapping[int, Any],
    tensor: Tensor,
    axis: int,
) -> list[Integers]:
    """Of each output, by entry: 1 + the index along `axis` of `tensor` that it depends on, 0: on
    none, -1: on several. One call for each bit of the index and for its opposite."""
    size = tensor.shape[axis]
    shape = [size if a == axis else 1 for a in range(tensor.ndim)]
    draws = torch.Generator().manual_seed(0)

    def outputs(is_changed: Integers) -> list[Tensor]:
        def change(given: Tensor) -> Tensor:
            if id(given) not in labelled:
                return given.clone()
            # From 0.1 to 1: between 0 and what a ReLU6 or a sigmoid still tells apart.
            drawn = torch.rand(given.shape, generator=draws.manual_seed(0)) * 0.9 + 0.1
            if given is tensor:
                drawn = drawn + torch.from_numpy(is_changed.astype(np.float32)).reshape(shape)
            return (drawn > 1 if given.dtype == torch.bool else drawn).to(given.dtype)

        return [made.detach().clone() for made in _tensors(call(change))]

    codes = np.arange(1, size + 1)
    before = outputs(np.zeros(size, dtype=np.int64))
    found = [np.zeros(tuple(made.shape), dtype=np.int64) for made in before]
    is_mixed = [np.zeros(tuple(made.shape), dtype=bool) for made in before]
    for bit in range(size.bit_length()):
        ones, zeros = outputs(codes >> bit & 1), outputs(1 - (codes >> bit & 1))
        for number, old in enumerate(before):
            one, zero = (made[number].ne(old).numpy() for made in (ones, zeros))
            found[number] += one.astype(np.int64) << bit
            is_mixed[number] |= one & zero
    return [np.where(mixed, -1, code) for mixed, code in zip(is_mixed, found, strict=True)]


def _along(codes: Integers) -> tuple[int, Integers] | None:
    """The axis along which the codes lie, and the code of each of its indices. None: along none."""
    for axis in range(codes.ndim):
        others = tuple(a for a in range(codes.ndim) if a != axis)
        line = codes.max(axis=others, keepdims=True)
        if len(np.unique(line[line > 0])) > 1 and ((codes == line) | (codes == 0)).all():
            return axis, line.reshape(-1)
    return None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_changed(each, change) for each in value)
    if isinstance(value, dict):
        return {key: _changed(each, change) for key, each in value.items()}
    return value
