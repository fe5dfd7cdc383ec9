"""Adam and SGD steps with torch's multi-tensor functions.

Own code because creating any torch.optim optimizer imports torch._dynamo: 95 MB and 1.9 s that a
small board does not have (measured with torch 2.13). Equal to torch.optim's, see tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edge_sdk.protocol.messages import Plan


class Optimizer:
    """Steps `parameters` in place by their .grad. Its state is made at the first step, and freed
    with the optimizer.

    Adam: Kingma and Ba 2015, betas 0.9 / 0.999, eps 1e-8. SGD: heavy-ball momentum.
    Weight decay is the L2 term added to the gradient."""

    def __init__(self, parameters: Sequence[Tensor], plan: Plan) -> None:
        self.parameters = list(parameters)
        self.plan = plan
        self.steps = 0
        self.first: list[Tensor] = []  # momentum, or Adam's first moment
        self.second: list[Tensor] = []  # Adam's second moment

    @torch.no_grad()
    def step_(self) -> None:
        """One step in place; clears the gradients. A parameter without one (an exit of weight 0) is
        left out from the first step on: the graph is the same at every step."""
        if self.steps == 0:
            self.parameters = [p for p in self.parameters if p.grad is not None]
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if self.plan.weight_decay:
            torch._foreach_add_(gradients, self.parameters, alpha=self.plan.weight_decay)
        self.steps += 1
        (self._adam_ if self.plan.optimizer == "adam" else self._sgd_)(gradients)
        for parameter in self.parameters:
            parameter.grad = None

    def _sgd_(self, gradients: list[Tensor]) -> None:
        if self.plan.momentum:
            if not self.first:
                self.first = [torch.zeros_like(p) for p in self.parameters]
            torch._foreach_mul_(self.first, self.plan.momentum)
            torch._foreach_add_(self.first, gradients)
            gradients = self.first
        torch._foreach_add_(self.parameters, gradients, alpha=-self.plan.lr)

    def _adam_(self, gradients: list[Tensor]) -> None:
        if not self.first:
            self.first = [torch.zeros_like(p) for p in self.parameters]
            self.second = [torch.zeros_like(p) for p in self.parameters]
        torch._foreach_lerp_(self.first, gradients, 1 - 0.9)
        torch._foreach_mul_(self.second, 0.999)
        torch._foreach_addcmul_(self.second, gradients, gradients, 1 - 0.999)
        first_correction = 1 - 0.9**self.steps
        second_correction = 1 - 0.999**self.steps
        denominator = torch._foreach_sqrt(self.second)
        torch._foreach_div_(denominator, second_correction**0.5)
        torch._foreach_add_(denominator, 1e-8)
        torch._foreach_addcdiv_(
            self.parameters, self.first, denominator, -self.plan.lr / first_correction
        )
