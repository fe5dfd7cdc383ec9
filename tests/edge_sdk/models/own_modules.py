"""Modules as people write them, none of them a StagedModel."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class Block(nn.Module):
    """conv-BatchNorm-ReLU twice with a skip connection, its stride in the first."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.skip(x)
        return self.relu(out)


class Residual(nn.Module):
    """(3, 8, 8) to 4 classes. Its head takes the batch size from the input's shape and drops out as
    the module's mode says."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
        self.layer1 = nn.Sequential(Block(4, 4, 1), Block(4, 4, 1))
        self.layer2 = nn.Sequential(Block(4, 8, 2), Block(8, 8, 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        count = x.shape[0]
        x = self.layer2(self.layer1(self.stem(x)))
        x = functional.adaptive_avg_pool2d(x, 1).view(count, 8)
        return self.fc(functional.dropout(x, 0.5, self.training))


class Series(nn.Module):
    """(2, 16) to 3 classes, by one-dimensional convolutions in a flat list: an in-place ReLU may
    come first behind a cut."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(2, 4, 3, padding=1),
            nn.BatchNorm1d(4),
            nn.ReLU(inplace=True),
            nn.Conv1d(4, 4, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool1d(2),
            nn.Conv1d(4, 8, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.net(x).mean(-1))


class Attention(nn.Module):
    """A layer of a transformer over (B, T, D) that is told its positions."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(features)
        self.mix = nn.MultiheadAttention(features, 2, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(features, 8), nn.GELU(), nn.Linear(8, features))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        normed = self.norm(x) + positions
        x = x + self.mix(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(x)


class Positions(nn.Module):
    """(1, T, D) of the shape of x: of its values nothing."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("rate", torch.arange(1.0, features + 1))

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        return torch.sin(at[..., None] * self.rate).to(x.dtype)


class Text(nn.Module):
    """Ids below 11, (T,), to 5 outputs of a class token: parameters of the module itself, branches
    that torch.fx cannot trace, and positions that every layer is given anew."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.class_token = nn.Parameter(torch.ones(1, 1, 4))
        self.positions = Positions(4)
        self.layers = nn.ModuleList(Attention(4) for _ in range(layers))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.embed(ids)
        x = torch.cat([self.class_token.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + T, D)
        at = torch.arange(x.shape[1], device=x.device)[None]
        positions = self.positions(x, at)
        if mask is not None and bool(mask.any()):
            x = x * mask
        for layer in self.layers:
            x = layer(x, positions=positions)
        return {"logits": self.head(self.norm(x)[:, 0])}
