"""FedDyn (Acar et al. 2021), a client's side: the loss has - <g_i, w> + alpha / 2 |w - theta|^2,
theta the received weights; after training g_i+ = g_i - alpha (w - theta), zero at first, is kept
here. Where a client's training has converged, g_i+ is the gradient of its own loss there. Of the
trained parameters, not of buffers."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_sdk.training.terms.base import Context, Term, Trained

PREFIX = "dyn/"


class Dynamic(Term):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._device = context.device
        self._own = {n: t for n, t in context.kept.items() if n.startswith(PREFIX)}

    def begin_(self, trained: Trained) -> None:
        self._segment = {
            name: (w, w.detach().clone(), self._own_of(name, w))
            for name, w in trained.named.items()
        }

    def _own_of(self, name: str, parameter: Tensor) -> Tensor:
        own = self._own.pop(PREFIX + name, None)
        return torch.zeros_like(parameter) if own is None else own.to(self._device, copy=True)

    @torch.no_grad()
    def before_step_(self) -> None:
        for parameter, start, own in self._segment.values():
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=self.plan.dyn_alpha).sub_(own)

    @torch.no_grad()
    def end_(self, num_steps: int) -> None:
        for name, (parameter, start, own) in self._segment.items():
            moved = start.neg_().add_(parameter)
            self._own[PREFIX + name] = own.sub_(moved, alpha=self.plan.dyn_alpha).cpu()
        self._segment = {}

    def kept(self) -> dict[str, Tensor]:
        return self._own
