"""Costs of every segment of a model, counted on torch's meta device: shapes without memory.

The saved activations that this counts equal the real ones byte for byte (tests/test_costs.py), but
for LSTM layers, where they are an upper bound (lstm_cost.py).
Counting takes 2 s and leaves 75 MB behind: BatchNorm on the meta device and FlopCounterMode both
import torch._dynamo. A process that goes on to train uses `segment_costs_apart`, which counts in a
forked child; a fresh process instead would hold another 230 MB of torch beside the trainer's.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence

import msgspec
import psutil
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edge_sdk.capacity import SegmentCost, in_parts, recomputing
from edge_sdk.errors import CapacityError, ConfigError
from edge_sdk.losses import exit_weights, local_loss
from edge_sdk.models import StagedModel, build
from edge_sdk.models.lstm_cost import count_as_fused
from edge_sdk.models.staged import needed_names, trained_names
from edge_sdk.wire import ModelSpec, Plan, Segment

LAST = 0  # instead of a stage's number: what is saved by a segment's last stage, exits and loss


def segment_costs(
    spec: ModelSpec, plan: Plan, num_examples: int, runtime_bytes: int
) -> tuple[SegmentCost, ...]:
    """Costs of the prefixes (1, 1) .. (1, spec.exit), then of the single stages (2, 2), (3, 3) ...

    Of `plan` the batch size, optimizer and loss count, and whether it has more epochs than one; its
    segments do not.
    runtime_bytes: `warm_resident_bytes` of a trainer, plus the bytes of its data.
    Raises ConfigError where the spec cannot be built."""
    with torch.device("meta"):
        model = build(spec)
    count_as_fused(model)
    segments = [Segment(first=1, last=e) for e in range(1, spec.exit + 1)]
    segments += [Segment(first=s, last=s) for s in range(2, spec.exit + 1)]
    return tuple(_cost(model, spec, g, plan, num_examples, runtime_bytes) for g in segments)


def segment_costs_apart(
    spec: ModelSpec, plan: Plan, num_examples: int, runtime_bytes: int
) -> tuple[SegmentCost, ...]:
    """`segment_costs`, counted in a forked child, so that this process stays as small as it is.

    Families registered here are known there. The child runs no kernel, hence needs none of the
    threads that a fork loses. With CUDA autograd's threads forbid it: such boards have the memory
    to count here. Raises ConfigError for a spec that cannot be built, and CapacityError if the
    child was killed."""
    if torch.cuda.is_available() or not hasattr(os, "fork"):
        return segment_costs(spec, plan, num_examples, runtime_bytes)
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: fork beside torch's threads
        child = os.fork()
    if child == 0:
        os.close(reader)
        _count_and_exit(writer, spec, plan, num_examples, runtime_bytes)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        reply = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        raise CapacityError(
            f"counting the model's costs was killed by signal {-status}, likely for memory; it "
            "needs about 75 MB: free some or raise the limit"
        )
    if status > 0:
        raise ConfigError(f"costs of model {spec.family!r} cannot be counted: {reply.decode()}")
    return msgspec.msgpack.decode(reply, type=tuple[SegmentCost, ...])


def _count_and_exit(
    writer: int, spec: ModelSpec, plan: Plan, num_examples: int, runtime_bytes: int
) -> None:
    """The child: nothing may return into the parent's code, hence os._exit whatever happens."""
    status = 1
    try:
        try:
            costs = segment_costs(spec, plan, num_examples, runtime_bytes)
            reply, status = msgspec.msgpack.encode(costs), 0
        except Exception as error:  # a user's family may raise anything
            reply = str(error).encode() or repr(error).encode()
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(reply)
    finally:
        os._exit(status)


def _cost(
    model: StagedModel,
    spec: ModelSpec,
    segment: Segment,
    plan: Plan,
    num_examples: int,
    runtime_bytes: int,
) -> SegmentCost:
    first, last = segment.first, segment.last
    stages, heads = model.stages[first - 1 : last], model.exits[first - 1 : last]
    named = dict(nn.ModuleList([stages, heads]).named_parameters())
    held = StagedModel(list(model.stages[:last]), list(model.exits[:last])).tensors()
    needed, trained = needed_names(held, [segment]), trained_names(held, [segment])
    batch = max(2, min(plan.batch_size, num_examples))
    x = torch.empty(batch, *spec.input_shape, device="meta")

    frozen = list(model.stages[: first - 1])
    with FlopCounterMode(display=False) as frozen_flops:
        features, widest = _freeze(frozen, x)
    weights = exit_weights(plan, first, last)
    with FlopCounterMode(display=False) as flops:
        saved = _step(stages, heads, named, features, weights, plan)
    with FlopCounterMode(display=False) as again_flops, torch.no_grad():
        nn.Sequential(*stages[:-1])(features)
    twice_as_many = features.new_empty(2 * batch, *features.shape[1:])
    double = _step(stages, heads, named, twice_as_many, weights, plan)
    gradient_bytes = num_bytes(named.values())
    download_bytes = num_bytes(held[name] for name in needed)
    is_reused = bool(frozen) and plan.epochs > 1  # the features
    reordered_bytes = max((num_bytes([w]) for w in named.values()), default=0)  # by a kernel, one
    cost = SegmentCost(
        first=first,
        last=last,
        parameter_bytes=num_bytes(held.values()) + reordered_bytes,
        load_bytes=num_bytes(held.values()) + download_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=optimizer_copies(plan) * gradient_bytes,
        saved_bytes=saved[0],
        fixed_bytes=max(0, 2 * saved[0] - double[0]),
        recompute_saved_bytes=saved[1] if saved[1] < saved[0] else None,
        recompute_fixed_bytes=max(0, 2 * saved[1] - double[1]),
        frozen_bytes=widest,
        cache_bytes=num_bytes([features]) * num_examples // batch if is_reused else 0,
        runtime_bytes=runtime_bytes,
        batch_size=batch,
        num_layers=len(leaves([*stages, *heads])),
        num_frozen_layers=len(leaves(frozen)),
        flops_per_example=flops.get_total_flops() / batch,
        frozen_flops_per_example=frozen_flops.get_total_flops() / batch,
        recompute_flops_per_example=again_flops.get_total_flops() / batch,
        upload_bytes=num_bytes(held[name] for name in trained),
        download_bytes=download_bytes,
    )
    return _as_planned(cost, plan)


def _as_planned(cost: SegmentCost, plan: Plan) -> SegmentCost:
    """With the levers that the coordinator's plan sets for every device."""
    if plan.recompute and cost.recompute_saved_bytes is not None:
        cost = recomputing(cost)
    return in_parts(cost, plan.micro_batch) if 0 < plan.micro_batch < cost.batch_size else cost


def warm_resident_bytes() -> int:
    """Resident memory of this process after one tiny job, trained by the real trainer.

    The first steps load kernels and start threads: 27 MB more than the imports, whatever the model
    (torch 2.13, x86). Call it once the data is loaded."""
    from edge_sdk.data import Examples
    from edge_sdk.trainer import train  # which imports models: here, not above

    spec = ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=2, exit=2)
    segments = (Segment(first=1, last=1), Segment(first=2, last=2))
    x, y = torch.zeros(8, *spec.input_shape), torch.arange(8) % 2
    plan = Plan(segments=segments, batch_size=4)
    train(spec, plan, build(spec).tensors(), Examples(x.numpy(), y.numpy(), 2))
    return int(psutil.Process().memory_info().rss)


def optimizer_copies(plan: Plan) -> int:
    """Copies of the trained parameters that the optimizer and the proximal term hold.

    Adam: two moments and, during its step, the square root of the second."""
    state = 3 if plan.optimizer == "adam" else int(plan.momentum > 0)
    return state + int(plan.prox_mu > 0)


def leaves(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers: modules that hold no others."""
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


def _step(
    stages: nn.ModuleList,
    heads: nn.ModuleList,
    named: dict[str, nn.Parameter],
    features: Tensor,
    weights: Sequence[float],
    plan: Plan,
) -> tuple[int, int]:
    """One training step without the update. Returns the bytes that autograd saves for it, every
    storage once and the parameters not at all; and those where all stages but the last are run
    again: the stages' inputs, and the most that the last, or one that runs again, holds."""
    storages: dict[int, tuple[int, int]] = {}  # address: bytes, and the stage that saved them
    own = {parameter.untyped_storage()._cdata for parameter in named.values()}
    inputs: list[torch.UntypedStorage] = []
    where = LAST

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages.setdefault(storage._cdata, (storage.nbytes(), where))
        return tensor  # the graph keeps it, so no other storage takes this address

    labels = torch.zeros(len(features), dtype=torch.int64, device=features.device)
    anchor = {name: weight.detach().clone() for name, weight in named.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = []
        for number, (stage, head) in enumerate(zip(stages, heads, strict=True), 1):
            inputs.append(features.untyped_storage())
            where = number if number < len(stages) else LAST
            features = stage.train()(features)
            where = LAST
            logits.append(head.train()(features))
        loss = local_loss(logits, labels, weights, plan, named, anchor)
    loss.backward()
    for parameter in named.values():
        parameter.grad = None
    return sum(size for size, _ in storages.values()), _recomputed(storages, inputs)


def _recomputed(
    storages: Mapping[int, tuple[int, int]], inputs: Sequence[torch.UntypedStorage]
) -> int:
    kept = {storage._cdata: storage.nbytes() for storage in inputs}
    held: dict[
        int, int
    ] = {}  # beside those: bytes by stage, its output included, made a second time
    for address, (size, stage) in storages.items():
        if address not in kept or (stage != LAST and address != inputs[stage - 1]._cdata):
            held[stage] = held.get(stage, 0) + size
    return sum(kept.values()) + max(held.values(), default=0)
