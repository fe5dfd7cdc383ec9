"""`lstm`: stacked LSTM layers (Hochreiter and Schmidhuber 1997) for series (C, window).

Stage e is one layer over the whole sequence. Between stages a sequence is (B, hidden, window), the
axes of the input, so that stage 1 is like any other. Each exit is linear on the last time step,
which has seen the whole window. Main weights: weight_ih and weight_hh of each layer, with their
four gates (input, forget, cell, output) one below the other, (4 hidden, inputs)."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta
from torch import Tensor, nn

from edge_sdk.models import register_family
from edge_sdk.models.layers import input_axes
from edge_sdk.models.options import FamilyOptions, Sizes, widths
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec


class Layer(nn.Module):
    """(B, inputs, window) to (B, hidden, window)."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.lstm(x.transpose(1, 2))[0]  # (B, window, hidden)
        return out.transpose(1, 2)


class LastStep(nn.Module):
    """(B, hidden, window) to (B, hidden)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., -1]


class LstmOptions(FamilyOptions, frozen=True):
    hidden: Annotated[Sizes, Meta(description="features of every layer (64)")] = 64


def build_lstm(spec: ModelSpec, options: LstmOptions) -> StagedModel:
    """Raises ConfigError for other inputs than (C, window)."""
    input_axes(spec, 2)
    hidden = widths(spec, "hidden", options.hidden, (64,), 1)[0]
    inputs = [spec.input_shape[0]] + [hidden] * (spec.exit - 1)
    stages = [Layer(size, hidden) for size in inputs]
    exits = [nn.Sequential(LastStep(), nn.Linear(hidden, spec.num_classes)) for _ in stages]
    return StagedModel(stages, exits)


register_family("lstm", build_lstm, LstmOptions)
