"""Model families with one mistake each, and some that only look like it; of features (4,), images
(1, 8, 8) or any other shape, flattened. Import it inside a test that has `own_things`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from edge_sdk.models import StagedModel, register_family
from edge_sdk.protocol.messages import ModelSpec
from tests.support.changed_families import (
    WIDTH,
    Change,
    First,
    HalfInside,
    Holding,
    Noise,
    Replaced,
    Returns,
    Warm,
    after_exits,
    before_exits,
    before_stage_2,
    changed,
    last,
    parts,
    stage_gives,
)


def raises(spec: ModelSpec, stages: list[nn.Module], exits: list[nn.Module]) -> None:
    raise KeyError("no_such_option")


def leaves_the_program(spec: ModelSpec, stages: list[nn.Module], exits: list[nn.Module]) -> None:
    raise SystemExit("no GPU")


def logits(more: int) -> Change:
    def change(spec, stages, exits):
        exits[0] = nn.Linear(WIDTH, spec.num_classes + more)

    return change


def frozen(spec, stages, exits):
    for module in (stages[0], exits[0]):
        module.requires_grad_(False)


def frozen_stages(spec, stages, exits):
    for module in stages:
        module.requires_grad_(False)


def outside(spec, stages, exits):
    model = StagedModel(stages, exits)
    model.extra = nn.Linear(3, 3)
    return model


def lazy(spec, stages, exits):
    exits[-1] = nn.LazyLinear(spec.num_classes)


def one_head(spec, stages, exits):
    exits[:] = [exits[0]] * len(exits)


def one_block(spec, stages, exits):
    stages[1:] = [stages[-1]] * (len(stages) - 1)


def one_buffer(spec, stages, exits):
    noise = Noise(torch.ones(WIDTH), is_registered=True)
    exits[:] = [nn.Sequential(noise, head) for head in exits]


def one_memory(spec, stages, exits):
    for head in exits[1:]:
        head[0].bias.data = exits[0][0].bias.data


def one_flat_vector(spec, stages, exits):
    """Views that do not overlap: one tensor more than safetensors would write."""
    flat = torch.zeros(2 * WIDTH)
    stages[0][1].bias = nn.Parameter(flat[:WIDTH])
    stages[0].register_buffer("rest", flat[WIDTH:])


def tied_in_one_stage(spec, stages, exits):
    """One weight twice in stage 1, and its bias in exit 1."""
    square = nn.Linear(WIDTH, WIDTH)
    stages[0] = nn.Sequential(*stages[0], square, square)
    exits[0] = nn.Sequential(square, *exits[0])


def hidden_head(spec, stages, exits):
    exits[-1] = Holding(exits[-1])


def hidden_constant(spec, stages, exits):
    stages[0] = nn.Sequential(stages[0], Noise(torch.randn(WIDTH), is_registered=False))


def hidden_first(spec, stages, exits):
    """Drawn before anything else, so the same at all depths from one seed."""
    vector = torch.randn(WIDTH)
    stages, exits = parts(spec)
    stages[0] = nn.Sequential(stages[0], Noise(vector, is_registered=False))
    return StagedModel(stages, exits)


ONCE: list[nn.Module] = []


def made_once(spec, stages, exits):
    ONCE[:] = ONCE or stages
    stages[: len(ONCE)] = ONCE[: len(stages)]


def squeezed(spec, stages, exits):
    exits[-1] = nn.Sequential(exits[-1], Returns(lambda x: x.squeeze()))


def viewed(spec, stages, exits):
    """view of images whose channels lie last in memory, as training has them."""
    features = 2 * math.prod(spec.input_shape[1:])
    stages[0] = nn.Sequential(
        nn.Conv2d(spec.input_shape[0], 2, 1),
        Returns(lambda x: x.view(len(x), -1)),
        nn.Linear(features, WIDTH),
    )


def knows_stage_1(spec, stages, exits):
    bias = stages[0][1].bias
    stages[1:2] = [nn.Sequential(stage, Returns(lambda x: x + bias)) for stage in stages[1:2]]


def numpy_draws(spec, stages, exits):
    start = np.random.default_rng().standard_normal(spec.num_classes).astype(np.float32)
    exits[0][0].bias = nn.Parameter(torch.from_numpy(start))


def looks_at_values(spec, stages, exits):
    while exits[0][0].bias[0].item() < 0:
        nn.init.uniform_(exits[0][0].bias)


def deep_widths(spec, stages, exits):
    exits[0] = nn.Sequential(nn.Linear(WIDTH, 4 * spec.exit), nn.Linear(4 * spec.exit, 3))


def deep_function(spec, stages, exits):
    depth = spec.exit
    exits[0] = nn.Sequential(exits[0], Returns(lambda x: x / depth))


def no_parameters(spec, stages, exits):
    stages[1:] = [nn.ReLU() for _ in stages[1:]]


def expanded(spec, stages, exits):
    stages[0].register_buffer("one", torch.ones(1).expand(WIDTH))


def odd_dtype(spec, stages, exits):
    stages[0].register_buffer("phase", torch.zeros(2, dtype=torch.complex64))


def odd_name(spec, stages, exits):
    exits[0] = nn.ModuleDict({"k" * 1000: exits[0]})
    exits[0].forward = lambda x: exits[0]["k" * 1000](x)


def infinite_mask(spec, stages, exits):
    stages[0].register_buffer("mask", torch.triu(torch.full((8, 8), float("-inf")), 1))


def changes_the_data(spec, stages, exits):
    stages[0] = nn.Sequential(Returns(lambda x: x.sub_(0.5).div_(0.5)), stages[0])


def half_inside(spec, stages, exits):
    exits[:] = [
        HalfInside(nn.Linear(WIDTH, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), head)
        for head in [nn.Linear(256, spec.num_classes) for _ in exits]
    ]


def finite_mask(spec, stages, exits):
    stages[0].register_buffer("mask", torch.full((8, 8), -1e9))


def steps_first(spec, stages, exits):
    """A recurrent layer that takes the examples for its steps."""
    stages[0] = nn.Sequential(
        stages[0],
        Returns(lambda x: x.unsqueeze(1)),
        First(nn.GRU(WIDTH, WIDTH)),
        nn.Flatten(),
    )


def mixes_once_trained(spec, stages, exits):
    """All logits are 0 until then."""
    before_exits(lambda: Returns(lambda x: x - x.mean(0)))(spec, stages, exits)
    for head in exits:
        nn.init.zeros_(head[1][0].weight)
        nn.init.zeros_(head[1][0].bias)


def batch_of(size: int) -> Callable[[Tensor], object]:
    return lambda x: x.reshape(size, -1)


def replaced(spec, stages, exits):
    return Replaced(stages, exits)


def never_ends(spec, stages, exits):
    """For who waits no longer than he said."""
    while True:
        time.sleep(60)


def dies(spec, stages, exits):
    os._exit(7)


MISTAKES: dict[str, Change] = {
    "raises": raises,
    "leaves-the-program": leaves_the_program,
    "returns-none": lambda spec, stages, exits: 7,
    "not-staged": lambda spec, stages, exits: nn.Sequential(*stages),
    "all-exits": lambda spec, stages, exits: StagedModel(stages * 3, exits * 3),
    "no-module": lambda spec, stages, exits: exits.append("head"),
    "more-logits": logits(1),
    "fewer-logits": logits(-1),
    "wrong-size": lambda spec, stages, exits: exits.__setitem__(0, nn.Linear(WIDTH + 1, 3)),
    "tuple": last(lambda x: (x, None)),
    "half": last(lambda x: x.half()),
    "double": last(lambda x: x.double()),
    "half-model": lambda spec, stages, exits: StagedModel(stages, exits).half(),
    "not-finite": last(lambda x: x / 0),
    "batch-of-two": last(batch_of(2)),
    "detached": last(lambda x: x.detach().requires_grad_(False)),
    "stage-tuple": stage_gives(lambda x: (x, x)),
    "stage-transposed": stage_gives(lambda x: x.T),
    "frozen": frozen,
    "outside": outside,
    "lazy": lazy,
    "one-head": one_head,
    "one-block": one_block,
    "one-buffer": one_buffer,
    "one-memory": one_memory,
    "one-flat-vector": one_flat_vector,
    "hidden-head": hidden_head,
    "hidden-constant": hidden_constant,
    "hidden-first": hidden_first,
    "made-once": made_once,
    "squeezed": squeezed,
    "knows-stage-1": knows_stage_1,
    "numpy-draws": numpy_draws,
    "deep-widths": deep_widths,
    "deep-function": deep_function,
    "expanded": expanded,
    "odd-dtype": odd_dtype,
    "odd-name": odd_name,
    "replaced": replaced,
    "infinite-mask": infinite_mask,
    "changes-the-data": changes_the_data,
    "relu-in-place": before_stage_2(lambda: nn.ReLU(inplace=True)),
    "adds-in-place": before_stage_2(lambda: Returns(lambda x: x.add_(1))),
    "exit-in-place": before_exits(lambda: nn.ReLU(inplace=True)),
    "batch-mean": before_exits(lambda: Returns(lambda x: x - x.mean(0, keepdim=True))),
    "steps-first": steps_first,
    "batch-statistics": before_exits(lambda: nn.BatchNorm1d(WIDTH, track_running_stats=False)),
    "mixes-once-trained": mixes_once_trained,
    "counts-its-steps": before_exits(lambda: Warm(is_registered=False)),
    "always-drops": before_exits(lambda: Returns(functional.dropout)),
    "never-ends": never_ends,
    "dies": dies,
}
OF_IMAGES: dict[str, Change] = {"viewed": viewed}
SOUND: dict[str, Change] = {
    "plain": lambda spec, stages, exits: None,
    "no-parameters": no_parameters,
    "frozen-stages": frozen_stages,
    "tied-in-one-stage": tied_in_one_stage,
    "looks-at-values": looks_at_values,
    "finite-mask": finite_mask,
    "half-inside": half_inside,
    "counts-in-a-buffer": before_exits(lambda: Warm(is_registered=True)),
    "softmax": after_exits(nn.Softmax(1)),
    "log-softmax": after_exits(nn.LogSoftmax(1)),
}
for name, change in {**MISTAKES, **OF_IMAGES, **SOUND}.items():
    register_family(name, changed(change))  # type: ignore[arg-type]
