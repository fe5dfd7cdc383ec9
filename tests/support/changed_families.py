"""What test families with one change each are made of: a plain family of stages and exits, layers,
and functions that change it. Features (4,), images (1, 8, 8) or any other shape, flattened."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from edge_sdk.models import StagedModel
from edge_sdk.protocol.messages import ModelSpec

WIDTH = 6
Change = Callable[[ModelSpec, list[nn.Module], list[nn.Module]], object]


class Returns(nn.Module):
    """A layer that makes something of its input."""

    def __init__(self, function: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> object:
        return self.function(x)


class Holding(nn.Module):
    """A layer in a plain list, which torch does not see."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hidden = [layer]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.hidden[0](x)
        return out


class Noise(nn.Module):
    """Adds a vector that is drawn once, and a buffer or not."""

    def __init__(self, vector: Tensor, *, is_registered: bool) -> None:
        super().__init__()
        if is_registered:
            self.register_buffer("vector", vector)
        else:
            self.vector = vector

    def forward(self, x: Tensor) -> Tensor:
        return x + self.vector


class Warm(nn.Module):
    """Grows over its first 100 training steps, which it counts in a plain attribute or a buffer."""

    def __init__(self, *, is_registered: bool) -> None:
        super().__init__()
        self.steps = 0
        if is_registered:
            del self.steps
            self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.steps += 1
        out: Tensor = x * (self.steps / 100)
        return out


class HalfInside(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = super().forward(x)
        return out.float()


class First(nn.Sequential):
    """What a recurrent layer gives at every step, without its state."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)[0]
        return out


class Replaced(StagedModel):
    def forward(self, x: Tensor) -> list[Tensor]:
        return super().forward(x - 0.5)


def parts(spec: ModelSpec) -> tuple[list[nn.Module], list[nn.Module]]:
    """Stages of a linear layer and ReLU, exits of a linear layer."""
    inputs = math.prod(spec.input_shape)
    stages: list[nn.Module] = [nn.Sequential(nn.Flatten(), nn.Linear(inputs, WIDTH), nn.ReLU())]
    stages += [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(1, spec.exit)]
    return stages, [nn.Sequential(nn.Linear(WIDTH, spec.num_classes)) for _ in stages]


def changed(change: Change) -> Callable[[ModelSpec], object]:
    """A builder whose stages and exits `change` has changed, or that returns what it returns."""

    def build(spec: ModelSpec) -> object:
        stages, exits = parts(spec)
        made = change(spec, stages, exits)
        return StagedModel(stages, exits) if made is None else made

    return build


def last(function: Callable[[Tensor], object]) -> Change:
    """`function` of what the deepest exit gives."""

    def change(spec, stages, exits):
        exits[-1] = nn.Sequential(exits[-1], Returns(function))

    return change


def stage_gives(function: Callable[[Tensor], object]) -> Change:
    def change(spec, stages, exits):
        stages[0] = nn.Sequential(stages[0], Returns(function))

    return change


def before_stage_2(layer: Callable[[], nn.Module]) -> Change:
    def change(spec, stages, exits):
        stages[1:2] = [nn.Sequential(layer(), stage) for stage in stages[1:2]]

    return change


def before_exits(layer: Callable[[], nn.Module]) -> Change:
    def change(spec, stages, exits):
        exits[:] = [nn.Sequential(layer(), head) for head in exits]

    return change


def after_exits(layer: nn.Module) -> Change:
    def change(spec, stages, exits):
        exits[:] = [nn.Sequential(head, layer) for head in exits]

    return change
