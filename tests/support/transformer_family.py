"""A small vision transformer: patches of 4 x 4, one encoder layer a stage, exits over the mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edge_sdk.models import StagedModel, register_family
from edge_sdk.protocol.messages import ModelSpec

WIDTH = 8


class Patches(nn.Module):
    """(B, C, H, W) to (B, patches, WIDTH)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, WIDTH, 4, stride=4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x).flatten(2).transpose(1, 2)
        return out


class Mean(nn.Module):
    """(B, patches, WIDTH) to (B, WIDTH)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.1, batch_first=True)


def build(spec: ModelSpec) -> StagedModel:
    stages: list[nn.Module] = [nn.Sequential(Patches(spec.input_shape[0]), encoder())]
    stages += [encoder() for _ in range(1, spec.exit)]
    exits = [nn.Sequential(Mean(), nn.Linear(WIDTH, spec.num_classes)) for _ in stages]
    return StagedModel(stages, exits)


class Fourier(nn.Module):
    """An operator that ONNX has not in opset 17."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).real


def build_fourier(spec: ModelSpec) -> StagedModel:
    model = build(spec)
    model.exits[0].insert(1, Fourier())
    return model


register_family("encoder", build)
register_family("fourier", build_fourier)
