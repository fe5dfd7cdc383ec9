"""Training losses, functions of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.protocol.messages import Plan

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
    logits: Sequence[Tensor], labels: Tensor, weights: Sequence[float], plan: Plan
) -> Tensor:
    """What a step on one batch of a segment minimises, without what the plan adds by a client's
    own frequencies, state or teacher: a scalar. logits, labels, weights: see joint_exit_loss."""
    return joint_exit_loss(logits, labels, weights) + exit_distillation(logits, weights, plan)


def joint_exit_loss(logits: Sequence[Tensor], labels: Tensor, weights: Sequence[float]) -> Tensor:
    """Weighted sum of the exits' cross entropies (HypeMeFed, section 4.2).

    logits: one (B, K) per exit; labels: (B,) int64. Returns a scalar in nats.
    Raises ShapeError if the number of weights is not the number of exits."""
    if len(weights) != len(logits):
        raise ShapeError(f"{len(weights)} exit weights for {len(logits)} exits; give one each")
    total = torch.zeros((), device=labels.device)
    for weight, logit in zip(weights, logits, strict=True):
        if weight:
            total = total + weight * functional.cross_entropy(logit, labels)
    return total


def exit_distillation(logits: Sequence[Tensor], weights: Sequence[float], plan: Plan) -> Tensor:
    """The plan's distillation between these exits, times distill_weight; 0 where it has none. In
    "deepest-to-shallow" each exit's part also has the exit's weight of the joint loss, as ScaleFL
    weighs an exit's loss as a whole. A scalar."""
    if plan.distill == "none" or not plan.distill_weight or len(logits) < 2:
        return torch.zeros((), device=logits[0].device)
    shares = weights if plan.distill == "deepest-to-shallow" else (1.0,) * len(logits)
    taught = distillation(logits, plan.distill, plan.distill_temperature, shares)
    return plan.distill_weight * taught


def distillation(
    logits: Sequence[Tensor], direction: str, temperature: float, shares: Sequence[float] = ()
) -> Tensor:
    """How far the exits are from their teachers: T^2 * KL(softmax(z_j / T) || softmax(z_e / T)) in
    nats, averaged over the batch and over the teachers j of an exit e, summed over the exits e.

    logits: one (B, K) per exit, shallow first. direction: a key of TEACHES; an exit that it gives
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
    log_p = [(z / temperature).log_softmax(-1) for z in logits]  # E of (B, K)
    total, last = torch.zeros((), device=logits[0].device), len(log_p) - 1
    for e, (student, share) in enumerate(zip(log_p, shares or (1.0,) * len(log_p), strict=True)):
        teachers = [t.detach() for j, t in enumerate(log_p) if TEACHES[direction](j, e, last)]
        for teacher in teachers:
            apart = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
            total = total + share * apart / len(teachers)
    return temperature**2 * total
