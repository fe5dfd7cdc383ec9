"""LotteryFL (Li et al. 2021), a client's side: weights under masks, and the decision to prune.

A client whose received model answers enough of its held-out examples right, and still has more than
`target` of its weights, loses in each layer `share` of those left, the smallest; the rest begins
again from the initial values (Frankle and Carbin 2019). Those came with its first job and are kept
here; without them, as after a loss, nothing is pruned. Where the share is not one weight of any
layer, as close to the target, nothing begins again either. Only matrices and convolutions are
pruned, never biases or the scales of norms; all parameters begin again, statistics stay as
received.

What the authors' code gets wrong: it decides on test data; it binds biases to the initial values'
own storage when it rewinds, so that training changes those for all; it takes a weight for pruned
when it is small, where here the mask says so; it overshoots the target by up to `share`."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from edge_sdk.models.masks import packed, unpacked
from edge_sdk.protocol.messages import Holdout
from edge_sdk.protocol.tensor_lists import role_of
from edge_sdk.protocol.tensors import Tensors
from edge_sdk.training.terms.base import Context, Term, Trained

ROLE = "initial"


class Pruning(Term):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        assert context.plan.prune is not None
        self._prune, self._model, self._device = context.plan.prune, context.model, context.device
        self._initial = {n: t for n, t in context.kept.items() if role_of(n)[0] == ROLE}
        self._masks: dict[str, Tensor] = {}

    def received(self, tensors: Tensors) -> Tensors:
        self._initial |= {n: t.clone() for n, t in tensors.items() if role_of(n)[0] == ROLE}
        shapes = {name: tensor.shape for name, tensor in self._model.tensors().items()}
        weights, self._masks = unpacked(tensors, shapes)
        return weights

    @torch.no_grad()
    def loaded_(self, holdout: Holdout | None) -> None:
        left = sum(int(mask.sum()) for mask in self._masks.values())
        left_share = left / max(1, sum(mask.numel() for mask in self._masks.values()))
        parameters = dict(self._model.named_parameters())
        has_initial = all(f"{ROLE}/{name}" in self._initial for name in parameters)
        if not has_initial or holdout is None or left_share <= self._prune.target:
            return
        if holdout.metric < self._prune.threshold:
            return
        share = min(self._prune.share, 1 - self._prune.target / left_share)
        for name, mask in self._masks.items():
            self._masks[name] = without_smallest(parameters[name].cpu().contiguous(), mask, share)
        if sum(int(mask.sum()) for mask in self._masks.values()) == left:
            return  # nothing went, so nothing begins again
        for name, parameter in parameters.items():
            parameter.copy_(self._initial[f"{ROLE}/{name}"])
            if name in self._masks:
                parameter.masked_fill_(~self._masks[name].to(self._device), 0.0)

    def begin_(self, trained: Trained) -> None:
        self._masked = [
            (w, ~self._masks[name].to(self._device))
            for name, w in trained.named.items()
            if name in self._masks
        ]

    @torch.no_grad()
    def before_step_(self) -> None:
        for parameter, is_gone in self._masked:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(is_gone, 0.0)  # times a bool would copy it as floats

    def returned(self, tensors: Tensors) -> Tensors:
        return packed(tensors, self._masks)

    def kept(self) -> Tensors:
        return self._initial


def without_smallest(weights: Tensor, mask: Tensor, share: float) -> Tensor:
    """The mask of one layer without the share, rounded down, of the weights under it that are
    smallest in magnitude; of equal ones the first go."""
    num_left = int(mask.sum())
    num_gone = int(share * num_left)
    if not num_gone:
        return mask.clone()
    sizes = weights.abs()
    # No order of all: the places of a large layer take more memory than a training step.
    edge = float(np.partition(sizes.numpy()[mask.numpy()], num_gone - 1)[num_gone - 1])
    left = mask & (sizes > edge)
    if num_equal := num_left - num_gone - int(left.sum()):  # of those at the edge, that stay
        places = (mask & (sizes == edge)).reshape(-1).nonzero().reshape(-1)
        left.view(-1)[places[-num_equal:]] = True
    return left
