"""Clipped gradients: each entry to at most clip_value, then all of a segment's together to the
Euclidean norm clip_norm. They are those of a whole batch's loss, with the pull of FedProx and
FedDyn, without weight decay and without SCAFFOLD's correction, which is no gradient of it."""

from __future__ import annotations

import torch

from edge_sdk.training.terms.base import Term, Trained

EPSILON = 1e-6  # beside the norm that is divided by, as in torch's clip_grad_norm_


class Clipping(Term):
    def begin_(self, trained: Trained) -> None:
        self._parameters = list(trained.named.values())

    @torch.no_grad()
    def before_step_(self) -> None:
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if most := self.plan.clip_value:
            torch._foreach_clamp_min_(gradients, -most)
            torch._foreach_clamp_max_(gradients, most)
        if most := self.plan.clip_norm:
            norms = torch._foreach_norm(gradients)
            factor = most / (torch.stack(list(norms)).norm() + EPSILON)
            torch._foreach_mul_(gradients, factor.clamp(max=1.0))
