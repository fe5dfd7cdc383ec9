"""Training losses, functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import Plan
from edge_sdk.tasks.table import task_of

# Whether exit j teaches exit e, the deepest being the last.
TEACHES: dict[str, Callable[[int, int, int], bool]] = {
    "deep-to-shallow": lambda j, e, last: j > e,
    "deepest-to-shallow": lambda j, e, last: j == last > e,
    "shallow-to-deep": lambda j, e, last: j < e,
    "mutual": lambda j, e, last: j != e,
}


def exit_weights(plan: Plan, first: int, last: int) -> Sequence[float]:
    """The plan's weights of exits first..last; all ones where it has none, or only zeros for these:
    a stage trained alone needs its own exit's loss, whatever that counts beside others.

    Raises ShapeError if the plan has weights, but too few."""
    if plan.exit_weights and len(plan.exit_weights) < last:
        raise ShapeError(
            f"plan has {len(plan.exit_weights)} exit weights, trains up to exit {last}; "
            "give one per exit"
        )
    weights = plan.exit_weights[first - 1 : last]
    return weights if any(weights) else (1.0,) * (last - first + 1)


def local_loss(
    logits: Sequence[Tensor],
    labels: Tensor,
    weights: Sequence[float],
    plan: Plan,
    task: Task = "classify",
) -> Tensor:
    """What a step on one batch of a segment minimises, without what the plan adds by a client's
    own frequencies, state or teacher: a scalar. logits, labels, weights: see joint_exit_loss."""
    joint = joint_exit_loss(logits, labels, weights, task)
    return joint + exit_distillation(logits, weights, plan, task)


def joint_exit_loss(
    logits: Sequence[Tensor], labels: Tensor, weights: Sequence[float], task: Task = "classify"
) -> Tensor:
    """Weighted sum of the exits' losses by the task, cross entropies of classes (HypeMeFed, section
    4.2).

    logits: one per exit; labels: of the batch, both shaped as the task has them. Returns a scalar.
    Raises ShapeError if the number of weights is not the number of exits."""
    if len(weights) != len(logits):
        raise ShapeError(f"{len(weights)} exit weights for {len(logits)} exits; give one each")
    total = torch.zeros((), device=labels.device)
    for weight, logit in zip(weights, logits, strict=True):
        if weight:
            total = total + weight * task_of(task).loss(logit, labels)
    return total


def exit_distillation(
    logits: Sequence[Tensor], weights: Sequence[float], plan: Plan, task: Task = "classify"
) -> Tensor:
    """The plan's distillation between these exits, times distill_weight; 0 where it has none. In
    "deepest-to-shallow" each exit's part also has the exit's weight of the joint loss, as ScaleFL
    weighs an exit's loss as a whole. A scalar."""
    if plan.distill == "none" or not plan.distill_weight or len(logits) < 2:
        return torch.zeros((), device=logits[0].device)
    shares = weights if plan.distill == "deepest-to-shallow" else (1.0,) * len(logits)
    taught = distillation(logits, plan.distill, plan.distill_temperature, shares, task)
    return plan.distill_weight * taught


def distillation(
    logits: Sequence[Tensor],
    direction: str,
    temperature: float,
    shares: Sequence[float] = (),
    task: Task = "classify",
) -> Tensor:
    """How far the exits are from their teachers: T^2 times the task's distance at temperature T, of
    classes KL(softmax(z_j / T) || softmax(z_e / T)) in nats, averaged over the batch and over the
    teachers j of an exit e, summed over the exits e.

    logits: one per exit, shallow first. direction: a key of TEACHES; an exit that it gives
    no teacher adds nothing. shares: factors of the exits' parts, () is 1 each. Teachers get no
    gradient: the term moves students only. T^2 keeps the gradients' size when T changes (Hinton et
    al. 2015). Returns a scalar.

    Sources. DepthFL (ICLR 2023): "mutual" at T = 1; its code adds 1e-7 to the teachers'
    probabilities, which is left out as the logarithms here are finite without. ScaleFL (CVPR 2023):
    "deepest-to-shallow"; its code also averages over the classes (a factor of 1 / K) and lets the
    gradient reach the teacher. "deep-to-shallow", where every deeper exit teaches, and
    "shallow-to-deep", for deep stages with few owners, are ours.

    Raises ConfigError for an unknown direction."""
    if direction not in TEACHES:
        raise ConfigError(f"unknown distillation {direction!r}; known: {', '.join(TEACHES)}")
    rules, last = task_of(task), len(logits) - 1
    soft = [rules.softened(z, temperature) for z in logits]
    total = torch.zeros((), device=logits[0].device)
    for e, (student, share) in enumerate(zip(soft, shares or (1.0,) * len(soft), strict=True)):
        teachers = [t.detach() for j, t in enumerate(soft) if TEACHES[direction](j, e, last)]
        for teacher in teachers:
            apart = rules.distance(student, teacher)
            total = total + share * apart / len(teachers)
    return temperature**2 * total
