"""The layers of a narrow model whose outputs are divided by its width (HeteroFL's Scaler): with
fewer inputs their sums are smaller, and all widths share one set of weights."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

from edge_sdk.models.staged import StagedModel


def scaled_layers(model: StagedModel) -> dict[str, nn.Module]:
    """The convolutions and linear layers of the stages, by their names in the model."""
    return {
        f"stages.{name}": layer
        for name, layer in model.stages.named_modules()
        if isinstance(layer, (_ConvNd, nn.Linear))
    }


def scaled_names(model: StagedModel) -> list[str]:
    """Their weights and biases: divided by the width they stand for layers that divide."""
    return [
        f"{name}.{parameter}"
        for name, layer in scaled_layers(model).items()
        for parameter, _ in layer.named_parameters()
    ]
