"""Whether a family of a person's own can be trained at all, tried before the first round.

Each depth is built, gives logits for a few inputs in eval and in training mode, and takes one
training step; a shallower model must be a cut of a deeper one, with the same tensors and, loaded
with them once trained, the same logits. Of the families of this package the contract suite knows
that; they are only built (trying would add 0.2 s to a start with resnet18, and find nothing)."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgspec
import torch
from msgspec.structs import replace
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.helpers.files import sha256_of
from edge_sdk.models import build, family_code, find_family
from edge_sdk.models.adapters.attach import check_adapters
from edge_sdk.models.own_code import place_of
from edge_sdk.models.staged import StagedModel, drawn_inputs
from edge_sdk.models.structure import named_tensors
from edge_sdk.protocol.messages import ModelSpec, Specs
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import specs_of
from edge_sdk.tasks.metrics import METRICS
from edge_sdk.tasks.table import task_of

log = logging.getLogger(__name__)
TRAINED, EVALUATED = 2, 3  # examples; two sizes and single ones, so that no size may be built in
LR = 0.01
SEED = 0  # of what is drawn here; exit e is built from seed e
CLOSE = 1e-4  # of the largest logit
ALIKE = 1e-2  # the same, of another batch size: half precision inside sums in another order


class _Known(NamedTuple):
    """A model as it was after its training step. buffers: copies."""

    model: StagedModel
    buffers: dict[str, Tensor]
    logits: list[Tensor]  # in eval mode, of three examples, one per exit

    def tensors(self) -> dict[str, Tensor]:
        return self.model.tensors() | self.buffers


def check_family(spec: ModelSpec) -> None:
    """Raise ConfigError, which names the family and the place, unless `spec` can be trained. Draws
    nothing from the global generator."""
    with torch.random.fork_rng(devices=[]):
        checked_model(spec)


def checked_model(spec: ModelSpec) -> StagedModel:
    """The model of this spec alone; of a person's own family all its cuts are tried as well. See
    checked_models."""
    if find_family(spec.family).is_built_in:
        model = build(spec)
    else:
        model = deque(checked_models(spec), maxlen=1)[0]
    if model.doubt:
        log.warning("family %r: %s", spec.family, model.doubt)
    with family_code(spec, "trying its adapters", model):
        check_adapters(model, spec)
    return model


def checked_models(spec: ModelSpec) -> Iterator[StagedModel]:
    """The models of exits 1 .. spec.exit, each built by its own and, of a person's own family,
    tried when it is asked for. Seeds the global generator. Raises ConfigError as check_family."""
    depths = range(1, spec.exit + 1)
    if find_family(spec.family).is_built_in:
        yield from (build(replace(spec, exit=exit)) for exit in depths)
        return
    known: _Known | None = None
    drawn: dict[str, str] = {}
    for exit in depths:
        part = replace(spec, exit=exit)
        torch.manual_seed(exit)
        model = build(part)
        with _naming(spec):
            drawn = _digests(model) if exit == spec.exit else {}
            _tried(model, part, known)
            _train_step(model, part)
            known = _known(model, part)
        yield model
    torch.manual_seed(spec.exit)
    with _naming(spec):
        again = build(spec)
        if known is not None:
            _check_new(again, known.model)
        if name := _differing(drawn, _digests(again)):
            raise ConfigError(
                f"{name} differs between two builds from one seed; draw it from torch's global "
                "generator, so that a run can be repeated"
            )
    torch.manual_seed(SEED)
    with _naming(spec):
        _tried(build(spec), spec, known)
    is_softmax = METRICS[spec.task].measures[0] == "softmax"
    if known is not None and is_softmax and all(map(_is_softmax, known.logits)):
        log.warning(
            "family %r: its exits give probabilities (each row sums to 1), expected logits: the "
            "loss takes their softmax, so it learns slowly; leave softmax out",
            spec.family,
        )


def _is_softmax(found: Tensor) -> bool:
    rows = found.sum(-1)
    return bool((found >= 0).all()) and torch.allclose(rows, torch.ones_like(rows), atol=CLOSE)


@contextmanager
def _naming(spec: ModelSpec) -> Iterator[None]:
    """A ConfigError in here names the family, and where it is built."""
    try:
        yield
    except ConfigError as error:
        name = f"family {spec.family!r}"
        if name in str(error):
            raise
        place = place_of(find_family(spec.family).build)
        raise ConfigError(f"{name}: {error} (built by {place})") from error


def _digests(model: StagedModel) -> dict[str, str]:
    return {name: sha256_of(t.numpy().tobytes()) for name, t in model.tensors().items()}


@torch.no_grad()
def _logits(model: StagedModel, spec: ModelSpec) -> list[Tensor]:
    """Those of eval mode, one (3, K) per exit; the same again, and for each example alone."""
    x = drawn_inputs(spec, EVALUATED, SEED)
    logits = _eval_logits(model, spec, x, SEED)
    for exit, (one, other) in enumerate(
        zip(logits, _eval_logits(model, spec, x, SEED + 1), strict=True), 1
    ):
        if not _is_close(one, other):
            raise ConfigError(
                f"exit {exit} gives other logits in eval mode when asked again; give "
                "functional.dropout training=self.training (or use nn.Dropout), and keep nothing "
                "between calls"
            )
    singles = [_eval_logits(model, spec, one, SEED) for one in x.split(1)]
    for exit, (together, alone) in enumerate(zip(logits, zip(*singles, strict=True), strict=True)):
        if not _is_close(together, torch.cat(alone), ALIKE):
            raise ConfigError(
                f"exit {exit + 1}: the logits of an example depend on the others in its batch, in "
                "eval mode; the first axis is the examples (batch_first=True, BatchNorm with its "
                "running statistics, no mean over axis 0)"
            )
    return logits


def _eval_logits(model: StagedModel, spec: ModelSpec, x: Tensor, seed: int) -> list[Tensor]:
    """seed: of layers that draw in eval mode, too."""
    torch.manual_seed(seed)
    logits, features = [], x
    for exit, (stage, head) in enumerate(zip(model.eval().stages, model.exits, strict=True), 1):
        with family_code(spec, "the model", model):
            features = _unchanged(stage, features, f"stage {exit}")
            found = _unchanged(head, features, f"exit {exit}")
        _check_logits(found, len(x), spec, exit)
        logits.append(found)
    return logits


def _unchanged(module: nn.Module, given: Any, what: str) -> Any:
    """What `module` makes of `given`. Raises ConfigError if it writes into that: the data set, or
    what an exit has used, or the next stage will."""
    if not isinstance(given, Tensor):
        return module(given)
    version, before = given._version, given.detach().clone()
    made = module(given)
    if given._version != version or not torch.equal(given.detach(), before):
        raise ConfigError(
            f"{what} changes its input in place, which others use too; work on a new tensor "
            "(nn.ReLU() without inplace, x - a instead of x.sub_(a), x = x + y instead of x += y)"
        )
    return made


def _is_close(one: Tensor, other: Tensor, share: float = CLOSE) -> bool:
    return torch.allclose(one, other, rtol=0, atol=share * max(1e-3, float(one.abs().max())))


def _tried(model: StagedModel, spec: ModelSpec, known: _Known | None) -> None:
    """A model in eval mode, with the tensors of `known`: the trained model of an exit less, or the
    same one built before."""
    _check_travels(model)
    held = model.tensors()
    if known is not None:
        _check_new(model, known.model)
        _check_cut(known.tensors(), held, len(known.model.stages), spec.exit)
    with family_code(spec, "loading the model's tensors"):
        model.load(held if known is None else held | known.tensors())
        model.ready("cpu")
    logits = _logits(model, spec)
    for exit, (old, new) in enumerate(zip(known.logits if known else (), logits, strict=False), 1):
        if not _is_close(old, new):
            raise ConfigError(
                f"exit {exit} gives other logits from the same tensors in another model of the "
                "family; all that it computes with, and all that training changes, must be "
                "parameters or buffers (register_buffer) and must not depend on depth"
            )


def _known(model: StagedModel, spec: ModelSpec) -> _Known:
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    return _Known(model, buffers, _logits(model, spec))


def _check_new(model: StagedModel, before: StagedModel) -> None:
    """Training one model would change the other."""
    places = {_address(tensor) for _, tensor in named_tensors(before)}
    for name, tensor in named_tensors(model):
        if tensor.numel() and _address(tensor) in places:
            raise ConfigError(
                f"{name} is a tensor of the model that was built before; make new layers in every "
                "call of build (copy.deepcopy of what was made once)"
            )


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _check_travels(model: StagedModel) -> None:
    try:
        msgspec.convert(msgspec.to_builtins(specs_of(model.tensors())), Specs)
    except msgspec.ValidationError as error:
        raise ConfigError(f"its tensors cannot travel: {error}; see docs/protocol.md") from error
    for name, tensor in model.tensors().items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ConfigError(
                f"{name} holds NaN or infinite values, which do not travel; use a large finite "
                "number (-1e9 in a mask), or make it in forward instead of keeping it as a buffer"
            )


def _check_logits(found: object, count: int, spec: ModelSpec, exit: int) -> None:
    shape = (count, *task_of(spec.task).output_shape(spec))
    words = ", ".join(["examples", *["places"] * (len(shape) - 2), METRICS[spec.task].outputs])
    wanted = f"expected finite torch.float32 {shape}: ({words})"
    if not isinstance(found, Tensor):
        raise ConfigError(f"exit {exit} gives {_kind(found)}, {wanted}")
    if tuple(found.shape) != shape or found.dtype != torch.float32:
        raise ConfigError(f"exit {exit} gives {found.dtype} {tuple(found.shape)}, {wanted}")
    if not bool(torch.isfinite(found).all()):
        raise ConfigError(f"exit {exit} gives NaN or infinite logits from the start, {wanted}")


def _check_cut(before: dict[str, Tensor], held: dict[str, Tensor], last: int, exits: int) -> None:
    """before: the tensors of the model of `last` exits; held: of that of `exits`."""
    part = {name: tensor for name, tensor in held.items() if stage_of(name)[1] <= last}
    shapes, others = (
        {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in tensors.items()}
        for tensors in (before, part)
    )
    if name := _differing(shapes, others):
        raise ConfigError(
            f"{name} depends on depth: {shapes.get(name, 'missing')} in the model of {last} exits, "
            f"{others.get(name, 'missing')} in that of {exits}; a device builds only the exits "
            "that it can train, with the same tensors"
        )


def _differing(before: dict[str, str], now: dict[str, str]) -> str | None:
    """The first name whose values differ."""
    return next((n for n in [*before, *now] if before.get(n) != now.get(n)), None)


def _train_step(model: StagedModel, spec: ModelSpec) -> None:
    """A backward pass of each stage with its exit, over the features of those before, and then a
    step by all exits together."""
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    task = task_of(spec.task)
    labels = torch.from_numpy(task.some_labels((TRAINED, *task.output_shape(spec))))
    x, model = drawn_inputs(spec, TRAINED, SEED), model.train()
    features = x
    for exit, (stage, head) in enumerate(zip(model.stages, model.exits, strict=True), 1):
        with family_code(spec, f"stage {exit} or its exit", model):
            features = _unchanged(stage, features.detach(), f"stage {exit}")
            logits = _unchanged(head, features, f"exit {exit}")
        _check_features(features, exit)
        _check_logits(logits, TRAINED, spec, exit)
        loss = task.loss(logits, labels)
        _check_own_leaves(loss, exit, names)
        with family_code(spec, f"the backward pass of exit {exit}", model):
            if loss.requires_grad:
                loss.backward()
        _check_reached(stage, head, exit)
        model.zero_grad(set_to_none=True)
    with family_code(spec, "the backward pass of all exits", model):
        torch.stack([task.loss(z, labels) for z in model(x)]).sum().backward()
    # BatchNorm over two examples of one position gives gradients of 1e5 in a mobilenet_v3_small.
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.SGD(model.parameters(), LR).step()
    model.zero_grad(set_to_none=True)


def _check_features(features: object, exit: int) -> None:
    if not isinstance(features, Tensor) or features.shape[:1] != (TRAINED,):
        wanted = f"expected a tensor ({TRAINED}, ...) for the next stage and the exit"
        raise ConfigError(f"stage {exit} gives {_kind(features)}, {wanted}")


def _check_own_leaves(loss: Tensor, exit: int, names: dict[int, str]) -> None:
    """What the loss is differentiated by is of this stage or exit."""
    for leaf in _leaves(loss):
        name = names.get(id(leaf))
        if name is None:
            raise ConfigError(
                f"stage {exit} or its exit trains a tensor {tuple(leaf.shape)} that is no "
                "parameter of the model, so it would not be sent; keep layers as attributes or in "
                "an nn.ModuleList, not in a list"
            )
        if stage_of(name)[1] != exit:
            raise ConfigError(
                f"stage {exit} or its exit computes with {name}; stages know each other only by "
                "their features"
            )


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    seen, waiting = set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            yield leaf
        waiting += [before for before, _ in node.next_functions]


def _check_reached(stage: nn.Module, head: nn.Module, exit: int) -> None:
    parameters = list(itertools.chain(stage.parameters(), head.parameters()))
    if any(p.grad is not None for p in parameters):
        return
    if any(p.requires_grad for p in parameters):
        why = "no gradient reaches them; look for detach, no_grad, argmax, .data"
    else:
        why = "none requires a gradient; leave those of the exit trainable (requires_grad)"
    raise ConfigError(f"no parameter of stage {exit} or its exit is trained: {why}")


def _kind(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
