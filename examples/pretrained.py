"""A pre-trained start: weights of a plain module by its own names. Its body, which learned to tell
even digits from odd ones, stays frozen and is sent once; clients train the exits alone.

    python examples/pretrained.py body.pt
    PYTHONPATH=examples edge-coordinator emulate --import pretrained --model body --exits 2 \
        --data digits --init body.pt --freeze backbone
"""

import sys

import torch
from torch import nn

from edge_sdk.data.loading import load_dataset
from edge_sdk.models import ModelSpec, StagedModel, register_family


def body() -> nn.Sequential:
    first = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2), nn.BatchNorm2d(32), nn.ReLU())
    return nn.Sequential(first, second, nn.Flatten(), nn.Linear(288, 2))


def build(spec: ModelSpec) -> StagedModel:
    exits = [nn.Sequential(nn.Flatten(), nn.Linear(n, spec.num_classes)) for n in (1024, 288)]
    return StagedModel(list(body())[: spec.exit], exits[: spec.exit])


register_family("body", build, names=lambda spec: {f"stages.{n}": n for n in body().state_dict()})
if __name__ == "__main__":
    model, data = body(), load_dataset("digits", seed=0).train
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(200):
        some = data.take(torch.randint(len(data), (64,)).numpy())
        logits = model(torch.from_numpy(some.x))
        nn.functional.cross_entropy(logits, torch.from_numpy(some.y) % 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), sys.argv[1])
