"""What the models of a round's clients answer together on examples of the server, and a model that
is trained to answer so: ensemble distillation (Lin et al. 2020).

Models are not kept: each is built as its update arrives, answers every example and is dropped.
Memory: the examples, two times (examples, classes) for each exit, and while it trains a model with
its gradient and both moments."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from msgspec.structs import replace
from torch import Tensor, nn
from torch.nn.functional import kl_div

from coordinator.aggregation.mean import OwnersMean
from edge_sdk.models import StagedModel, build, family_code
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import ModelSpec, Plan
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors
from edge_sdk.training.optim import Optimizer

AT_ONCE = 100  # examples that a client's model answers


class Ensemble:
    """One round's. spec: the whole model; x: (n, *input_shape), the examples."""

    def __init__(self, spec: ModelSpec, x: Tensor, device: str | torch.device) -> None:
        self._spec, self._x, self._device = spec, x, device
        self._answers = OwnersMean()  # by exit, (n, K) logits

    @torch.no_grad()
    def add_(self, exit: int, tensors: Mapping[str, Tensor]) -> bool:
        """Let a model of the stages up to `exit` answer, each of its exits as one voice among those
        who own it. False: an answer is not finite, and none counts."""
        model = self._model(exit, tensors)
        parts = [self._logits(model, x) for x in self._x.split(AT_ONCE)]
        answers = {str(e): torch.cat(z).cpu() for e, z in enumerate(zip(*parts, strict=True), 1)}
        if not all(bool(torch.isfinite(z).all()) for z in answers.values()):
            return False
        self._answers.add_(answers, 1.0)
        return True

    def taught(
        self, tensors: Mapping[str, Tensor], plan: Plan, steps: int, batch: int, seed: int
    ) -> Tensors:
        """The tensors of the stages up to the deepest exit that anybody answered with, trained from
        `tensors` on; {} if nobody did. Each step on `batch` examples lessens the sum over the exits
        of KL(softmax(mean answers) || softmax(own)), in nats, at the plan's rate along a half
        cosine to 0."""
        taught = [e for e in map(str, range(1, self._spec.exit + 1)) if self._answers.weight(e)]
        if not taught or not steps:
            return {}
        means = self._answers.result({e: torch.empty(0) for e in taught})
        teachers = [means[e].log_softmax(-1) for e in taught]
        model = self._model(len(taught), tensors)
        optimizer = Optimizer(list(model.parameters()), plan)
        for step, places in enumerate(self._batches(steps, batch, seed)):
            fall = (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.plan = replace(plan, lr=plan.lr * fall)
            losses = [
                kl_div(
                    own.log_softmax(-1),
                    teacher[places].to(own.device),
                    reduction="batchmean",
                    log_target=True,
                )
                for own, teacher in zip(self._logits(model, self._x[places]), teachers, strict=True)
            ]
            torch.stack(losses).sum().backward()
            optimizer.step_()
        return {name: tensor.cpu() for name, tensor in model.tensors().items()}

    def _model(self, exit: int, tensors: Mapping[str, Tensor]) -> StagedModel:
        """As it answers in use: without dropout, and BatchNorm by its statistics."""
        model = build(replace(self._spec, exit=exit))
        model.load({name: t for name, t in tensors.items() if stage_of(name)[1] <= exit})
        model.ready(self._device).eval()
        for module in model.modules():
            if isinstance(module, nn.RNNBase) and not module.dropout:
                module.train()  # the same numbers, and cuDNN has gradients in this mode alone
        return model

    def _logits(self, model: StagedModel, x: Tensor) -> list[Tensor]:
        with family_code(self._spec, "answering", model):
            logits: list[Tensor] = model(moved(x, self._device))
        return logits

    def _batches(self, steps: int, batch: int, seed: int) -> Iterator[Tensor]:
        """Places among the examples for each step, each once before one comes again."""
        rng, left = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
        batch = min(batch, len(self._x))
        for _ in range(steps):
            if len(left) < batch:
                left = torch.randperm(len(self._x), generator=rng)
            yield left[:batch]
            left = left[batch:]
