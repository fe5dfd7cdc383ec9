"""What the kinds of adapters share.

An adapter is a child module `adapter` of the module that it belongs to, and is at work by a hook,
so modules and tensors of the model keep their names. What of it is never trained is a child
`basis`."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from edge_sdk.errors import ConfigError
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.fields import Adapters
from edge_sdk.protocol.tensor_lists import ADAPTER

BASIS = "basis"


class Kind(Protocol):
    """The module of a kind. SHARED: of an adapter's tensors those whose shape depends on nothing
    but the Adapters struct, so that models of any size can have them in common."""

    SHARED: tuple[str, ...]

    def default_targets(self, model: StagedModel) -> list[str]:
        """Names of the modules that have one unless others are asked for."""

    def attach(self, layer: nn.Module, name: str, adapters: Adapters) -> None:
        """Give the module an adapter, at work. Raises ConfigError for a module that cannot."""

    def merge(self, layer: nn.Module) -> bool:
        """Make what the adapter does a part of the module's own weights; False: it cannot be."""


def add_made_of_input(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A hook: the module's output and what its adapter makes of the input."""
    made: Tensor = layer.get_submodule(ADAPTER)(inputs[0])
    return output + made


def sides(layer: nn.Module) -> tuple[int, int]:
    """Inputs of one output, over the kernel, and outputs of a linear layer or convolution."""
    weight = layer.get_parameter("weight")
    return weight[0].numel(), len(weight)


def check_rank(layer: nn.Module, name: str, rank: int) -> None:
    """Raise ConfigError for a rank that no matrix of the layer's shape has."""
    inputs, outputs = sides(layer)
    if rank > min(inputs, outputs):
        raise ConfigError(
            f"--adapt-rank {rank} is above {name}, which is {inputs} to {outputs}; give at most "
            f"{min(inputs, outputs)}, or other --adapt-targets"
        )
