"""A family of a user's own, with tensors of every kind that may travel, through whole runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from coordinator.cohorts.in_process import InProcessCohort
from coordinator.config import (
    DistillOptions,
    GeneratorOptions,
    RotationOptions,
    RunConfig,
    ServerOptions,
)
from coordinator.methods.depthwise import is_learnable
from coordinator.methods.registry import make_method
from coordinator.runs.evaluate import metric_per_exit
from coordinator.runs.rounds import run_rounds
from coordinator.store.store import Store
from edge_sdk.errors import ConfigError
from edge_sdk.models import (
    StagedModel,
    build,
    initial_tensors,
    original_names,
    register_family,
)
from edge_sdk.protocol.messages import ModelSpec, Segment
from tests.support.examples import client, client_update, examples

WIDTH = 6


class Masked(nn.Module):
    """A linear layer in float64 with a learned scale, pruned by a mask; counts its batches."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, WIDTH, dtype=torch.float64)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.norm = nn.BatchNorm1d(WIDTH)  # counts its batches, too: int64 without an axis
        self.register_buffer("mask", torch.arange(WIDTH) % 3 != 0)
        self.register_buffer("key", torch.full((2,), 10**9))
        self.register_buffer("level", torch.tensor([7], dtype=torch.uint8))
        self.register_buffer("limit", torch.tensor([0.5], dtype=torch.float16))
        self.register_buffer("none", torch.zeros(0, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, inputs) -> (B, WIDTH)."""
        linear: Tensor = self.linear(x.double()).float() * self.scale
        normed: Tensor = self.norm(linear) * self.mask
        return normed.relu()


def build_masked(spec: ModelSpec) -> StagedModel:
    stages = [nn.Sequential(nn.Flatten(), Masked(64))]
    stages += [nn.Sequential(Masked(WIDTH)) for _ in range(1, spec.exit)]
    return StagedModel(stages, [nn.Linear(WIDTH, spec.num_classes) for _ in stages])


def build_bad(spec: ModelSpec) -> StagedModel:
    model = build_masked(spec)
    keep = nn.Parameter(torch.ones(WIDTH, dtype=torch.bool), requires_grad=False)
    model.stages[0].register_parameter("keep", keep)
    return model


@pytest.fixture(autouse=True)
def families(own_things):
    """Known in these tests only."""
    register_family("masked", build_masked)
    register_family("bad", build_bad)


def spec(family: str = "masked") -> ModelSpec:
    return ModelSpec(family=family, input_shape=(1, 8, 8), num_classes=3, exit=3)


def run_of(generator: str, generate: str, rotation: str) -> RunConfig:
    return RunConfig(
        method="hypemefed",
        model=spec(),
        rounds=4,
        batch_size=4,
        participants=4,
        server=ServerOptions(momentum=0.5, lr=0.75, damping=0.5, serve="ema"),
        generator=GeneratorOptions(name=generator, generate=generate, rank=3, hidden=4, epochs=2),
        rotation=RotationOptions(mode=rotation),
        distill=DistillOptions(direction="auto"),
    )


@pytest.mark.parametrize(
    ("generator", "generate", "rotation"),
    [
        ("update-regression", "all", "add"),  # the default method
        ("update-regression", "all", "off"),
        ("svd-mlp", "conv", "off"),  # as published
        ("svd-mlp", "all", "off"),
        ("svd-mlp-residual", "all", "off"),
        ("naive-mlp", "all", "off"),
    ],
)
def test_masks_and_counters_pass_through_a_run(tmp_path, caplog, generator, generate, rotation):
    """Stopped after two rounds and resumed. A client's 12 examples are 3 batches of 4."""
    settings = run_of(generator, generate, rotation)
    shards = {name: examples(12, seed=i) for i, name in enumerate("abcdef")}
    exits = dict(zip("abcdef", (1, 1, 2, 2, 3, 3), strict=True))
    reports = []
    for most in (2, 4):
        store = Store.resume(tmp_path) if reports else Store.create(tmp_path, settings, "emulate")
        method = make_method(settings)
        run_rounds(
            store,
            method,
            InProcessCohort(shards, exits, 3),
            examples(30, seed=9),
            should_stop=lambda most=most: len(reports) >= most,
            report=reports.append,
        )
        store.close()
    assert [report.totals.returned for report in reports] == [4, 4, 4, 4]
    assert "leaves its update out" not in caplog.text, "an integer is nothing to learn from"
    assert all(report.metrics.values["generator_bytes"] > 0 for report in reports)
    before = initial_tensors(spec(), 0)
    for held in (method.current(), method.served()):
        assert {name: t.dtype for name, t in held.items()} == {
            name: t.dtype for name, t in before.items()
        }
        for name, tensor in held.items():
            if name.endswith("num_batches_tracked"):
                rounds = 4 if "stages.0" in name else tensor.item() // 3
                assert tensor.item() == 3 * rounds > 0, "the largest of its owners'"
            elif not tensor.is_floating_point():
                assert torch.equal(tensor, before[name]), name
    assert metric_per_exit(method.spec, method.served(), examples(30, seed=9)) == (
        reports[-1].metric_served
    )


@pytest.mark.parametrize(("value", "expected"), [(2e6, False), (2e5, True)])
def test_only_weights_are_too_large_to_learn_from(value, expected):
    tensors = {
        "stages.0.weight": torch.tensor([-value, 1.0]),
        "stages.0.key": torch.tensor([10**9]),
        "stages.0.mask": torch.tensor([True]),
    }
    segments = (Segment(first=1, last=1),)
    assert is_learnable(client_update(client("a", 1), tensors, segments)) is expected


def test_parameters_that_cannot_be_trained_are_refused():
    with pytest.raises(
        ConfigError, match=r"'bad': parameter stages.0.keep is torch.bool, .*buffer"
    ):
        build(spec("bad"))


def test_a_family_may_know_its_tensors_by_other_names(own_things):
    def names(spec):
        return {f"stages.{n}.0.weight": f"block{n}.weight" for n in range(spec.exit)}

    register_family("known", build_masked, names=names)
    register_family("odd", build_bad, names=lambda spec: {}[spec.family])
    assert original_names(spec("known")) == {
        "stages.0.0.weight": "block0.weight",
        "stages.1.0.weight": "block1.weight",
        "stages.2.0.weight": "block2.weight",
    }
    assert original_names(spec("cnn")) == {}, "none where a family gives none"
    with pytest.raises(ConfigError, match="family 'odd': names raises KeyError"):
        original_names(spec("odd"))
