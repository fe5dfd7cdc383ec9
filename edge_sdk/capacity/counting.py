"""Costs of every segment of a model, counted on a few real steps of very small batches.

What autograd saves for a step and how that grows with the batch is read off steps of 2 and of 4
examples; the bytes of any other batch follow (test_counting.py compares them). A segment is
counted on the model as its job has it, so counting takes less memory than training it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

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
from edge_sdk.capacity.moments import (
    FEW,
    Step,
    forward,
    freeze,
    leaves,
    moments,
    num_bytes,
    saved,
    whole_step,
    widest_bytes,
)
from edge_sdk.capacity.second_model import beside, second_model
from edge_sdk.hardware.speed import torch_threads
from edge_sdk.models import StagedModel, build, family_code
from edge_sdk.models.checking import checked_model, checked_models
from edge_sdk.models.flat import num_weights, parameter_shapes
from edge_sdk.models.flops import FlopCounter
from edge_sdk.models.freezing import begin_training_, num_frozen_stages
from edge_sdk.models.losses import exit_weights
from edge_sdk.models.staged import drawn_inputs
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.plan_tensors import job_specs, update_specs
from edge_sdk.protocol.tensor_lists import is_frozen, trained_names
from edge_sdk.protocol.tensors import specs_of


def segment_costs(
    spec: ModelSpec,
    plan: Plan,
    num_examples: int,
    runtime_bytes: int,
    allowance: float = ALLOWANCE,
    error: float = ERROR,
) -> tuple[SegmentCost, ...]:
    """Costs of the prefixes (1, 1) .. (1, spec.exit), then of the single stages (2, 2), (3, 3) ...

    Of `plan` the batch size, optimizer and loss count, what is frozen, and whether it has more
    epochs than one; its segments do not. runtime_bytes: what a trainer needs before it has a model,
    its data included; allowance, error: of peak memory, as measured on the device (calibration.py).
    Counted on one thread: a few examples are no work for more, which would wait for each other.
    Raises ConfigError where the spec cannot be built."""
    with torch_threads(1):
        costs = in_order(each_cost(spec, plan, num_examples, runtime_bytes))
    return tuple(replace(cost, allowance=allowance, error=error) for cost in costs)


def each_cost(
    spec: ModelSpec, plan: Plan, num_examples: int, runtime_bytes: int
) -> Iterator[SegmentCost]:
    """The costs of each segment, those of shallow models first: counting a deep one may take more
    memory than this device has."""
    with torch.random.fork_rng(devices=[]):
        second = second_model(plan, optimizer_copies(plan))
        for last, model in enumerate(checked_models(spec), 1):
            for first in sorted({1, last}, reverse=True):  # a stage alone takes less
                segment = Segment(first=first, last=last)
                with family_code(spec, "counting its costs", model):
                    model.ready("cpu")
                    cost = _cost(model, spec, segment, plan, num_examples, runtime_bytes)
                yield beside(cost, second)


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
        second = second_model(plan, optimizer_copies(plan))
        for spec in variants:
            model = checked_model(spec)
            whole = Segment(first=1, last=spec.exit)
            with family_code(spec, "counting its costs", model):
                model.ready("cpu")
                cost = _cost(model, spec, whole, plan, num_examples, runtime_bytes, True)
            cost = beside(cost, second)
            yield cost
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
    is_variant: bool = False,
) -> SegmentCost:
    """The costs of one segment. model: of the stages that a job of this segment has."""
    first, last = segment.first, segment.last
    stages, heads = model.stages[first - 1 :], model.exits[first - 1 :]
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    held = parameters | buffers
    own = trained_names(held, [segment])
    named = {n: parameters[n] for n in trained_names(parameters, [segment], plan.frozen)}
    begin = num_frozen_stages(model, segment, plan.frozen)
    travels = replace(plan, segments=(segment,)), specs_of(held), buffers
    is_listed = first == last or is_variant
    batch = max(2, min(plan.batch_size, num_examples))

    begin_training_(model, segment, plan.frozen)
    stages, frozen = stages[begin:], list(model.stages[: first - 1 + begin])
    with FlopCounter() as frozen_flops:
        features, widest = freeze(frozen, drawn_inputs(spec, FEW), max(1, begin))
    step = Step(stages, heads, named, exit_weights(plan, first, last), plan, spec.task)
    whole, again = moments(step, features)
    with FlopCounter() as flops:
        forward(step, features)
    with FlopCounter() as again_flops, torch.no_grad():
        nn.Sequential(*stages[:-1])(features[-1])
    gradient_bytes = num_bytes(named.values())
    brought = job_specs(*travels)
    brought_bytes = sum(spec.num_bytes for spec in brought)
    kept_bytes = sum(spec.num_bytes for spec in brought if is_frozen(spec.name, plan.frozen))
    # Beside weights what is kept is read, c copied; of pruned ones the initial ones are read and
    # copied, those under the mask spread out.
    reads = 2 * plan.correction + int(plan.dyn_alpha > 0) + 3 * bool(plan.prune)
    arriving = reads * gradient_bytes
    # held while pruned weights are trained: the initial values, and a byte of mask for each weight
    pruning_bytes = gradient_bytes + gradient_bytes // 4 if plan.prune else 0
    input_bytes = math.prod(spec.input_shape) * (8 if spec.vocabulary else 4)
    set_aside = math.ceil(plan.holdout * num_examples) * input_bytes
    is_reused = bool(frozen) and plan.epochs > 1  # the features
    # the frozen stages, before anything is saved; their kernels copy weights, too
    reordered = widest_bytes(p for stage in frozen for p in stage.parameters())
    others = [Moment(fixed_bytes=reordered, example_bytes=widest / FEW)]
    if plan.optimizer == "adam":
        others.append(Moment(fixed_bytes=gradient_bytes))  # the root of its second moment
    is_gain = max(m.at(batch, 1) for m in again) < max(m.at(batch, 1) for m in whole)
    cost = SegmentCost(
        first=first,
        last=last,
        parameter_bytes=num_bytes(held.values()),
        load_bytes=_built_bytes(model, replace(spec, exit=last))
        + brought_bytes
        + arriving
        + set_aside,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=optimizer_copies(plan) * gradient_bytes + pruning_bytes,
        moments=(*whole, *others),
        recompute_moments=(*again, *others) if is_gain else None,
        cache_bytes=num_bytes(features) * num_examples // FEW if is_reused else 0,
        runtime_bytes=runtime_bytes,
        batch_size=batch,
        num_layers=len(leaves([*stages, *heads])),
        num_frozen_layers=len(leaves(frozen)),
        flops_per_example=flops.total / FEW,
        frozen_flops_per_example=frozen_flops.total / FEW,
        recompute_flops_per_example=again_flops.total / FEW,
        upload_bytes=sum(spec.num_bytes for spec in update_specs(*travels)),
        download_bytes=brought_bytes - kept_bytes,
        kept_bytes=kept_bytes,
        tensors=specs_of({name: held[name] for name in own}) if is_listed else (),
        buffers=tuple(name for name in own if name in buffers) if is_listed else (),
        num_weights=num_weights(parameter_shapes(model)),
    )
    return _as_planned(cost, plan)


def _built_bytes(model: StagedModel, spec: ModelSpec) -> int:
    """What the model of `spec` takes while it is built: of one that is cut from a module all of
    that, of a low rank also the whole one, whose layers it takes the place of."""
    held = max(num_bytes(model.tensors().values()), model.whole_bytes)
    if spec.rank == 1 or spec.exit == 1:
        return held
    return held + num_bytes(build(replace(spec, rank=1.0)).tensors().values())


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
    most = max(moment.at(len(x), 1) for moment in moments(step, [x[:FEW].clone()])[0])
    gradient_bytes = num_bytes(step.named.values())
    held = num_bytes(model.tensors().values()) + optimizer_copies(plan) * gradient_bytes
    return held, most + gradient_bytes


def autograd_bytes(model: StagedModel, plan: Plan, x: Tensor) -> int:
    """What autograd saves for a step of the whole model on a batch x (B, ...)."""
    return saved(whole_step(model, plan), [x])["all"]
