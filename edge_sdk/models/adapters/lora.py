"""`lora`: low-rank adapters (Hu et al. 2021, arXiv 2106.09685). Beside a layer of weight W runs
x -> B A x with A (rank, inputs) drawn and B (outputs, rank) of zeros: the model begins as it was.
A convolution has an A with its own kernel and a B of kernel 1. The published factor alpha / rank is
1 here: it is a matter of the rate. After training W + B A is the same layer without an adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models.adapters.base import add_made_of_input, check_rank
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.fields import Adapters

CONVS = (nn.Conv1d, nn.Conv2d)
SHARED: tuple[str, ...] = ()  # of its tensors, those whose shape is that of no layer


class LoRA(nn.Module):
    """What the layer takes to what is added to what it gives."""

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        self.down, self.up = _pair(layer, rank)
        nn.init.zeros_(self.up.get_parameter("weight"))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.up(self.down(x))
        return made


def default_targets(model: StagedModel) -> list[str]:
    """All linear layers of the stages; where there is none, all convolutions."""
    named = [(name, layer) for name, layer in model.named_modules() if name.startswith("stages.")]
    linear = [name for name, layer in named if isinstance(layer, nn.Linear)]
    return linear or [
        name for name, layer in named if isinstance(layer, CONVS) and layer.groups == 1
    ]


def attach(layer: nn.Module, name: str, adapters: Adapters) -> None:
    """Raises ConfigError for other layers, and a rank above the layer's smaller side."""
    if not isinstance(layer, (nn.Linear, *CONVS)) or getattr(layer, "groups", 1) != 1:
        wanted = "a linear layer or a convolution without groups"
        raise ConfigError(f"--adapt-targets: {name} is {type(layer).__name__}, lora wants {wanted}")
    check_rank(layer, name, adapters.rank)
    layer.adapter = LoRA(layer, adapters.rank)
    layer.register_forward_hook(add_made_of_input)


@torch.no_grad()
def merge(layer: nn.Module) -> bool:
    """Add what the adapter gives to the layer's own weight. Always exact."""
    assert isinstance(layer, (nn.Linear, *CONVS))
    assert isinstance(layer.adapter, LoRA)
    up, down = layer.adapter.up.weight.double(), layer.adapter.down.weight.double()
    assert isinstance(up, Tensor)
    assert isinstance(down, Tensor)
    added = (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
    layer.weight.add_(added.to(layer.weight.dtype))
    return True


def _pair(layer: nn.Module, rank: int) -> tuple[nn.Module, nn.Module]:
    """Layers that `layer` is the product of, but for its bias."""
    if isinstance(layer, nn.Linear):
        inputs, outputs = layer.in_features, layer.out_features
        return nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
    assert isinstance(layer, CONVS)
    kind = type(layer)
    down = kind(
        layer.in_channels,
        rank,
        layer.kernel_size,  # type: ignore[arg-type]
        stride=layer.stride,  # type: ignore[arg-type]
        padding=layer.padding,  # type: ignore[arg-type]
        dilation=layer.dilation,  # type: ignore[arg-type]
        bias=False,
        padding_mode=layer.padding_mode,
    )
    return down, kind(rank, layer.out_channels, 1, bias=False)
