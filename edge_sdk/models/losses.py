"""Training losses, functions of tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.protocol.messages import Plan

# Whether exit j teaches exit e.
TEACHES: dict[str, Callable[[int, int], bool]] = {
    "deep-to-shallow": operator.gt,
    "shallow-to-deep": operator.lt,
    "mutual": operator.ne,
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
    parameters: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
) -> Tensor:
    """What a step on one batch of a segment minimises: all terms of the plan, a scalar.

    logits, labels, weights: see joint_exit_loss. parameters, anchor: the trained ones now and as
    they were received, by name; without prox_mu the anchor is not looked at."""
    loss = joint_exit_loss(logits, labels, weights)
    if plan.distill != "none" and plan.distill_weight and len(logits) > 1:
        taught = distillation(logits, plan.distill, plan.distill_temperature)
        loss = loss + plan.distill_weight * taught
    if plan.prox_mu:
        loss = loss + plan.prox_mu / 2 * proximal_term(parameters, anchor)
    return loss


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


def proximal_term(parameters: Mapping[str, Tensor], anchor: Mapping[str, Tensor]) -> Tensor:
    """|w - w_received|^2 over trainable tensors (FedProx, 2020); the caller applies mu / 2."""
    return torch.stack([(w - anchor[name]).square().sum() for name, w in parameters.items()]).sum()


def distillation(logits: Sequence[Tensor], direction: str, temperature: float) -> Tensor:
    """How far the exits are from their teachers: T^2 * KL(softmax(z_j / T) || softmax(z_e / T)) in
    nats, averaged over the batch and over the teachers j of an exit e, summed over the exits e.

    logits: one (B, K) per exit, shallow first. direction: a key of TEACHES; an exit that it gives
    no teacher adds nothing. Teachers get no gradient: the term moves students only. T^2 keeps the
    gradients' size when T changes (Hinton et al. 2015). Returns a scalar.

    Sources. DepthFL (ICLR 2023): "mutual" at T = 1; its code adds 1e-7 to the teachers'
    probabilities, which is left out as the logarithms here are finite without. ScaleFL (CVPR 2023):
    "deep-to-shallow" where the deepest exit alone teaches, here every deeper one does; its code
    also averages over the classes (a factor of 1 / K), weights the term with the exit's number and
    lets the gradient reach the teacher. "shallow-to-deep" is ours, for deep stages with few owners.

    Raises ConfigError for an unknown direction."""
    if direction not in TEACHES:
        raise ConfigError(f"unknown distillation {direction!r}; known: {', '.join(TEACHES)}")
    log_p = [(z / temperature).log_softmax(-1) for z in logits]  # E of (B, K)
    total = torch.zeros((), device=logits[0].device)
    for e, student in enumerate(log_p):
        teachers = [t.detach() for j, t in enumerate(log_p) if TEACHES[direction](j, e)]
        for teacher in teachers:
            apart = functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
            total = total + apart / len(teachers)
    return temperature**2 * total
