"""What narrow models need beside their cut.

Static norms (HeteroFL, 2021): in training BatchNorm goes by the batch and leaves its statistics
alone; at the end of a segment they become the mean over the batches of one pass over the local
examples, in order, with the trained weights, in training mode but without dropout. Means of
statistics over models of unlike width would be wrong for each; these belong to the weights that go
back with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from edge_sdk.data.examples import MIN_BATCH
from edge_sdk.models.scaling import scaled_layers
from edge_sdk.training.terms.base import Context, Term, Trained


class Scaler(Term):
    """Divides the outputs of the layers of models/scaling.py by the model's width whenever the
    model runs here, also where it answers examples set aside: what a client uses is the scaled
    model. "training" and "always" differ in what a coordinator makes of the whole model."""

    def __init__(self, context: Context) -> None:
        width = context.spec.width

        def scaled(layer: nn.Module, given: Any, made: Tensor) -> Tensor:
            return made / width

        if width < 1:
            for layer in scaled_layers(context.model).values():
                layer.register_forward_hook(scaled)


class StaticNorm(Term):
    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self._num_examples = len(context.labels)

    def begin_(self, trained: Trained) -> None:
        self._trained = trained
        modules = [*trained.stages.modules(), *trained.heads.modules()]
        norms = [m for m in modules if isinstance(m, _NormBase) and m.track_running_stats]
        self._norms = [(norm, norm.momentum) for norm in norms]
        self._set_momentum(0.0)

    @torch.no_grad()
    def end_(self, num_steps: int) -> None:
        trained = self._trained
        dropouts = [m for m in trained.stages.modules() if isinstance(m, _DropoutNd)]
        for dropout in dropouts:
            dropout.eval()
        rows = torch.arange(self._num_examples).split(self.plan.batch_size)
        whole = [batch for batch in rows if len(batch) >= MIN_BATCH or len(rows) == 1]
        for number, batch in enumerate(whole, 1):
            self._set_momentum(1 / number)
            features = trained.inputs(batch)[-1]
            for stage, head in zip(trained.stages, trained.heads, strict=True):
                features = stage(features)
                head(features)
        for norm, momentum in self._norms:
            norm.momentum = momentum

    def _set_momentum(self, momentum: float) -> None:
        for norm, _ in self._norms:
            norm.momentum = momentum
