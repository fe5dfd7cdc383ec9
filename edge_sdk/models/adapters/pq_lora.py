"""`pq-lora`: adapters whose trained part has the same shape in models of any size (after FedMosaic,
arXiv 2506.11024; the formula is that of third-party code, which differs from one to the next).

    y = W x + B (P A x + Q)

A (rank, inputs) has orthonormal rows and B (outputs, rank) orthonormal columns; both are drawn,
never trained, and stay on the device. P (rank, rank) and Q (rank) begin at zero, so the model
begins as it was; with ones on P's diagonal it would begin worse. Left out: a second, local pair of
P and Q with a gate between both. After training W + B P A and a bias of B Q more are the same layer
without an adapter."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models.adapters.base import BASIS, check_rank, sides
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.fields import Adapters

SHARED = ("p", "q")


class Basis(nn.Module):
    """The two matrices between a layer's features and the adapter's."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a = nn.Parameter(nn.init.orthogonal_(torch.empty(rank, inputs)))
        self.b = nn.Parameter(nn.init.orthogonal_(torch.empty(outputs, rank)))


class PQ(nn.Module):
    """(..., rank) to the same."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.zeros(rank, rank))
        self.q = nn.Parameter(torch.zeros(rank))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.p.T + self.q


def default_targets(model: StagedModel) -> list[str]:
    """All linear layers of the stages."""
    named = model.named_modules()
    return [n for n, m in named if n.startswith("stages.") and isinstance(m, nn.Linear)]


def attach(layer: nn.Module, name: str, adapters: Adapters) -> None:
    """Raises ConfigError for other than linear layers, and a rank above the smaller side."""
    if not isinstance(layer, nn.Linear):
        said = f"{name} is {type(layer).__name__}, pq-lora wants a linear layer"
        raise ConfigError(f"--adapt-targets: {said}")
    check_rank(layer, name, adapters.rank)
    layer.add_module(BASIS, Basis(*sides(layer), adapters.rank))
    layer.adapter = PQ(adapters.rank)
    layer.register_forward_hook(add_between_bases)


def add_between_bases(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A hook: the layer's output and what the adapter makes of the input, from basis to basis."""
    basis = layer.get_submodule(BASIS)
    a, b = basis.get_parameter("a"), basis.get_parameter("b")
    made: Tensor = layer.get_submodule("adapter")(inputs[0] @ a.T) @ b.T
    return output + made


@torch.no_grad()
def merge(layer: nn.Module) -> bool:
    """Into the weight, and into the bias, which a layer without one gets."""
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer.adapter, PQ)
    basis = layer.get_submodule(BASIS)
    a, b = basis.get_parameter("a").double(), basis.get_parameter("b").double()
    p, q = layer.adapter.p.double(), layer.adapter.q.double()
    layer.weight.add_((b @ p @ a).to(layer.weight.dtype))
    shift = (b @ q).to(layer.weight.dtype)
    bias = shift if layer.bias is None else layer.bias + shift
    layer.bias = nn.Parameter(bias, requires_grad=layer.weight.requires_grad)
    return True
