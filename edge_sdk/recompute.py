"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174) for one stage: keep its input, run
it again when its gradient is wanted.

Own code because the first use of torch.utils.checkpoint imports torch._dynamo (78 MB and 1.8 s with
torch 2.13), and because the second run must not count in BatchNorm's statistics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def recomputed(stage: nn.Module, features: Tensor) -> Tensor:
    """stage(features) with the same gradients bit by bit; of the graph only `features` is kept."""
    made: Tensor = _Recomputed.apply(stage, features, *stage.parameters())  # type: ignore[no-untyped-call]
    return made


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stage: nn.Module, features: Tensor, *_: Tensor) -> Tensor:
        ctx.stage, ctx.random = stage, _random_state(features.device)
        ctx.save_for_backward(features)
        made: Tensor = stage(features)
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (features,) = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:]
        cuda = [features.device] if features.is_cuda else []
        with (
            torch.enable_grad(),
            torch.random.fork_rng(devices=cuda),
            _still_statistics(ctx.stage),
        ):
            _set_random_state(ctx.random, features.device)
            again = features.detach().requires_grad_(wanted[0])
            made = ctx.stage(again)
        inputs = [again, *ctx.stage.parameters()]
        chosen = [tensor for tensor, is_wanted in zip(inputs, wanted, strict=True) if is_wanted]
        found = iter(torch.autograd.grad(made, chosen, gradients))
        return (None, *(next(found) if is_wanted else None for is_wanted in wanted))


@contextmanager
def _still_statistics(stage: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, but does not count it."""
    tracking = [m for m in stage.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    for norm in tracking:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in tracking:
            norm.track_running_stats = True


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
