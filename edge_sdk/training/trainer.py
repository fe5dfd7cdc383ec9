"""Training a job: its model, plan and tensors in, the trained tensors out.

Segments (segment.py) are independent: each starts from the tensors received. They are trained
deepest first, so the frozen prefix of a deep segment is the received one, and only then is a prefix
changed. What a plan asks for beside plain steps stands in terms/, a file for each field."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from edge_sdk.data.examples import Examples, Ints, check_enough
from edge_sdk.data.partition import holdout_rows
from edge_sdk.errors import DataError, ShapeError
from edge_sdk.hardware import process_memory
from edge_sdk.models import StagedModel, build, family_code
from edge_sdk.models.causal import check_causal
from edge_sdk.protocol.messages import ExitResult, Holdout, ModelSpec, Phase, Plan
from edge_sdk.protocol.plan_tensors import check_plan, job_specs, update_specs
from edge_sdk.protocol.tensor_lists import check_segments, trained_names
from edge_sdk.protocol.tensors import Tensors, check_finite, specs_of
from edge_sdk.protocol.timing import clock, since
from edge_sdk.tasks.table import answered_at_once, task_of
from edge_sdk.training.augmenting import Augment
from edge_sdk.training.holdout import answers
from edge_sdk.training.segment import inputs_of, train_segment
from edge_sdk.training.terms.base import Context
from edge_sdk.training.terms.table import terms_of

log = logging.getLogger(__name__)
CACHE_BYTES = 256 * 1024**2  # of a segment's frozen features, where nobody knows a better bound


@dataclass(frozen=True)
class TrainResult:
    """What training one job gave. tensors: what travels back, by name, on the CPU; of a plain plan
    those of the trained segments. num_examples: that were trained on. state: what this client keeps
    for its next round if the update is accepted; state_round: of what it began from, 0: nothing."""

    tensors: Tensors
    num_examples: int
    num_steps: int
    exits: tuple[ExitResult, ...]
    phases: dict[str, Phase]
    peak_memory_bytes: int
    holdout: Holdout | None = None
    state_round: int = 0
    state: Tensors = field(default_factory=dict)


def train(
    spec: ModelSpec,
    plan: Plan,
    tensors: Tensors,
    examples: Examples,
    *,
    state: Tensors | None = None,
    state_round: int = 0,
    device: str | torch.device = "cpu",
    cache_bytes: int = CACHE_BYTES,
    should_stop: Callable[[], bool] = lambda: False,
    note_epoch: Callable[[], None] = lambda: None,
    is_consuming: bool = False,
    augment: Augment | None = None,
) -> TrainResult:
    """Train the plan's segments on local data; the same arguments give the same tensors.

    tensors: what `job_specs` of the plan lists. state, state_round: what this client keeps of that
    round; where it does not fit the model it is left out. cache_bytes: features of a frozen prefix
    that take more memory are made again in every epoch. should_stop() is asked before every batch,
    note_epoch() told after every epoch of a segment. is_consuming: `tensors` and `state` are
    emptied once they are in use, so that they need not lie in memory twice. augment: changes the
    inputs of every batch; features of a frozen prefix are then made anew too. Raises ShapeError,
    DataError, Cancelled, ConfigError for what the family's code raises and for a plan that
    contradicts itself, and TrainerError when a loss is not finite."""
    process_memory.reset_peak()
    started = clock()
    check_plan(plan)
    check_segments(plan.segments, spec.exit)
    check_fits(spec, examples)
    rows, aside = _rows(examples, plan)
    model = build(spec)
    specs, buffers = specs_of(model.tensors()), [name for name, _ in model.named_buffers()]
    teacher = specs_of(build(plan.teacher.model).tensors()) if plan.teacher else ()
    wanted = {tensor.name for tensor in job_specs(plan, specs, buffers, teacher)}
    if missing := sorted(wanted - set(tensors)):
        raise ShapeError(f"job lacks tensors {', '.join(missing)}; nothing was trained")
    check_finite(tensors, "job")
    x, labels = torch.from_numpy(examples.x), torch.from_numpy(examples.y[rows])
    state = {} if state is None else state
    kept = _fitting(state, model)
    began_from = state_round if kept else 0
    context = Context(spec, plan, model, labels, kept, device, should_stop, note_epoch)
    terms = terms_of(context)
    model.load(terms.received(tensors))
    if is_consuming:
        for used in (tensors, state, kept):
            used.clear()
    model.ready(device)
    with family_code(spec, "looking for its answers", model):
        check_causal(spec, model, examples)
    with family_code(spec, "answering examples set aside", model):
        at_once = min(answered_at_once(spec), plan.micro_batch or plan.batch_size)
        tested = answers(model, examples.take(aside), at_once, device)
    terms.loaded_(tested)
    loaded = clock()

    chosen = torch.from_numpy(rows)
    exits: list[ExitResult] = []
    num_steps = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        for segment in sorted(plan.segments, key=lambda g: -g.first):
            inputs = inputs_of(context, segment, x, chosen, cache_bytes, augment)
            steps, results = train_segment(context, segment, terms, inputs)
            num_steps += steps
            exits += results
    held = model.tensors()
    update = {name: held[name].cpu() for name in trained_names(held, plan.segments, plan.frozen)}
    update = terms.returned(update)
    order = [tensor.name for tensor in update_specs(plan, specs, buffers, teacher)]
    update = {name: update[name] for name in order} | update
    check_finite(update, "training result")
    check_finite(own := terms.kept(), "what this client keeps")
    finished = clock()
    return TrainResult(
        tensors=update,
        num_examples=len(rows),
        num_steps=num_steps,
        exits=tuple(sorted(exits, key=lambda result: result.exit)),
        phases={"load": since(started, loaded), "train": since(loaded, finished)},
        peak_memory_bytes=process_memory.peak_bytes(),
        holdout=tested,
        state_round=began_from,
        state=own,
    )


def _rows(examples: Examples, plan: Plan) -> tuple[Ints, Ints]:
    """Indices of the examples that are trained on, and of those set aside."""
    everyone = np.arange(len(examples))
    return holdout_rows(examples.strata, plan.holdout) if plan.holdout else (everyone, everyone[:0])


def _fitting(state: Tensors, model: StagedModel) -> Tensors:
    """What is kept, or nothing of it where a tensor is shaped otherwise than the model's: then it
    is of another model, and half of it would be worse than none."""
    held = model.tensors()
    for name, tensor in state.items():
        own = held.get(name.partition("/")[2])
        if own is not None and (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
            said = "what is kept as %s is %s %s, the model has %s %s; begun without"
            log.warning(said, name, tuple(tensor.shape), tensor.dtype, tuple(own.shape), own.dtype)
            return {}
    return dict(state)


def check_fits(spec: ModelSpec, examples: Examples) -> None:
    """Raise DataError unless the examples can train the model."""
    check_enough(examples, "this device's data")
    if tuple(examples.input_shape) != tuple(spec.input_shape):
        raise DataError(
            f"local examples are {tuple(examples.input_shape)}, the model takes "
            f"{tuple(spec.input_shape)}; this device's data does not belong to this run"
        )
    if examples.task != spec.task or examples.vocabulary > spec.vocabulary:
        raise DataError(
            f"local labels are for the task {examples.task} with a vocabulary of "
            f"{examples.vocabulary}, the model's is {spec.task} with {spec.vocabulary}; this "
            "device's data does not belong to this run"
        )
    task_of(spec.task).check_labels(
        examples.y, examples.x, spec.num_classes, "local labels of this device"
    )
