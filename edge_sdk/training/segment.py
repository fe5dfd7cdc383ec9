"""One segment of a job: its batches, steps and figures. There is no other training loop.

Stages before the first that is trained, because it begins deeper or because they are frozen, run
once: what they make of every example is kept over the epochs where there is memory for it.

Two fields of the plan save memory. micro_batch: a batch goes through in parts of about equal size,
whose gradients add up to the batch's; BatchNorm sees the parts. recompute: of all stages but a
segment's last only the input is kept, and the stage runs again when its gradient is wanted: the
same update bit by bit, for at most a third more operations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from edge_sdk.data.examples import MIN_BATCH
from edge_sdk.errors import ConfigError, TrainerError
from edge_sdk.models import family_code
from edge_sdk.models.freezing import begin_training_, num_frozen_stages
from edge_sdk.models.losses import exit_weights, joint_exit_loss
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import ExitResult, Plan, Segment
from edge_sdk.protocol.tensor_lists import trained_names
from edge_sdk.tasks.table import task_of
from edge_sdk.training.augmenting import Augment
from edge_sdk.training.checkpointing import recomputed
from edge_sdk.training.optim import Optimizer
from edge_sdk.training.tally import Tally
from edge_sdk.training.terms.base import Batch, Context, Term, Trained

log = logging.getLogger(__name__)
Inputs: TypeAlias = Callable[[Tensor], list[Tensor]]  # see Trained


class Cancelled(TrainerError):
    """The coordinator no longer wants this job."""

    code = "cancelled"


def train_segment(
    context: Context, segment: Segment, terms: Term, inputs: Inputs
) -> tuple[int, list[ExitResult]]:
    """Train one segment in place. Returns the number of steps and the last epoch's exit results,
    whose losses are those of the plain logits, without what the plan's terms add."""
    plan, model, y = context.plan, context.model, context.labels
    task = context.spec.task
    trained = parts_of(context, segment, inputs)
    first, last = segment.first, segment.last
    weights = exit_weights(plan, first, last)
    optimizer = Optimizer(list(trained.named.values()), plan)
    begin_training_(model, segment, plan.frozen)
    terms.begin_(trained)
    order = torch.Generator().manual_seed(plan.seed)
    num_steps = 0
    for _ in range(plan.epochs):
        tallies = [Tally(task) for _ in range(first, last + 1)]
        for batch in batches(len(y), plan.batch_size, order):
            whole = task_of(task).weight(y[batch])
            for part in parts(batch, plan.micro_batch):
                if context.should_stop():
                    raise Cancelled(f"training of segment ({first}, {last}) cancelled")
                with family_code(context.spec, "training", model):
                    features, labels = inputs(part), y[part].to(context.device)
                    logits = forward(trained, features, plan.recompute)
                    adjusted = [terms.adjusted(z) for z in logits]
                    loss = joint_exit_loss(adjusted, labels, weights, task)
                    loss = terms.loss(loss, Batch(features[-1], logits, labels))
                    if not loss.requires_grad:
                        raise ConfigError(
                            f"segment ({first}, {last}): what its loss depends on is frozen, so "
                            "nothing would be trained; freeze less, or weigh other exits"
                        )
                    (loss * (tallies[0].weight(labels) / max(1, whole))).backward()
                    for tally, logit in zip(tallies, logits, strict=True):
                        tally.add_(logit.detach(), labels)
            terms.before_step_()
            optimizer.step_()
            num_steps += 1
        context.note_epoch()
    if not all(math.isfinite(tally.loss) for tally in tallies):
        raise TrainerError(
            f"loss of segment ({first}, {last}) is not finite after {num_steps} steps; "
            f"lower the learning rate ({plan.lr}) or check the data"
        )
    terms.end_(num_steps)
    log.debug("segment (%d, %d): %d steps, %d examples", first, last, num_steps, len(y))
    results = [
        ExitResult(exit=exit, loss=tally.loss, metric=tally.metric)
        for exit, tally in enumerate(tallies, first)
    ]
    return num_steps, results


def parts_of(context: Context, segment: Segment, inputs: Inputs) -> Trained:
    """What training a segment changes."""
    model, cut = context.model, slice(segment.first - 1, segment.last)
    parameters = dict(model.named_parameters())
    frozen = context.plan.frozen
    names = trained_names(parameters, [segment], frozen)
    named = {name: parameters[name] for name in names}
    num_frozen = num_frozen_stages(model, segment, frozen)
    return Trained(segment, model.stages[cut], model.exits[cut], named, num_frozen, inputs)


def forward(trained: Trained, features: Sequence[Tensor], recompute: bool) -> list[Tensor]:
    """Logits of each exit. features: what `trained.inputs` gives. With recompute the graph holds
    the inputs of all stages but the last: that one's gradient comes first, so running it again
    would save nothing."""
    begin, heads, carried = trained.num_frozen, trained.heads, features[-1]
    logits = [head(made) for head, made in zip(heads[:begin], features, strict=False)]
    stages = trained.stages[begin:]
    for number, (stage, head) in enumerate(zip(stages, heads[begin:], strict=True), 1):
        keeps_graph = not recompute or number == len(stages)
        carried = stage(carried) if keeps_graph else recomputed(stage, carried)
        logits.append(head(carried))
    return logits


def inputs_of(
    context: Context,
    segment: Segment,
    x: Tensor,
    rows: Tensor,
    cache_bytes: int,
    augment: Augment | None,
) -> Inputs:
    """A function from a batch's indices, places in `rows` of x, to what Trained says: x itself, or
    features that the stages before the first trained one make of it, which it puts into evaluation
    mode. Those of all rows are made once and kept on the CPU if several epochs want them and they
    take at most cache_bytes; else they are made for each batch anew."""
    plan, device, model = context.plan, context.device, context.model
    begin = num_frozen_stages(model, segment, plan.frozen)
    before = model.stages[: segment.first - 1 + begin].eval()
    first_kept = len(before) - max(1, begin)

    @torch.no_grad()
    def make(some: Tensor) -> list[Tensor]:
        made = [moved(some, device)]
        with family_code(context.spec, "a frozen stage"):
            for number, stage in enumerate(before):
                made = [*(made if number > first_kept else ()), stage(made[-1])]
        return made

    if augment:
        return lambda batch: make(augment(x[rows[batch]]))
    one = make(x[:1]) if len(before) and plan.epochs > 1 else None
    if one is None or len(rows) * _num_bytes(one) > cache_bytes:
        return lambda batch: make(x[rows[batch]])
    caches = [_like(features, len(rows)) for features in one]
    at_once = plan.micro_batch or plan.batch_size
    for places in torch.arange(len(rows)).split(at_once):
        if context.should_stop():
            raise Cancelled("training cancelled while computing frozen features")
        for cache, features in zip(caches, make(x[rows[places]]), strict=True):
            cache[places[0] : places[-1] + 1].copy_(features)
    return lambda batch: [moved(cache[batch], device) for cache in caches]


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _like(features: Tensor, count: int) -> Tensor:
    """Room on the CPU for so many examples' features like these (1, ...)."""
    order = torch.channels_last if features.ndim == 4 else torch.contiguous_format
    return torch.empty((count, *features.shape[1:]), dtype=features.dtype, memory_format=order)


def batches(n: int, batch_size: int, order: torch.Generator) -> list[Tensor]:
    """The indices of a shuffled epoch's batches, without a rest that is too small for BatchNorm."""
    batches = torch.randperm(n, generator=order).split(batch_size)
    return [batch for batch in batches if len(batch) >= min(MIN_BATCH, batch_size)]


def num_batches(plan: Plan, num_examples: int) -> int:
    """How often a job goes through its model, a batch or a part of one at a time."""
    whole, rest = divmod(num_examples, plan.batch_size)
    sizes = {plan.batch_size: whole, rest: int(rest >= min(MIN_BATCH, plan.batch_size))}
    parts = {size: math.ceil(size / (plan.micro_batch or plan.batch_size)) for size in sizes}
    an_epoch = sum(count * parts[size] for size, count in sizes.items())
    models = len(plan.segments) + bool(plan.teacher and plan.teacher.is_trained)
    return models * plan.epochs * an_epoch


def parts(batch: Tensor, micro_batch: int) -> Sequence[Tensor]:
    """The batch cut into as few parts of about equal size as hold at most micro_batch examples
    each; 0: the batch as one part."""
    return batch.tensor_split(math.ceil(len(batch) / micro_batch)) if micro_batch else (batch,)
