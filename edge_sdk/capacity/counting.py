"""Costs of every segment of a model, counted on a few real steps of very small batches.

What autograd saves for a step and how that grows with the batch is read off steps of 2 and of 4
examples; the bytes of any other batch follow (test_counting.py compares them). A segment is
counted on the model as its job has it, so counting takes less memory than training it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from msgspec.structs import replace
from torch import Tensor, nn

from edge_sdk.capacity.costs import (
    ALLOWANCE,
    ERROR,
    Moment,
    SegmentCost,
    in_parts,
    least_bytes,
    recomputing,
)
from edge_sdk.capacity.flops import FlopCounter
from edge_sdk.hardware.speed import torch_threads
from edge_sdk.models import StagedModel, family_code
from edge_sdk.models.checking import checked_model, checked_models
from edge_sdk.models.flat import num_weights, parameter_shapes
from edge_sdk.models.losses import exit_weights, local_loss
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.tensor_lists import needed_names, trained_names
from edge_sdk.protocol.tensors import specs_of

FEW = 2  # examples of the smaller step; BatchNorm wants two
LAST = 0  # instead of a stage's number: what is saved by a segment's last stage, exits and loss


class Step(NamedTuple):
    """What a training step goes through. named: the parameters of stages and heads. weights: of
    the exits."""

    stages: nn.ModuleList
    heads: nn.ModuleList
    named: dict[str, nn.Parameter]
    weights: Sequence[float]
    plan: Plan


def segment_costs(
    spec: ModelSpec,
    plan: Plan,
    num_examples: int,
    runtime_bytes: int,
    allowance: float = ALLOWANCE,
    error: float = ERROR,
) -> tuple[SegmentCost, ...]:
    """Costs of the prefixes (1, 1) .. (1, spec.exit), then of the single stages (2, 2), (3, 3) ...

    Of `plan` the batch size, optimizer and loss count, and whether it has more epochs than one; its
    segments do not. runtime_bytes: what a trainer needs before it has a model, its data included;
    allowance, error: of peak memory, as measured on the device (calibration.py). Counted on one
    thread: a few examples are no work for more, which would wait for each other. Raises ConfigError
    where the spec cannot be built."""
    with torch_threads(1):
        costs = in_order(each_cost(spec, plan, num_examples, runtime_bytes))
    return tuple(replace(cost, allowance=allowance, error=error) for cost in costs)


def each_cost(
    spec: ModelSpec, plan: Plan, num_examples: int, runtime_bytes: int
) -> Iterator[SegmentCost]:
    """The costs of each segment, those of shallow models first: counting a deep one may take more
    memory than this device has."""
    with torch.random.fork_rng(devices=[]):
        for last, model in enumerate(checked_models(spec), 1):
            for first in sorted({1, last}, reverse=True):  # a stage alone takes less
                segment = Segment(first=first, last=last)
                with family_code(spec, "counting its costs", model):
                    model.ready("cpu")
                    cost = _cost(model, spec, segment, plan, num_examples, runtime_bytes)
                yield cost


def each_variant_cost(
    variants: Sequence[ModelSpec],
    plan: Plan,
    num_examples: int,
    runtime_bytes: int,
    memory_bytes: int = 0,
    allowance: float = ALLOWANCE,
) -> Iterator[SegmentCost]:
    """The costs of training each of these models as one segment up to its exit, in their order, and
    no more of them after one that takes more than memory_bytes (0: any) however much is saved:
    those behind it take more still, and counting them would take as much time as memory. allowance:
    see segment_costs."""
    with torch.random.fork_rng(devices=[]):
        for spec in variants:
            model = checked_model(spec)
            whole = Segment(first=1, last=spec.exit)
            with family_code(spec, "counting its costs", model):
                model.ready("cpu")
                cost = _cost(model, spec, whole, plan, num_examples, runtime_bytes)
            yield replace(
                cost,
                tensors=specs_of(model.tensors()),
                num_weights=num_weights(parameter_shapes(model)),
            )
            if memory_bytes and least_bytes(replace(cost, allowance=allowance)) > memory_bytes:
                return


def in_order(costs: Iterable[SegmentCost]) -> list[SegmentCost]:
    return sorted(costs, key=lambda cost: (cost.first > 1, cost.last))


def _cost(
    model: StagedModel,
    spec: ModelSpec,
    segment: Segment,
    plan: Plan,
    num_examples: int,
    runtime_bytes: int,
) -> SegmentCost:
    """The costs of one segment. model: of the stages that a job of this segment has."""
    first, last = segment.first, segment.last
    stages, heads = model.stages[first - 1 :], model.exits[first - 1 :]
    named = dict(nn.ModuleList([stages, heads]).named_parameters())
    held = dict([*model.named_parameters(), *model.named_buffers()])
    needed, trained = needed_names(held, [segment]), trained_names(held, [segment])
    batch = max(2, min(plan.batch_size, num_examples))

    frozen = list(model.stages[: first - 1])
    with FlopCounter() as frozen_flops:
        features, widest = _freeze(frozen, moved(torch.zeros(FEW, *spec.input_shape), "cpu"))
    step = Step(stages, heads, named, exit_weights(plan, first, last), plan)
    whole, again = moments(step, features)
    with FlopCounter() as flops:
        _forward(step, features)
    with FlopCounter() as again_flops, torch.no_grad():
        nn.Sequential(*stages[:-1])(features)
    gradient_bytes = num_bytes(named.values())
    download_bytes = num_bytes(held[name] for name in needed)
    is_reused = bool(frozen) and plan.epochs > 1  # the features
    # the frozen stages, before anything is saved; their kernels copy weights, too
    reordered = widest_bytes(p for stage in frozen for p in stage.parameters())
    beside = [Moment(fixed_bytes=reordered, example_bytes=widest / FEW)]
    if plan.optimizer == "adam":
        beside.append(Moment(fixed_bytes=gradient_bytes))  # the root of its second moment
    is_gain = max(m.at(batch, 1) for m in again) < max(m.at(batch, 1) for m in whole)
    cost = SegmentCost(
        first=first,
        last=last,
        parameter_bytes=num_bytes(held.values()),
        load_bytes=num_bytes(held.values()) + download_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=optimizer_copies(plan) * gradient_bytes,
        moments=(*whole, *beside),
        recompute_moments=(*again, *beside) if is_gain else None,
        cache_bytes=num_bytes([features]) * num_examples // FEW if is_reused else 0,
        runtime_bytes=runtime_bytes,
        batch_size=batch,
        num_layers=len(leaves([*stages, *heads])),
        num_frozen_layers=len(leaves(frozen)),
        flops_per_example=flops.total / FEW,
        frozen_flops_per_example=frozen_flops.total / FEW,
        recompute_flops_per_example=again_flops.total / FEW,
        upload_bytes=num_bytes(held[name] for name in trained),
        download_bytes=download_bytes,
        tensors=specs_of({name: held[name] for name in trained}) if first == last else (),
    )
    return _as_planned(cost, plan)


def _as_planned(cost: SegmentCost, plan: Plan) -> SegmentCost:
    """The costs with the levers that the coordinator's plan sets for every device."""
    if plan.recompute and cost.recompute_moments is not None:
        cost = recomputing(cost)
    return in_parts(cost, plan.micro_batch) if 0 < plan.micro_batch < cost.batch_size else cost


def optimizer_copies(plan: Plan) -> int:
    """Copies of the trained parameters that the optimizer and the plan's terms hold: FedProx's
    received ones; SCAFFOLD's received ones and its two control variates; FedDyn's received ones and
    its gradient."""
    state = 2 if plan.optimizer == "adam" else int(plan.momentum > 0)
    return state + int(plan.prox_mu > 0) + 3 * plan.correction + 2 * int(plan.dyn_alpha > 0)


def of_whole_step(model: StagedModel, plan: Plan, x: Tensor) -> tuple[int, int]:
    """Bytes that training the whole model on batches like x (B, ...) holds from its second step on,
    and what a step takes beside: activations, gradients, a kernel's copy of one weight."""
    step = whole_step(model, plan)
    most = max(moment.at(len(x), 1) for moment in moments(step, x[:FEW].clone())[0])
    gradient_bytes = num_bytes(step.named.values())
    held = num_bytes(model.tensors().values()) + optimizer_copies(plan) * gradient_bytes
    return held, most + gradient_bytes


def autograd_bytes(model: StagedModel, plan: Plan, x: Tensor) -> int:
    """What autograd saves for a step of the whole model on a batch x (B, ...)."""
    return _saved(whole_step(model, plan), x)["all"]


def whole_step(model: StagedModel, plan: Plan) -> Step:
    named = dict(model.named_parameters())
    weights = exit_weights(plan, 1, len(model.stages))
    return Step(model.stages, model.exits, named, weights, plan)


def widest_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the largest tensor: a kernel reorders one weight at a time into a copy."""
    return max((num_bytes([tensor]) for tensor in tensors), default=0)


def leaves(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers of the modules: those that hold no other modules."""
    return [m for module in modules for m in module.modules() if not list(m.children())]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def _freeze(frozen: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, int]:
    """Features after the frozen stages, and the most bytes that one of their layers has in hand:
    its input and its output."""
    if not frozen:
        return x, 0
    widest = 0

    def look(_: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        nonlocal widest
        outputs = output if isinstance(output, tuple) else (output,)  # an LSTM: also its state
        held = (tensor for tensor in (*inputs, *outputs) if isinstance(tensor, Tensor))
        widest = max(widest, num_bytes(held))

    chain = nn.Sequential(*frozen).eval()
    handles = [leaf.register_forward_hook(look) for leaf in leaves(frozen)]
    features: Tensor = chain(x)
    for handle in handles:
        handle.remove()
    return features, widest


def moments(step: Step, features: Tensor) -> tuple[list[Moment], list[Moment]]:
    """The moments of a backward pass, one for each stage, from the last to the first; and the same
    where stages are run again. features: (FEW, ...), what the first of the stages takes. How bytes
    grow with the batch is seen in steps of FEW examples and of twice as many."""
    stages, heads = step.stages, step.heads
    few = _saved(step, features)
    twice = _saved(step, moved(torch.cat([features, features]), "cpu"))
    order = [LAST, *range(len(stages) - 1, 0, -1)]
    largest = [widest_bytes([*stages[-1].parameters(), *heads.parameters()])]
    largest += [widest_bytes(stages[number - 1].parameters()) for number in order[1:]]

    def growing(bytes_of: Callable[[Counter[str], int], int]) -> list[Moment]:
        found = []
        for number, weight_bytes in zip(order, largest, strict=True):
            grown = bytes_of(twice, number) - bytes_of(few, number)
            fixed, each = bytes_of(few, number) - grown, grown / FEW
            found.append(Moment(fixed_bytes=fixed, example_bytes=each, weight_bytes=weight_bytes))
        return found

    return growing(_whole), growing(_again)


def _whole(sizes: Counter[str], number: int) -> int:
    """A stage's backward pass makes a gradient as large as the stage's largest activation, when
    what later stages saved is gone."""
    later = 0
    if number != LAST:
        later = sizes[f"{LAST}"] + sum(sizes[f"{n}"] for n in range(number + 1, sizes["stages"]))
    return sizes["all"] - later + sizes[f"widest {number}"]


def _again(sizes: Counter[str], number: int) -> int:
    """What a stage that is run again holds: its own, its input, the inputs of the stages before."""
    up_to = sizes["stages"] if number == LAST else number
    inputs = sum(sizes[f"input {n}"] for n in range(1, up_to + 1))
    return inputs + sizes[f"{number}"] + sizes[f"widest {number}"]


def _saved(step: Step, features: Tensor) -> Counter[str]:
    """Bytes that autograd saves in one step, every storage once and the parameters not at all:
    "all"; by stage (LAST for all that follows) what is saved beside the stages' inputs, a stage's
    own output, made a second time, included; its "widest" tensor; each stage's "input". And how
    many "stages" there are."""
    storages: dict[int, tuple[int, int]] = {}  # address: bytes, and the stage that saved them
    own = {parameter.untyped_storage()._cdata for parameter in step.named.values()}
    inputs: list[torch.UntypedStorage] = []
    where = LAST

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages.setdefault(storage._cdata, (storage.nbytes(), where))
        # The graph keeps it, so no other storage takes this address. Detached, as a node that saves
        # its own output would never be freed.
        return tensor.detach()

    def enter(number: int, given: Tensor) -> None:
        nonlocal where
        where = number if number < len(step.stages) else LAST
        if number:
            inputs.append(given.untyped_storage())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _forward(step, features, enter)
    sizes = Counter(stages=len(step.stages), all=sum(size for size, _ in storages.values()))
    sizes.update({f"input {n}": storage.nbytes() for n, storage in enumerate(inputs, 1)})
    input_addresses = {storage._cdata for storage in inputs}
    for address, (size, stage) in storages.items():
        if address not in input_addresses or (
            stage != LAST and address != inputs[stage - 1]._cdata
        ):
            sizes[f"{stage}"] += size
            sizes[f"widest {stage}"] = max(sizes[f"widest {stage}"], size)
    del loss  # the graph, which kept the storages alive
    return sizes


def _forward(
    step: Step,
    features: Tensor,
    enter: Callable[[int, Tensor], None] = lambda number, features: None,
) -> Tensor:
    """A step's loss. enter: called before a stage with its number from 1, after it with LAST."""
    stages, heads, _, weights, plan = step
    labels = torch.zeros(len(features), dtype=torch.int64)
    logits = []
    for number, (stage, head) in enumerate(zip(stages, heads, strict=True), 1):
        enter(number, features)
        features = stage.train()(features)
        enter(LAST, features)
        with torch.set_grad_enabled(bool(weights[number - 1]) or plan.distill != "none"):
            logits.append(head.train()(features))  # of weight 0: no backward pass
    return local_loss(logits, labels, weights, plan)
