"""Activation checkpointing (Chen et al. 2016, arXiv 1604.06174) for one stage: keep its input, run
it again when its gradient is wanted.

Own code because the first use of torch.utils.checkpoint imports torch._dynamo (78 MB and 1.8 s with
torch 2.13), that of an autograd.Function sympy (36 MB), and because the second run must not count
in BatchNorm's statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _NormBase

from edge_sdk.errors import TrainerError


def recomputed(stage: nn.Module, features: Tensor) -> Tensor:
    """stage(features), with the same gradients bit by bit; of the graph only `features` stays in
    memory. Good for one backward pass."""
    replay = _Replay(stage, features)
    with saved_tensors_hooks(replay.pack, replay.unpack):
        made: Tensor = stage(features)
    return made


class _Replay:
    """Runs a stage a second time. Of the tensors that the first run saves for its gradients only
    the order is remembered; the second run saves the same in the same order."""

    def __init__(self, stage: nn.Module, features: Tensor) -> None:
        self._stage, self._features = stage, features
        self._random = _random_state(features.device)
        self._count = 0
        self._again: dict[int, Tensor] = {}

    def pack(self, _: Tensor) -> int:
        self._count += 1
        return self._count

    def unpack(self, number: int) -> Tensor:
        """A tensor that the first run saved. Each is asked for once, so it is dropped here."""
        if number not in self._again:
            self._run()
        return self._again.pop(number)

    def _run(self) -> None:
        features = self._features.detach().requires_grad_(self._features.requires_grad)
        cuda = [features.device] if features.is_cuda else []

        def keep(tensor: Tensor) -> None:
            self._again[len(self._again) + 1] = tensor.detach()

        with (
            torch.enable_grad(),
            torch.random.fork_rng(devices=cuda),
            _still_statistics(self._stage),
            saved_tensors_hooks(keep, lambda _: torch.empty(0)),
        ):
            _set_random_state(self._random, features.device)
            self._stage(features)
        if len(self._again) != self._count:
            raise TrainerError("a stage run again did something else; train without recompute")


@contextmanager
def _still_statistics(stage: nn.Module) -> Iterator[None]:
    """A context in which BatchNorm runs as ever, after which its statistics are what they were."""
    norms = [m for m in stage.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    buffers = [buffer for norm in norms for buffer in norm.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), cuda


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
