"""One forward pass and one step of Adam of a tiny model of each family, and two steps of sgd for
fields of a plan that change training: all that goes in and comes out."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor
from torch.nn import functional

from edge_sdk.data.examples import Examples
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.losses import local_loss
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.training.optim import Optimizer
from edge_sdk.training.trainer import train

BATCH, CLASSES = 5, 3
LEAST_GRADIENT = 1e-5  # below it Adam turns a rounding into a whole step: nothing is said of that
PLAN = Plan(
    segments=(Segment(first=1, last=2),),
    batch_size=BATCH,
    lr=0.01,
    exit_weights=(0.5, 1.0),
)
SGD = Plan(
    segments=(Segment(first=1, last=2),),
    batch_size=BATCH,
    epochs=2,
    lr=0.1,
    optimizer="sgd",
    exit_weights=(0.5, 1.0),
)
FIELDS: dict[str, dict[str, Any]] = {
    "prox_mu": {"prox_mu": 2.0},
    "logit_adjustment": {"logit_adjustment": 1.5},
    "mask_absent": {"mask_absent": True, "weight_decay": 0.1},
    "clip_value and clip_norm": {"clip_value": 0.05, "clip_norm": 0.2, "prox_mu": 2.0},
    "correction": {"correction": True, "clip_norm": 0.2, "weight_decay": 0.1},
    "dyn_alpha": {"dyn_alpha": 0.5},
    "static_norm": {"static_norm": True},
    "deepest-to-shallow": {"distill": "deepest-to-shallow", "distill_weight": 2.0},
}
BLOCKS = {"layers": (2, 1), "dim": 4, "heads": 2, "ffn": 3, "patch": 2}
# Odd sides show the bins of average pools, and where a max pool drops a row.
MODELS = {
    "mlp": ((3,), {"widths": (4, 3)}),
    "cnn": ((1, 7, 7), {"channels": (2, 3)}),
    "cnn of a series": ((2, 9), {"channels": (2, 3)}),
    "vgg": ((1, 9, 8), {"channels": (2, 2, 3)}),
    "resnet18": ((1, 7, 6), {"channels": (2, 3, 2), "blocks": (1, 1, 1)}),
    "lstm": ((2, 4), {"hidden": 3}),
    "vit": ((1, 5, 4), BLOCKS),
    "transformer": ((2, 5), BLOCKS),
    "llama": ((2, 5), BLOCKS | {"heads": 2, "kv_heads": 1}),
}


def training() -> dict[str, Any]:
    cases = {
        what: one_step(
            ModelSpec(
                family=what.split()[0],
                input_shape=shape,
                num_classes=CLASSES,
                exit=2,
                options=options,  # type: ignore[arg-type]
            )
        )
        for what, (shape, options) in MODELS.items()
    }
    return {"plan": msgspec.to_builtins(PLAN), "models": cases, "fields": fields()}


def fields() -> dict[str, Any]:
    """By what the plan asks for. Both steps are of the whole batch, so the order of the examples
    has no part; class 1 has no example."""
    shape, options = MODELS["mlp"]
    spec = ModelSpec(family="mlp", input_shape=shape, num_classes=CLASSES, exit=2, options=options)  # type: ignore[arg-type]
    drawn = torch.Generator().manual_seed(7)
    x = torch.randint(-20, 21, (BATCH, *shape), generator=drawn) / 10
    before = {name: few_digits(name, t) for name, t in initial_tensors(spec, 7).items()}
    parameters = [name for name, _ in build(spec).named_parameters()]
    examples = Examples(x.numpy(), np.array([0, 2, 0, 0, 2]), CLASSES)
    cases = {}
    for what, asked in FIELDS.items():
        plan = replace(SGD, **asked)
        own = {
            f"{kept}/{name}": few(before[name], k)
            for kept, k in own_of(plan)
            for name in parameters
        }
        shared = {f"correction/{n}": few(before[n], 3) for n in parameters if plan.correction}
        result = train(spec, plan, before | shared, examples, state=own, state_round=1)
        cases[what] = {
            "plan": msgspec.to_builtins(plan),
            "job": {name: told(tensor) for name, tensor in (before | shared).items()},
            "kept_before": {name: told(tensor) for name, tensor in own.items()},
            "update": {name: told(tensor) for name, tensor in result.tensors.items()},
            "kept_after": {name: told(tensor) for name, tensor in result.state.items()},
        }
    return {
        "model": msgspec.to_builtins(spec),
        "inputs": told(x),
        "labels": examples.y.tolist(),
        "cases": cases,
    }


def own_of(plan: Plan) -> list[tuple[str, int]]:
    """What a client keeps for this plan, and a number to make other values of for each."""
    return [("correction", 2)] * plan.correction + [("dyn", 5)] * bool(plan.dyn_alpha)


def few(tensor: Tensor, number: int) -> Tensor:
    """Values of few digits, of this shape."""
    places = torch.arange(tensor.numel()).reshape(tensor.shape)
    return (places * number % 7 - 3) / 20


def one_step(spec: ModelSpec) -> dict[str, Any]:
    """Inputs and weights have few digits; statistics are not those of a fresh model."""
    drawn = torch.Generator().manual_seed(7)
    x = torch.randint(-20, 21, (BATCH, *spec.input_shape), generator=drawn) / 10
    y = torch.arange(BATCH) % CLASSES
    before = {name: few_digits(name, t) for name, t in initial_tensors(spec, 7).items()}
    model = build(spec)
    model.load(before)
    model.eval()
    with torch.no_grad():
        evaluated = [logit.clone() for logit in model(x)]
    model.train()
    logits = model(x)
    parameters = dict(model.named_parameters())
    loss = local_loss(logits, y, PLAN.exit_weights, PLAN)
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    Optimizer(list(parameters.values()), PLAN).step_()
    after = {name: told(tensor) for name, tensor in model.tensors().items()}
    for name, gradient in gradients.items():
        for place, size in enumerate(gradient.flatten().abs()):
            if size <= LEAST_GRADIENT:
                after[name]["values"][place] = None
    return {
        "model": msgspec.to_builtins(spec),
        "inputs": told(x),
        "labels": y.tolist(),
        "tensors": {name: told(tensor) for name, tensor in before.items()},
        "logits_in_evaluation": [told(logit) for logit in evaluated],
        "logits_in_training": [told(logit) for logit in logits],
        "loss_of_each_exit": [number(functional.cross_entropy(z, y)) for z in logits],
        "loss": number(loss),
        "gradients": {name: told(tensor, near_zero=1e-6) for name, tensor in gradients.items()},
        "tensors_after": after,
    }


def few_digits(name: str, tensor: Tensor) -> Tensor:
    places = torch.arange(tensor.numel()).reshape(tensor.shape) / 10
    if name.endswith("running_mean"):
        return places - 0.1
    if name.endswith("running_var"):
        return places + 0.5
    return (tensor * 100).round() / 100


def told(tensor: Tensor, near_zero: float = 0.0) -> dict[str, Any]:
    kept = torch.where(tensor.abs() < near_zero, 0.0, tensor).detach()
    return {"shape": list(tensor.shape), "values": [number(value) for value in kept.flatten()]}


def number(value: Tensor) -> float:
    """With the digits that give the float32 back."""
    return float(str(np.float32(value.item())))
