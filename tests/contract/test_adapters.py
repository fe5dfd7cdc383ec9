"""Adapters of every kind on every family: a model begins as it was, its backbone stays bit by bit,
prefixes are cuts, and what is exported gives what was trained."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.errors import ConfigError
from edge_sdk.infer.early_exit import EarlyExit
from edge_sdk.infer.export import export
from edge_sdk.infer.onnx_layers import plain_model
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.adapters.attach import KINDS
from edge_sdk.models.adapters.base import BASIS
from edge_sdk.models.checking import check_family
from edge_sdk.models.freezing import begin_training_
from edge_sdk.protocol.messages import Adapters, ModelSpec, Plan, Segment
from edge_sdk.protocol.tensor_lists import ADAPTER, is_frozen, stage_of
from edge_sdk.training.trainer import train
from tests.contract.families import FOLDED, SPECS
from tests.support.examples import examples
from tests.support.packages import package_or_skip

ONE = {spec.family: spec for spec in SPECS if spec.input_shape != (3, 151)} | {"folded": FOLDED}
TORCHVISION = ModelSpec(
    family="torchvision",
    input_shape=(3, 32, 32),
    num_classes=3,
    exit=3,
    options={"model": "resnet18", "cuts": "layer1,layer2,layer3"},
)
NOT = {("lstm", kind) for kind in KINDS} | {
    (family, "pq-lora") for family in ("cnn", "resnet18", "vgg", "folded", "torchvision")
}
CASES = [(f, kind) for f in (*ONE, "torchvision") for kind in KINDS if (f, kind) not in NOT]
FROZEN = ("stages",)
PLAN = Plan(segments=(Segment(first=1, last=3),), batch_size=4, frozen=FROZEN)


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case))
def spec(request):
    family, kind = request.param
    if family == "torchvision":
        package_or_skip("torchvision")
    branches = 3 if kind == "dema" else 1
    adapters = Adapters(kind=kind, rank=2, branches=branches)
    return replace(ONE.get(family, TORCHVISION), adapters=adapters)


def is_added(name: str) -> bool:
    return bool({ADAPTER, BASIS} & set(name.split(".")))


def inputs_of(spec, count=4):
    draws = torch.Generator().manual_seed(5)
    return torch.randn(count, *spec.input_shape, generator=draws)


def model_of(spec, tensors=None):
    """In eval mode; without tensors with random ones, also where adapters begin at zero."""
    model = build(spec).eval()
    draws = torch.Generator().manual_seed(3)
    model.load(
        tensors
        or {
            n: t + 0.1 * torch.randn(t.shape, generator=draws) if ADAPTER in n.split(".") else t
            for n, t in initial_tensors(spec, 0).items()
        }
    )
    return model


def test_it_begins_as_the_model_without_bit_by_bit(spec):
    """From the same seed, too: adapters are drawn after all else."""
    plain = replace(spec, adapters=None)
    held, before = initial_tensors(spec, 7), initial_tensors(plain, 7)
    assert set(before) == {name for name in held if not is_added(name)}
    assert all(torch.equal(held[name], tensor) for name, tensor in before.items())
    x = inputs_of(spec)
    pairs = zip(model_of(spec, held)(x), model_of(plain, before)(x), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_training_changes_adapters_and_exits_alone(spec):
    before = initial_tensors(spec, 0)
    data = examples(8, shape=spec.input_shape)
    found = train(spec, PLAN, {n: t.clone() for n, t in before.items()}, data).tensors
    buffers = {name for name, _ in build(spec).named_buffers()}
    assert set(found) == {name for name in before if not is_frozen(name, FROZEN)}
    stages = {stage_of(name)[1] for name in found if ADAPTER in name.split(".")}
    assert stages == {1, 2, 3}
    assert all(ADAPTER in n.split(".") or stage_of(n)[0] == "exits" for n in found)
    moved = {name for name in found if not torch.equal(found[name], before[name])}
    # what is beyond U, B or P of zeros has no gradient in the first step, but in the second one
    assert moved >= set(found) - buffers - {n for n in found if n.endswith(("gate", "adapter.q"))}
    again = train(spec, PLAN, {n: t.clone() for n, t in before.items()}, data).tensors
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())
    recomputed = train(spec, replace(PLAN, recompute=True), dict(before), data).tensors
    assert all(torch.equal(recomputed[name], tensor) for name, tensor in found.items())


def test_gradients_are_theirs_and_the_exits_alone(spec):
    model = build(spec)
    begin_training_(model, PLAN.segments[0], FROZEN)
    sum(logits.square().sum() for logits in model(inputs_of(spec))).backward()
    names = [name for name, _ in model.named_parameters()]
    wanted = {name for name in names if not is_frozen(name, FROZEN)}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == wanted
    for name, module in model.named_modules():
        if name.startswith(("stages.", "exits.")):
            assert module.training == (not is_frozen(name, FROZEN)), name


def test_a_prefix_is_a_cut(spec):
    full, x = model_of(spec), inputs_of(spec)
    whole = full.tensors()
    for exit in (1, 2):
        part = {name: t for name, t in whole.items() if stage_of(name)[1] <= exit}
        cut = model_of(replace(spec, exit=exit), part)
        assert set(cut.tensors()) == set(part)
        assert cut.main_weights == tuple(name for name in full.main_weights if name in part)
        assert all(torch.equal(a, b) for a, b in zip(cut(x), full(x), strict=False))


def test_a_stage_before_the_first_has_none(spec):
    later = build(replace(spec, adapters=replace(spec.adapters, first=3)))
    assert {stage_of(name)[1] for name in later.tensors() if is_added(name)} == {3}


def test_merged_gives_the_same(spec):
    model, x = model_of(spec), inputs_of(spec)
    plain = plain_model(model, x[:1])
    left = {name for name, _ in plain.named_parameters() if is_added(name)}
    assert bool(left) == (spec.adapters.kind == "dema")
    assert any(is_added(name) for name, _ in model.named_parameters())
    with torch.no_grad():
        for one, other in zip(plain(x), model(x), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["llama", "vit", "resnet18"])
def test_an_exported_one_answers_as_torch(family, kind, tmp_path):
    if (family, kind) in NOT:
        pytest.skip("it has no linear layer in its stages")
    spec = replace(ONE[family], adapters=Adapters(kind=kind, rank=2))
    model, x = model_of(spec), inputs_of(spec)
    made = export(spec, model.tensors(), tmp_path / "model")
    assert made.spec.adapters == spec.adapters
    engine = EarlyExit.load(tmp_path / "model", threshold=0.0)
    found = engine.predict(x.numpy())
    assert set(found.exit.tolist()) == {1}
    with torch.no_grad():
        logits = torch.stack(model(x)).numpy()
    assert abs(engine.all_exits(x.numpy()) - logits).max() < 1e-4 * abs(logits).max()


@pytest.mark.parametrize(("family", "kind"), sorted(NOT - {("torchvision", "pq-lora")}))
def test_a_family_without_such_layers_is_refused(family, kind):
    spec = replace(ONE[family], adapters=Adapters(kind=kind, rank=2))
    with pytest.raises(
        ConfigError, match="finds nothing to adapt in family|has no layer with weights"
    ):
        check_family(spec)
