"""What a module does, written down while it runs: the calls of its layers and the torch functions
between them, each with where its arguments come from.

torch.fx would trace the same, but not code that branches on its arguments, as that of most
transformers does; here the code simply runs. Written down twice, for 2 examples in eval mode and
for 3 in training mode, the numbers that differ tell what is the batch size and what the mode. The
meta device, which computes nothing, would take longer: its kernels are Python, and import
torch._dynamo (a mobilenet_v3_small at 32 x 32: 7 s instead of 0.1 s)."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edge_sdk.errors import ConfigError
from edge_sdk.models.flops import FlopCounter

Path: TypeAlias = tuple[Any, ...]  # keys into what a call returned; () is that itself
# What reads the values of a tensor into Python, where a path may depend on them.
READS = {"__bool__", "item", "__int__", "__float__", "__index__", "tolist", "numpy", "nonzero"}
CONSTANTS = (int, float, str, complex, torch.dtype, torch.memory_format, torch.layout, torch.device)
INPUT = 0  # the call that stands for the input


@dataclass(frozen=True)
class Ref:
    """A tensor that call number `call` returned, at `path`."""

    call: int
    path: Path = ()


@dataclass(frozen=True)
class BatchSize:
    """A number that is `factor` times the number of examples."""

    factor: int


@dataclass(frozen=True)
class Mode:
    """A bool that is `training` of the module."""


@dataclass(frozen=True)
class Device:
    """Where the input lies."""


@dataclass
class Made:
    """A tensor that a call returned. shape: that of the first recording. is_written: what came
    later has written into it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_written: bool = field(default=False, compare=False)


@dataclass
class Call:
    """kind: as in torch.fx, or "constant" for a tensor that came from nowhere, which is `target`.
    place: for people. flops: of its forward pass, for the examples of the recording."""

    kind: str
    target: Any
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    place: str = ""
    made: dict[Path, Made] = field(default_factory=dict)
    flops: float = 0.0

    def refs(self) -> list[Ref]:
        """What it takes."""
        return list(refs_in((self.args, self.kwargs)))


@dataclass
class Recording:
    """calls in their order, the input first. outputs: of each module that was run outside of a
    layer, by name, the first tensor that it returned at each of its runs; "" is the module itself.
    """

    calls: list[Call]
    outputs: dict[str, list[Ref]]


def record(
    module: nn.Module, inputs: Callable[[int], Tensor], is_open: Callable[[str, nn.Module], bool]
) -> Recording:
    """inputs: from a number of examples to that many, (B, *input_shape). is_open: whether a module,
    by its name, is looked into, or is one call. Draws nothing from the global generator and leaves
    the module as it was. Raises ConfigError for what cannot be followed, and what the module's own
    code raises."""
    one = record_once(module, inputs(2), is_open, is_training=False)
    return unified(one, record_once(module, inputs(3), is_open, is_training=True))


def record_once(
    module: nn.Module,
    x: Tensor,
    is_open: Callable[[str, nn.Module], bool],
    *,
    is_training: bool = False,
) -> Recording:
    """What the module does with x, in one mode."""
    was_training = {each: each.training for each in module.modules()}
    try:
        return _Recorder(module.train(is_training), x, is_open).run()
    finally:
        for each, training in was_training.items():
            each.training = training


class _Recorder(TorchFunctionMode):
    def __init__(
        self, module: nn.Module, x: Tensor, is_open: Callable[[str, nn.Module], bool]
    ) -> None:
        super().__init__()
        self._module, self._is_open, self._x = module, is_open, x
        # Without gradients, and buffers as copies, as BatchNorm writes into them.
        self._tensors = {name: p.detach() for name, p in module.named_parameters()}
        self._tensors |= {name: buffer.clone() for name, buffer in module.named_buffers()}
        self._names = {id(tensor): name for name, tensor in self._tensors.items()}
        # By id: the tensor, so that its id stays, where it is from, its version then.
        self._known: dict[int, tuple[Tensor, Ref, int]] = {}
        self._stale: set[int] = set()
        self._depends: list[bool] = []  # of each call: on the input
        self._flops = FlopCounter()
        self._is_autocast = torch.is_autocast_enabled()
        self._inside = 0  # layers that are at work
        self._at_work: list[str] = []
        self.found = Recording([], {})
        self._add(Call("placeholder", "x", place="the input"), self._x)

    def run(self) -> Recording:
        # Whoever builds the model may do so without gradients; whether the module turns them off
        # by itself is another matter.
        with self._hooked(), torch.random.fork_rng([]), torch.enable_grad(), self._flops, self:
            torch.func.functional_call(self._module, self._tensors, (self._x,))
        for key in self._known:
            self._note_version(key)
        return self.found

    @contextmanager
    def _hooked(self) -> Iterator[None]:
        handles = []
        for name, module in self._module.named_modules():
            open_ = name == "" or self._is_open(name, module)
            before, after = self._opened(name, module) if open_ else self._layer(name, module)
            handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _opened(self, name: str, module: nn.Module) -> tuple[Any, Any]:
        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._at_work.append(described(name, module))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._at_work.pop()
            if not self._inside:
                with torch._C.DisableTorchFunction():
                    self._note_output(name, output)

        return before, after

    def _layer(self, name: str, module: nn.Module) -> tuple[Any, Any]:
        begun: list[tuple[Call, float]] = []

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            with torch._C.DisableTorchFunction():
                if not self._inside:
                    given = self._symbolic(args), self._symbolic(kwargs)
                    call = Call("call_module", name, *given, described(name, module))
                    begun.append((call, self._flops.total))
            self._inside += 1

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inside -= 1
            if self._inside:
                return
            call, flops = begun.pop()
            call.flops = self._flops.total - flops
            with torch._C.DisableTorchFunction():
                self._add(call, output)
                self._note_output(name, output)

        return before, after

    def _note_output(self, name: str, output: Any) -> None:
        first = next((tensor for _, tensor in tensors_in(output)), None)
        if first is not None and id(first) in self._known:
            self.found.outputs.setdefault(name, []).append(self._known[id(first)][1])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        given = [tensor for _, tensor in tensors_in([args, kwargs])]
        if name in READS and any(self._is_of_input(tensor) for tensor in given):
            raise self._refused(f"what it does depends on the values of a tensor ({name})")
        versions = [tensor._version for tensor in given]
        flops = self._flops.total
        result = func(*args, **kwargs)
        changed = [t for t, version in zip(given, versions, strict=True) if t._version != version]
        if name == "__setitem__":
            result = args[0]
        made = [tensor for _, tensor in tensors_in(result)]
        if changed and not made:
            raise self._refused(f"{name} writes into a tensor")
        if made:
            call = self._call(func, name, args, kwargs)
            call.flops = self._flops.total - flops
            self._note_written(changed, made)
            self._add(call, result)
        return result

    def _call(self, func: Any, name: str, args: Any, kwargs: Any) -> Call:
        place = f"{name.strip('_')} in {self._at_work[-1] if self._at_work else 'the module'}"
        given, named = self._symbolic(args), self._symbolic(kwargs)
        if name == "__get__":  # a property of the tensor
            what = func.__self__.__name__
            return Call("call_function", getattr, (given[0], what), {}, f"{what} {place[4:]}")
        if name in REPLACED:
            return Call("call_function", REPLACED[name], given, named, place)
        if getattr(torch.Tensor, name, None) is func:
            return Call("call_method", name, given, named, place)
        return Call("call_function", func, given, named, place)

    def _note_written(self, changed: list[Tensor], made: list[Tensor]) -> None:
        """What shares memory with a tensor that was written in place, and is not what came out of
        that, must not be used any more."""
        new = {id(tensor) for tensor in made}
        self._stale -= new
        roots = {id(_root(tensor)) for tensor in changed}
        for key, (tensor, *_) in self._known.items() if roots else ():
            if key not in new and id(_root(tensor)) in roots:
                self._stale.add(key)

    def _symbolic(self, value: Any) -> Any:
        """The same with references in the place of tensors."""
        if isinstance(value, Tensor):
            return self._ref(value)
        if isinstance(value, torch.device):
            return Device()
        if value is None or value is Ellipsis or isinstance(value, CONSTANTS):
            return value
        if isinstance(value, slice):
            parts = map(self._symbolic, (value.start, value.stop, value.step))
            return slice(*parts)
        if isinstance(value, (tuple, list)):
            items = [self._symbolic(each) for each in value]
            return items if type(value) is list else tuple(items)
        if isinstance(value, Mapping):
            return {key: self._symbolic(each) for key, each in value.items()}
        raise self._refused(f"an argument is a {type(value).__name__}")

    def _ref(self, tensor: Tensor) -> Ref:
        if id(tensor) in self._stale:
            raise self._refused("a tensor is used after another view of it was written in place")
        if (known := self._known.get(id(tensor))) is not None:
            return known[1]
        if (name := self._names.get(id(tensor))) is not None:
            return self._add(Call("get_attr", name, place=name), tensor)
        return self._add(Call("constant", tensor.detach().clone(), place="a constant"), tensor)

    def _is_of_input(self, tensor: Tensor) -> bool:
        known = self._known.get(id(tensor))
        return known is not None and self._depends[known[1].call]

    def _add(self, call: Call, output: Any) -> Ref:
        if call.kind in ("call_module", "call_function", "call_method") and (
            not torch.is_grad_enabled() or torch.is_autocast_enabled() != self._is_autocast
        ):
            what = "under autocast" if torch.is_grad_enabled() else "without gradients"
            raise self._refused(f"{call.place} runs {what}, which a cut module would not")
        number = len(self.found.calls)
        self.found.calls.append(call)
        before = [self._depends[ref.call] for ref in call.refs()]
        self._depends.append(call.kind == "placeholder" or any(before))
        for path, tensor in tensors_in(output):
            call.made[path] = Made(tuple(tensor.shape), tensor.dtype)
            self._note_version(id(tensor))  # it may be known already, and come back written into
            self._known[id(tensor)] = tensor, Ref(number, path), tensor._version
        return Ref(number)

    def _note_version(self, key: int) -> None:
        if key in self._known:
            tensor, ref, version = self._known[key]
            self.found.calls[ref.call].made[ref.path].is_written |= tensor._version != version

    def _refused(self, why: str) -> ConfigError:
        where = f" in {self._at_work[-1]}" if self._at_work else ""
        return ConfigError(
            f"it cannot be cut: {why}{where}; cut outside of that module, or write the stages as "
            "a family of your own (docs/extending.md)"
        )


def written(tensor: Tensor, place: Any, value: Any) -> Tensor:
    """tensor[place] = value, in place."""
    tensor[place] = value
    return tensor


REPLACED: dict[str, Any] = {"__setitem__": written, "__getitem__": operator.getitem}


def _root(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def described(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """The tensors in tuples, lists and mappings, and the keys that lead to each."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (tuple, list)):
        for key, each in enumerate(value):
            yield from tensors_in(each, (*path, key))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from tensors_in(each, (*path, key))


def refs_in(value: Any) -> Iterator[Ref]:
    if isinstance(value, Ref):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from refs_in(each)
    elif isinstance(value, dict):
        yield from refs_in(list(value.values()))
    elif isinstance(value, slice):
        yield from refs_in([value.start, value.stop, value.step])


def unified(one: Recording, other: Recording) -> Recording:
    """One recording of two: of 2 examples in eval mode, of 3 in training mode. Raises ConfigError
    where they differ in more than batch size and mode."""
    for mine, yours in zip(one.calls, other.calls, strict=False):
        if mine.kind != yours.kind or not _is_same(mine.target, yours.target):
            raise ConfigError(
                f"it cannot be cut: in training it does other things ({yours.place}) than else "
                f"({mine.place}), or with another number of examples; take layers whose own "
                "forward does that"
            )
        mine.args = _unified(mine.args, yours.args, mine.place)
        mine.kwargs = _unified(mine.kwargs, yours.kwargs, mine.place)
    if len(one.calls) != len(other.calls):
        raise ConfigError("it cannot be cut: in training it does other things than else")
    return one


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    return bool(one == other)


def _unified(one: Any, other: Any, place: str) -> Any:
    if isinstance(one, bool) and isinstance(other, bool) and (one, other) == (False, True):
        return Mode()
    if type(one) is not type(other):
        pass
    elif isinstance(one, (tuple, list)) and len(one) == len(other):
        return type(one)(_unified(a, b, place) for a, b in zip(one, other, strict=True))
    elif isinstance(one, dict) and one.keys() == other.keys():
        return {key: _unified(one[key], other[key], place) for key in one}
    elif isinstance(one, slice):
        keys = ("start", "stop", "step")
        return slice(*(_unified(getattr(one, k), getattr(other, k), place) for k in keys))
    elif one == other:
        return one
    elif isinstance(one, int) and one % 2 == 0 and other == one // 2 * 3:
        return BatchSize(one // 2)
    raise ConfigError(
        f"it cannot be cut: {place} takes {one!r} for 2 examples and {other!r} for 3, which is no "
        "multiple of their number; write sizes as -1 or x.shape[0]"
    )
