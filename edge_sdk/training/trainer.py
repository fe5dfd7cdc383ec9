"""Training a job: its model, plan and tensors in, the trained tensors out. There is no other loop.

Segments are independent: each starts from the tensors received. They are trained deepest first, so
the frozen prefix of a deep segment is the received one, and only then is a prefix changed. The
features that a frozen prefix gives are computed once and reused over the epochs, if they fit a
bound. Features that do not fit, and those of a single epoch, are made for each batch anew.

Two fields of the plan save memory. micro_batch: a batch goes through in parts of about equal size,
whose gradients add up to the batch's; BatchNorm sees the parts. recompute: of all stages but a
segment's last only the input is kept, and the stage runs again when its gradient is wanted: the
same update bit by bit, for at most a third more operations."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from edge_sdk.data.examples import MIN_BATCH, Examples, check_enough
from edge_sdk.errors import ConfigError, DataError, ShapeError, TrainerError
from edge_sdk.hardware import process_memory
from edge_sdk.helpers.text import one_line
from edge_sdk.models import StagedModel, build, family_code
from edge_sdk.models.losses import exit_weights, local_loss
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import ExitResult, ModelSpec, Phase, Plan, Segment
from edge_sdk.protocol.tensor_lists import check_segments, needed_names, trained_names
from edge_sdk.protocol.tensors import Tensors, check_finite
from edge_sdk.protocol.timing import clock, since
from edge_sdk.training.augmenting import Augment
from edge_sdk.training.checkpointing import recomputed
from edge_sdk.training.optim import Optimizer

log = logging.getLogger(__name__)
CACHE_BYTES = 256 * 1024**2  # of a segment's frozen features, where nobody knows a better bound
Inputs: TypeAlias = Callable[[Tensor], Tensor]  # from a batch's indices to its input on the device


class Cancelled(TrainerError):
    """The coordinator no longer wants this job."""

    code = "cancelled"


@dataclass(frozen=True)
class TrainResult:
    """What training one job gave. tensors: those of the trained segments, by name, on the CPU."""

    tensors: Tensors
    num_examples: int
    num_steps: int
    exits: tuple[ExitResult, ...]
    phases: dict[str, Phase]
    peak_memory_bytes: int


def train(
    spec: ModelSpec,
    plan: Plan,
    tensors: Tensors,
    examples: Examples,
    *,
    device: str | torch.device = "cpu",
    cache_bytes: int = CACHE_BYTES,
    should_stop: Callable[[], bool] = lambda: False,
    note_epoch: Callable[[], None] = lambda: None,
    is_consuming: bool = False,
    augment: Augment | None = None,
) -> TrainResult:
    """Train the plan's segments on local data; the same arguments give the same tensors.

    tensors: what `needed_names` of the plan lists. cache_bytes: features of a frozen prefix that
    take more memory are made again in every epoch. should_stop() is asked before every batch,
    note_epoch() told after every epoch of a segment. is_consuming: `tensors` is emptied once the
    model has them, so that they need not lie in memory twice. augment: changes the inputs of every
    batch; features of a frozen prefix are then made anew too. Raises ShapeError, DataError,
    Cancelled, ConfigError for what the family's code raises, and TrainerError when a loss is not
    finite."""
    process_memory.reset_peak()
    started = clock()
    check_segments(plan.segments, spec.exit)
    check_fits(spec, examples)
    model = build(spec)
    wanted = set(needed_names(model.tensors(), plan.segments))
    if missing := sorted(wanted - set(tensors)):
        raise ShapeError(f"job lacks tensors {', '.join(missing)}; nothing was trained")
    check_finite(tensors, "job")
    model.load(tensors)
    if is_consuming:
        tensors.clear()
    model.ready(device)
    x = torch.from_numpy(examples.x)
    y = torch.from_numpy(examples.y)
    loaded = clock()

    exits: list[ExitResult] = []
    num_steps = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        for segment in sorted(plan.segments, key=lambda g: -g.first):
            frozen = torch.nn.Sequential(*model.stages[: segment.first - 1]).eval()
            steps, results = _train_segment(
                spec,
                model,
                segment,
                plan,
                # ends with the segment
                _inputs(spec, frozen, x, plan, device, cache_bytes, should_stop, augment),
                y,
                device,
                should_stop,
                note_epoch,
            )
            num_steps += steps
            exits += results
    held = model.tensors()
    update = {name: held[name].cpu() for name in trained_names(held, plan.segments)}
    check_finite(update, "training result")
    finished = clock()
    return TrainResult(
        tensors=update,
        num_examples=len(examples),
        num_steps=num_steps,
        exits=tuple(sorted(exits, key=lambda result: result.exit)),
        phases={"load": since(started, loaded), "train": since(loaded, finished)},
        peak_memory_bytes=process_memory.peak_bytes(),
    )


def _train_segment(
    spec: ModelSpec,
    model: StagedModel,
    segment: Segment,
    plan: Plan,
    inputs: Inputs,
    y: Tensor,
    device: str | torch.device,
    should_stop: Callable[[], bool],
    note_epoch: Callable[[], None],
) -> tuple[int, list[ExitResult]]:
    """Train one segment in place. Returns the number of steps and the last epoch's exit results."""
    first, last = segment.first, segment.last
    stages, heads = model.stages[first - 1 : last], model.exits[first - 1 : last]
    weights = exit_weights(plan, first, last)
    named = dict(torch.nn.ModuleList([stages, heads]).named_parameters())
    anchor = {k: w.detach().clone() for k, w in named.items()} if plan.prox_mu else {}
    optimizer = Optimizer(list(named.values()), plan)
    stages.train()
    heads.train()
    order = torch.Generator().manual_seed(plan.seed)
    num_steps, sums = 0, torch.zeros(3, last - first + 1, dtype=torch.float64)
    for _ in range(plan.epochs):
        sums.zero_()
        for batch in _batches(len(y), plan.batch_size, order):
            for part in _parts(batch, plan.micro_batch):
                if should_stop():
                    raise Cancelled(f"training of segment ({first}, {last}) cancelled")
                with family_code(spec, "training", model):
                    features, labels = inputs(part), y[part].to(device)
                    logits = _forward(stages, heads, features, plan.recompute)
                    loss = local_loss(logits, labels, weights, plan, named, anchor)
                    (loss * (len(part) / len(batch))).backward()
                    sums += _count(logits, labels)
            optimizer.step_()
            num_steps += 1
        note_epoch()
    losses, correct, seen = sums[0] / sums[2], sums[1] / sums[2], sums[2]
    if not bool(torch.isfinite(losses).all()):
        raise TrainerError(
            f"loss of segment ({first}, {last}) is not finite after {num_steps} steps; "
            f"lower the learning rate ({plan.lr}) or check the data"
        )
    log.debug("segment (%d, %d): %d steps, %d examples", first, last, num_steps, int(seen[0]))
    results = [
        ExitResult(exit=first + i, loss=float(losses[i]), accuracy=float(correct[i]))
        for i in range(last - first + 1)
    ]
    return num_steps, results


def _forward(
    stages: nn.ModuleList, heads: nn.ModuleList, features: Tensor, recompute: bool
) -> list[Tensor]:
    """Logits of each exit. With recompute the graph holds the inputs of all stages but the last:
    that one's gradient comes first, so running it again would save nothing."""
    logits = []
    for number, (stage, head) in enumerate(zip(stages, heads, strict=True), 1):
        keeps_graph = not recompute or number == len(stages)
        features = stage(features) if keeps_graph else recomputed(stage, features)
        logits.append(head(features))
    return logits


def _inputs(
    spec: ModelSpec,
    frozen: torch.nn.Sequential,
    x: Tensor,
    plan: Plan,
    device: str | torch.device,
    cache_bytes: int,
    should_stop: Callable[[], bool],
    augment: Augment | None,
) -> Inputs:
    """A function from a batch's indices to what the first trained stage takes: x itself, or the
    features that the frozen stages make of it. Those of all x are made once and kept on the CPU if
    several epochs want them and they take at most cache_bytes."""

    @torch.no_grad()
    def make(some: Tensor) -> Tensor:
        with family_code(spec, "a frozen stage"):
            made: Tensor = frozen(moved(some, device))
        return made

    if augment:
        return lambda batch: make(augment(x[batch]))
    one = make(x[:1]) if len(frozen) and plan.epochs > 1 else None
    if one is None or len(x) * one.numel() * one.element_size() > cache_bytes:
        return lambda batch: make(x[batch])
    order = torch.channels_last if one.ndim == 4 else torch.contiguous_format
    cache = torch.empty((len(x), *one.shape[1:]), dtype=one.dtype, memory_format=order)
    at_once = plan.micro_batch or plan.batch_size
    for chunk, place in zip(x.split(at_once), cache.split(at_once), strict=True):
        if should_stop():
            raise Cancelled("training cancelled while computing frozen features")
        place.copy_(make(chunk))
    return lambda batch: moved(cache[batch], device)


@torch.no_grad()
def _count(logits: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Of a batch, (3, exits): the summed loss, how many answers are right, how many there are."""
    stacked = torch.stack([logit.detach() for logit in logits])  # (E, B, K)
    log_p = stacked.log_softmax(-1).gather(-1, labels.expand(len(logits), -1).unsqueeze(-1))
    correct = (stacked.argmax(-1) == labels).sum(1)
    seen = torch.full((len(logits),), len(labels))
    return torch.stack([-log_p.sum((1, 2)).double().cpu(), correct.double().cpu(), seen.double()])


def _batches(n: int, batch_size: int, order: torch.Generator) -> list[Tensor]:
    """The indices of a shuffled epoch's batches, without a rest that is too small for BatchNorm."""
    batches = torch.randperm(n, generator=order).split(batch_size)
    return [batch for batch in batches if len(batch) >= min(MIN_BATCH, batch_size)]


def num_batches(plan: Plan, num_examples: int) -> int:
    """How often a job goes through its model, a batch or a part of one at a time."""
    whole, rest = divmod(num_examples, plan.batch_size)
    sizes = {plan.batch_size: whole, rest: int(rest >= min(MIN_BATCH, plan.batch_size))}
    parts = {size: math.ceil(size / (plan.micro_batch or plan.batch_size)) for size in sizes}
    an_epoch = sum(count * parts[size] for size, count in sizes.items())
    return len(plan.segments) * plan.epochs * an_epoch


def usable_device(name: str) -> torch.device:
    """torch's device of this name, once it has held a tensor. Raises ConfigError."""
    if name.partition(":")[0] not in ("cpu", "cuda"):  # torch would list twenty others
        raise ConfigError(f"--device {name!r} is not supported; use cpu or cuda")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {name!r}: {one_line(str(error))}; use cpu or cuda") from error
    return device


def _parts(batch: Tensor, micro_batch: int) -> Sequence[Tensor]:
    """The batch cut into as few parts of about equal size as hold at most micro_batch examples
    each; 0: the batch as one part."""
    return batch.tensor_split(math.ceil(len(batch) / micro_batch)) if micro_batch else (batch,)


def check_fits(spec: ModelSpec, examples: Examples) -> None:
    """Raise DataError unless the examples can train the model."""
    check_enough(examples, "this device's data")
    if tuple(examples.input_shape) != tuple(spec.input_shape):
        raise DataError(
            f"local examples are {tuple(examples.input_shape)}, the model takes "
            f"{tuple(spec.input_shape)}; this device's data does not belong to this run"
        )
    if int(examples.y.max()) >= spec.num_classes:
        raise DataError(
            f"local labels reach {int(examples.y.max())}, the model has {spec.num_classes} "
            "classes; labels run from 0"
        )


def pick_device(name: str) -> torch.device:
    """torch's device of this name; "auto": CUDA where there is one. Raises ConfigError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return usable_device(name)
