"""SCAFFOLD (Karimireddy et al. 2020): control variates against the drift of local training.

A step goes along g - c_i + c, where c comes with the job and c_i is kept here, zero at first. After
J steps from theta to y: c_i+ = c_i - c + (theta - y) / (J lr), "option II" of the paper; c_i+ - c_i
goes back and c_i+ is kept. Both are of the trained parameters, not of buffers.

(theta - y) / (J lr) is the mean gradient of plain SGD alone, so Adam and momentum are refused.
Weight decay is part of the objective, and so of that mean: it is the gradient's L2 term."""

from __future__ import annotations

import torch
from torch import Tensor

from edge_sdk.protocol.tensor_lists import role_of
from edge_sdk.protocol.tensors import Tensors
from edge_sdk.training.terms.base import Context, Term, Trained

ROLE = "correction"


class Correction(Term):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._device = context.device
        self._own = {name: t for name, t in context.kept.items() if role_of(name)[0] == ROLE}
        self._shared: Tensors = {}
        self._change: Tensors = {}

    def received(self, tensors: Tensors) -> Tensors:
        self._shared = {n: t.clone() for n, t in tensors.items() if role_of(n)[0] == ROLE}
        return {name: t for name, t in tensors.items() if name not in self._shared}

    def begin_(self, trained: Trained) -> None:
        self._segment = {
            name: (w, w.detach().clone(), self._shared_of(name), self._own_of(name, w))
            for name, w in trained.named.items()
        }

    def _shared_of(self, name: str) -> Tensor:
        return self._shared.pop(f"{ROLE}/{name}").to(self._device)

    def _own_of(self, name: str, parameter: Tensor) -> Tensor:
        own = self._own.pop(f"{ROLE}/{name}", None)
        return torch.zeros_like(parameter) if own is None else own.to(self._device, copy=True)

    @torch.no_grad()
    def before_step_(self) -> None:
        for parameter, _, shared, own in self._segment.values():
            if parameter.grad is not None:
                parameter.grad.add_(shared - own)

    @torch.no_grad()
    def end_(self, num_steps: int) -> None:
        for name, (parameter, start, shared, own) in self._segment.items():
            change = start.sub_(parameter).div_(num_steps * self.plan.lr).sub_(shared)
            self._change[f"{ROLE}/{name}"] = change.cpu()
            self._own[f"{ROLE}/{name}"] = own.add_(change).cpu()
        self._segment = {}

    def returned(self, tensors: Tensors) -> Tensors:
        return tensors | self._change

    def kept(self) -> Tensors:
        return self._own
