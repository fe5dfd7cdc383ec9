"""`dema`: a dense mixture of adapters behind a block. A reconstruction: of HeteroTune's adapter
(arXiv 2411.16796) only the abstract is known to us, so this is what it says and no more.

    x <- x + sum_m g_m gelu((x D) E_m) U,    g = softmax of the logits

with D (features, rank) and E_m (rank, rank) drawn, U (rank, features) and the logits of zeros: the
model begins as it was. E and the logits have the same shape in models of any size. There is no
bias, so what is zero, as padding is, stays zero."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_sdk.errors import ConfigError
from edge_sdk.models.attention import Block
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.fields import Adapters
from edge_sdk.protocol.tensor_lists import ADAPTER

SHARED = ("branches", "gate")


class DeMA(nn.Module):
    """Features (B, ..., features) to as many, what it makes of them added; is_channels_first: they
    are the second axis."""

    def __init__(self, features: int, adapters: Adapters, *, is_channels_first: bool) -> None:
        super().__init__()
        rank, count = adapters.rank, adapters.branches
        self.down = nn.Parameter(torch.randn(features, rank) / math.sqrt(features))
        self.branches = nn.Parameter(torch.randn(count, rank, rank) / math.sqrt(rank))
        self.gate = nn.Parameter(torch.zeros(count))
        self.up = nn.Parameter(torch.zeros(rank, features))
        self.is_channels_first = is_channels_first

    def forward(self, x: Tensor) -> Tensor:
        last = x.movedim(1, x.ndim - 1) if self.is_channels_first else x
        # All branches side by side: (rank, count rank) and (count rank, features). U is weighed
        # rather than what each branch gives, which would have to be kept for the gradients.
        inward = self.branches.transpose(0, 1).flatten(1)
        outward = (self.gate.softmax(0)[:, None, None] * self.up).flatten(0, 1)
        made: Tensor = functional.gelu(last @ self.down @ inward) @ outward
        # ONNX takes no axis counted from the end here
        return x + (made.movedim(made.ndim - 1, 1) if self.is_channels_first else made)


def default_targets(model: StagedModel) -> list[str]:
    """Every block of attention; where there is none, every stage."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    return blocks or [f"stages.{number}" for number in range(len(model.stages))]


def attach(layer: nn.Module, name: str, adapters: Adapters) -> None:
    """Raises ConfigError for a module whose features are not known."""
    if isinstance(layer, Block):
        features, is_channels_first = layer.attention.o.out_features, False
    else:
        features, is_channels_first = _features(layer, name)
    layer.add_module(ADAPTER, DeMA(features, adapters, is_channels_first=is_channels_first))
    if type(layer).forward is not nn.Sequential.forward:  # which runs all of its children
        layer.register_forward_hook(adapt_output)


def _features(layer: nn.Module, name: str) -> tuple[int, bool]:
    """Of the last layer with weights within, and whether they are its second axis: convolutions and
    BatchNorm have them there."""
    for module in reversed(list(layer.modules())):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.numel() > 1:
            return len(weight), not isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding))
    raise ConfigError(
        f"--adapt-targets: {name} has no layer with weights, whose features dema takes"
    )


def adapt_output(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A hook: the module's output as its adapter changes it."""
    made: Tensor = layer.get_submodule(ADAPTER)(output)
    return made


def merge(layer: nn.Module) -> bool:
    """Never: no layer's weight is the same as a layer that is not linear."""
    return False
