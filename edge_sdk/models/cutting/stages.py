"""Stages of a recording: what is computed between two cuts, as torch.fx GraphModules that hold the
layers of the module under their own names, and those of no other stage."""

from __future__ import annotations

import copy
import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models.cutting.recording import (
    INPUT,
    BatchSize,
    Call,
    Device,
    Made,
    Mode,
    Recording,
    Ref,
)

MODE, CONSTANT = "is_training", "constant_"  # names in a stage that are not the module's


@dataclass(frozen=True)
class Cut:
    """After which module, by name, and what passes there."""

    name: str
    ref: Ref
    features: Made


class Training(nn.Module):
    """Whether its stage is trained."""

    def forward(self) -> bool:
        return self.training


class Cutter:
    """Cuts one recording of one module."""

    def __init__(self, module: nn.Module, recording: Recording) -> None:
        self._module, self._recording = module, recording
        self._calls = recording.calls
        self._is_of_input: list[bool] = []
        for call in self._calls:
            before = [self._is_of_input[ref.call] for ref in call.refs()]
            self._is_of_input.append(call.kind == "placeholder" or any(before))
        self._free: dict[int, bool] = {}  # calls whose values do not depend on the input after all

    def cut_at(self, name: str) -> Cut:
        """Raises ConfigError for a module that gives no features, or more than once."""
        found = self._recording.outputs.get(name, [])
        if len(found) != 1:
            times = f"runs {len(found)} times" if found else "is never run, or gives no tensor"
            raise ConfigError(f"cut {name!r} {times}; {self._nearest(name)}")
        cut = Cut(name, found[0], self.made(found[0]))
        if not self._is_of_input[found[0].call] or cut.features.shape[:1] != (2,):
            raise ConfigError(
                f"cut {name!r} gives {cut.features.shape} for 2 examples, expected examples on the "
                f"first axis (batch_first=True); {self._nearest(name)}"
            )
        return cut

    def names(self) -> list[str]:
        """Of the modules that were run, the whole one left out."""
        return [name for name in self._recording.outputs if name]

    def _nearest(self, name: str) -> str:
        return nearest(name, [other for other in self.names() if other != name])

    def made(self, ref: Ref) -> Made:
        """Its shape and type."""
        return self._calls[ref.call].made[ref.path]

    @property
    def input(self) -> Made:
        return self._calls[INPUT].made[()]

    @cached_property
    def output(self) -> Ref | None:
        """What the whole module gives."""
        return next(iter(self._recording.outputs.get("", ())), None)

    def ancestors(self, ref: Ref) -> set[int]:
        """Calls that are needed for it, with its own."""
        found: set[int] = set()
        waiting = [ref.call]
        while waiting:
            number = waiting.pop()
            if number not in found:
                found.add(number)
                waiting += [before.call for before in self._calls[number].refs()]
        return found

    def flops(self, ref: Ref) -> float:
        """Operations up to here, forward, for one example."""
        return sum(self._calls[number].flops for number in self.ancestors(ref)) / 2

    def passes_alone(self, ref: Ref, end: Ref) -> bool:
        """Whether all that `end` needs of what comes before `ref` is `ref`."""
        before = self.ancestors(ref)
        if end.call in before or ref.call not in self.ancestors(end):
            return False
        try:
            self._needed(end, ref, before)
        except ConfigError:
            return False
        return True

    def stages(self, cuts: Sequence[Cut], head: Ref | None) -> list[fx.GraphModule]:
        """The stages that end at these cuts, and if `head` is given, one more from the last cut to
        it. Raises ConfigError for cuts in another order than they are computed, for what passes a
        cut besides the features, and for layers that two stages use."""
        ends = [cut.ref for cut in cuts] + ([head] if head else [])
        names = [cut.name for cut in cuts] + ["the end"]
        start, before = Ref(INPUT), {INPUT}
        users: dict[str, str] = {}
        made = []
        for number, end in enumerate(ends):
            here = self.ancestors(end)
            if start.call not in here or (number and end == start):
                raise ConfigError(
                    f"cut {names[number]!r} does not follow {names[number - 1]!r}: name the cuts "
                    "in the order in which they are run"
                )
            needed = self._needed(end, start, before, names[number - 1] if number else "")
            made.append(self._graph(end, start, needed, users))
            start, before = end, here
        return made

    def _needed(self, end: Ref, start: Ref, before: set[int], cut: str = "") -> set[int]:
        """Calls from `start` to `end`. Raises ConfigError for one that takes what a call in
        `before` made, other than `start`."""
        needed: set[int] = set()
        waiting = [(end, "")]
        while waiting:
            ref, user = waiting.pop()
            if ref == start or ref.call in needed:
                continue
            number, call = ref.call, self._calls[ref.call]
            if self._is_of_input[number] and number in before and not self._is_free(number, start):
                raise ConfigError(
                    f"{user} uses what {call.place} gives, past the cut {cut!r}: a skip connection "
                    "across a cut, where one tensor must pass; cut before the one or behind the "
                    "other"
                )
            needed.add(number)
            for each in call.refs():
                if number in before and self._is_of_input[number] and self._is_of_input[each.call]:
                    continue  # a free call: it takes the features for what it took
                waiting.append((each, call.place))
        return needed

    def _is_free(self, number: int, start: Ref) -> bool:
        """Whether a call gives the same whatever the input holds: positions, for example, that a
        layer computes with a look at the features' type."""
        call, features = self._calls[number], self.made(start)
        of_input = [ref for ref in call.refs() if self._is_of_input[ref.call]]
        if call.kind not in ("call_module", "call_function", "call_method"):
            return False
        if any(self.made(ref) != features for ref in of_input):
            return False
        if number not in self._free:
            self._free[number] = self._gives_the_same(call)
        return self._free[number]

    @torch.no_grad()
    def _gives_the_same(self, call: Call) -> bool:
        try:
            draws = torch.Generator().manual_seed(0)
            values = []
            for _ in range(2):
                value = self._value(call, draws)
                values.append([self._at(value, path) for path in call.made])
            return all(torch.equal(a, b) for a, b in zip(*values, strict=True))
        except Exception:  # what cannot be run alone is taken to depend on its input
            return False

    def _value(self, call: Call, draws: torch.Generator) -> Any:
        """What a call gives, with something drawn for what depends on the input."""

        def of(ref: Ref) -> Tensor:
            if not self._is_of_input[ref.call]:
                return self._at(self._value(self._calls[ref.call], draws), ref.path)
            made = self.made(ref)
            return torch.randint(0, 2, made.shape, generator=draws).to(made.dtype)

        about: dict[type, Any] = {
            BatchSize: lambda size: 2 * size.factor,
            Mode: lambda _: False,
            Device: lambda _: torch.device("cpu"),
        }
        args, kwargs = _filled((call.args, call.kwargs), of, about)
        if call.kind == "get_attr":
            return _attribute(self._module, call.target)
        if call.kind == "constant":
            return call.target
        if call.kind == "call_module":
            return self._module.get_submodule(call.target)(*args, **kwargs)
        if call.kind == "call_method":
            return getattr(args[0], call.target)(*args[1:], **kwargs)
        return call.target(*args, **kwargs)

    @staticmethod
    def _at(value: Any, path: tuple[Any, ...]) -> Tensor:
        for key in path:
            value = value[key]
        assert isinstance(value, Tensor)
        return value

    def _graph(
        self, end: Ref, start: Ref, needed: Iterable[int], users: dict[str, str]
    ) -> fx.GraphModule:
        """users: what has used each parameter or layer with parameters so far, by its name."""
        graph, root = fx.Graph(), dict[str, Any]()
        x = graph.placeholder("x")
        nodes: dict[int, fx.Node] = {}

        def node(ref: Ref) -> fx.Node:
            if ref == start or ref.call not in nodes:
                return x
            found = nodes[ref.call]
            for key in ref.path:
                found = graph.call_function(operator.getitem, (found, key))
            return found

        def sized(size: BatchSize) -> Any:
            count = graph.call_method("size", (x, 0))
            return graph.call_function(operator.mul, (count, size.factor))

        def mode(_: Mode) -> Any:
            root[MODE] = Training()
            return graph.call_module(MODE)

        about = {
            BatchSize: sized,
            Mode: mode,
            Device: lambda _: graph.call_function(getattr, (x, "device")),
        }
        for number in sorted(needed):
            call = self._calls[number]
            target = call.target
            if call.kind == "constant":
                target = f"{CONSTANT}{number}"
                root[target] = call.target.clone()
            elif call.kind in ("get_attr", "call_module"):
                root[target] = self._own(call, users)
            args, kwargs = _filled((call.args, call.kwargs), node, about)
            kind = "get_attr" if call.kind == "constant" else call.kind
            nodes[number] = graph.create_node(kind, target, args, kwargs)
        graph.output(node(end))
        return fx.GraphModule(root, graph, "Stage")

    def _own(self, call: Call, users: dict[str, str]) -> Any:
        """The layer, parameter or buffer of a call for one stage; a copy of what other stages have,
        too, unless it is trained. Raises ConfigError where it is."""
        name = call.target
        if call.kind == "get_attr":
            held = _attribute(self._module, name)
            is_trained = isinstance(held, nn.Parameter)
        else:
            held = self._module.get_submodule(name)
            is_trained = any(True for _ in held.parameters())
        if name not in users:
            users[name] = call.place
            return held
        if is_trained:
            raise ConfigError(
                f"{call.place} is used before and behind a cut, and each stage is trained by other "
                "devices; give each its own (copy.deepcopy), or cut elsewhere"
            )
        return copy.deepcopy(held)


def nearest(name: str, names: Sequence[str]) -> str:
    """What a person may have meant, as the end of a message."""
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5) or list(names[:5])
    return f"nearest: {', '.join(close)}"


def _attribute(module: nn.Module, name: str) -> Any:
    path, _, own = name.rpartition(".")
    return getattr(module.get_submodule(path), own)


def _filled(value: Any, node: Any, about: Mapping[type, Any]) -> Any:
    """The arguments of a call with nodes for references, and for what stands for a number."""
    if isinstance(value, Ref):
        return node(value)
    if (make := about.get(type(value))) is not None:
        return make(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_filled(each, node, about) for each in value)
    if isinstance(value, dict):
        return {key: _filled(each, node, about) for key, each in value.items()}
    if isinstance(value, slice):
        return slice(*(_filled(v, node, about) for v in (value.start, value.stop, value.step)))
    return value
