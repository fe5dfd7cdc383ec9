"""Parameters without a model, for tests of what a plan does to gradients and steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from edge_sdk.models import build
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.tensors import Tensors
from edge_sdk.training.terms.base import Context, Trained

ONE = (Segment(first=1, last=1),)
LINEAR = ModelSpec(family="mlp", input_shape=(2,), num_classes=3, exit=1, options={"widths": (2,)})


def context(labels: list[int] | None = None, kept: Tensors | None = None, **plan: Any) -> Context:
    """Of a job of this plan; sgd at lr 0.1, unless said otherwise."""
    made = Plan(segments=ONE, **{"optimizer": "sgd", "lr": 0.1} | plan)
    return Context(LINEAR, made, build(LINEAR), torch.tensor(labels or [0, 1, 2]), kept or {})


def trained(**values: list[float]) -> Trained:
    """A segment of these parameters."""
    named = {name: nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    return Trained(ONE[0], nn.ModuleList(), nn.ModuleList(), named, 0, lambda rows: [rows])
