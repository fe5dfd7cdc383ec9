"""What a client's own class frequencies do to the labels' loss. Distillation, accuracy and the
losses that an update tells are of the plain logits.

Logit adjustment (Menon et al. 2021, by the client's frequencies): z_k + tau log((n_k + s) / (n + K
s)), n_k of the n local examples, K classes, s = 0.5: a class that is rare here needs no push to
be told apart, so the shared model is not bent towards what this client happens to have.

Masked cross entropy (HeteroFL, 2021): the logits of classes without an example here are 0, so they
get no gradient. It comes after the adjustment. What the exits' last layers hold for these classes
goes back bit by bit as it came, whatever weight decay and other terms do to it: by that a
coordinator knows what this client has no say in."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.training.terms.base import Context, Term, Trained

SMOOTHING = 0.5


def log_frequencies(labels: Tensor, num_classes: int) -> Tensor:
    """(K,) of labels (n,)."""
    counts = torch.bincount(labels, minlength=num_classes).double()
    return ((counts + SMOOTHING) / (len(labels) + num_classes * SMOOTHING)).log().float()


def check_classes(context: Context, field: str) -> None:
    """Raise ConfigError for a plan that asks for a term of classes where there are none."""
    if context.spec.task != "classify":
        raise ConfigError(f"plan.{field} is of classes, the model's task is {context.spec.task}")


class LogitAdjustment(Term):
    def __init__(self, context: Context) -> None:
        check_classes(context, "logit_adjustment")
        frequencies = log_frequencies(context.labels, context.spec.num_classes)
        self._shift = (context.plan.logit_adjustment * frequencies).to(context.device)

    def adjusted(self, logits: Tensor) -> Tensor:
        return logits + self._shift


class MaskAbsent(Term):
    def __init__(self, context: Context) -> None:
        check_classes(context, "mask_absent")
        self._num_classes = context.spec.num_classes
        counts = torch.bincount(context.labels, minlength=self._num_classes)
        self._is_absent = (counts == 0).to(context.device)

    def begin_(self, trained: Trained) -> None:
        self._sent = [
            (parameter, parameter.detach()[self._is_absent].clone())
            for head in trained.heads
            if (last := self._last_layer(head)) is not None
            for parameter in last.parameters()
        ]

    def _last_layer(self, head: nn.Module) -> nn.Linear | None:
        """The layer that gives each class its logit; None in a head of another kind."""
        layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear)]
        return layers[-1] if layers and layers[-1].out_features == self._num_classes else None

    def adjusted(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(self._is_absent, 0.0)

    @torch.no_grad()
    def end_(self, num_steps: int) -> None:
        for parameter, sent in self._sent:
            parameter[self._is_absent] = sent
