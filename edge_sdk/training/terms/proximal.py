"""FedProx (Li et al. 2020): the loss has mu / 2 times the squared distance of the trained
parameters from the received ones. Its gradient is added by hand, mu (w - w_received): the same
numbers, and autograd keeps no difference of every parameter for it."""

from __future__ import annotations

import torch

from edge_sdk.training.terms.base import Term, Trained


class Proximal(Term):
    def begin_(self, trained: Trained) -> None:
        self._pairs = [(w, w.detach().clone()) for w in trained.named.values()]

    @torch.no_grad()
    def before_step_(self) -> None:
        for parameter, anchor in self._pairs:
            if parameter.grad is not None:
                parameter.grad.add_(parameter - anchor, alpha=self.plan.prox_mu)
