"""What every model family must do."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.errors import ConfigError, EdgeError, ShapeError
from edge_sdk.models import FAMILIES, build, initial_tensors
from edge_sdk.models.staged import needed_names, place, trained_names
from edge_sdk.trainer import train
from edge_sdk.wire import ModelSpec, Plan, Segment
from tests.helpers import examples

SHAPES = [(1, 28, 28), (3, 32, 32), (3, 51), (3, 151)]


@pytest.fixture(params=[(f, s) for f in sorted(FAMILIES) for s in SHAPES], ids=str)
def spec(request):
    family, shape = request.param
    channels = (4, 5, 6, 7)
    return ModelSpec(
        family=family, input_shape=shape, num_classes=3, exit=3, options={"channels": channels}
    )


def test_every_exit_gives_logits(spec):
    model = build(spec).eval()
    logits = model(torch.zeros(2, *spec.input_shape))
    assert [tuple(logit.shape) for logit in logits] == [(2, 3)] * 3


def test_prefix_is_a_real_cut(spec):
    whole = initial_tensors(spec, 0)
    x = torch.randn(2, *spec.input_shape, generator=torch.Generator().manual_seed(1))
    full = build(spec).eval()
    full.load(whole)
    for exit in (1, 2):
        cut = build(replace(spec, exit=exit)).eval()
        part = {name: t for name, t in whole.items() if place(name)[1] <= exit}
        assert set(part) == set(cut.tensors())
        cut.load(part)
        for a, b in zip(cut(x), full(x), strict=False):
            assert torch.equal(a, b)


def test_initial_tensors_are_a_function_of_the_seed(spec):
    torch.manual_seed(99)
    a = initial_tensors(spec, 1)
    after = torch.rand(1)
    torch.manual_seed(99)
    assert torch.equal(after, torch.rand(1)), "the global generator was disturbed"
    b, c = initial_tensors(spec, 1), initial_tensors(spec, 2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)


def test_no_integer_tensors_and_no_alias(spec):
    held = initial_tensors(spec, 0)
    assert all(tensor.is_floating_point() for tensor in held.values())
    assert len({t.untyped_storage().data_ptr() for t in held.values()}) == len(held)


def test_every_segment_trains_exactly_its_tensors(spec):
    whole = initial_tensors(spec, 0)
    data = examples(9, shape=spec.input_shape)
    for segments in (
        (Segment(first=1, last=1),),
        (Segment(first=3, last=3),),
        (Segment(first=1, last=1), Segment(first=3, last=3)),
        (Segment(first=1, last=3),),
    ):
        deepest = max(segment.last for segment in segments)
        down = {name: whole[name] for name in needed_names(whole, segments)}
        plan = Plan(segments=segments, batch_size=4)
        result = train(replace(spec, exit=deepest), plan, down, data)
        assert list(result.tensors) == trained_names(whole, segments)
        for name, tensor in result.tensors.items():
            assert not torch.equal(tensor, whole[name]), f"{name} was not trained"


def test_wrong_options_name_the_known(spec):
    with pytest.raises(ConfigError, match="no option depth; known: channels"):
        build(replace(spec, options={"depth": 3}))
    with pytest.raises(ConfigError, match="channels"):
        build(replace(spec, options={"channels": (4,)}))
    with pytest.raises(ConfigError, match="takes input"):
        build(replace(spec, input_shape=(5,)))


def test_load_refuses_what_does_not_belong(spec):
    model = build(spec)
    with pytest.raises(ShapeError, match="does not belong"):
        model.load({"stages.9.weight": torch.zeros(1)})
    name = next(iter(model.tensors()))
    with pytest.raises(EdgeError, match="expected"):
        model.load({name: torch.zeros(1, 2, 3)})


def test_unknown_family_lists_the_known():
    with pytest.raises(ConfigError, match="known: cnn, vgg"):
        build(ModelSpec(family="resnet99", input_shape=(1, 8, 8), num_classes=2, exit=1))


@pytest.mark.parametrize(("exit", "parameters"), [(1, 106_922), (2, 349_364), (3, 1_245_886)])
def test_vgg_has_the_published_size_svhn(exit, parameters):
    spec = ModelSpec(family="vgg", input_shape=(3, 32, 32), num_classes=10, exit=exit)
    assert sum(p.numel() for p in build(spec).parameters()) == parameters


@pytest.mark.parametrize(("exit", "parameters"), [(1, 998_218), (2, 2_253_140), (3, 5_979_486)])
def test_vgg_has_the_published_size_stl10(exit, parameters):
    spec = ModelSpec(
        family="vgg",
        input_shape=(3, 96, 96),
        num_classes=10,
        exit=exit,
        options={"channels": (64, 128, 256, 512)},
    )
    assert sum(p.numel() for p in build(spec).parameters()) == parameters


def test_cnn_takes_any_number_of_exits():
    spec = ModelSpec(family="cnn", input_shape=(1, 28, 28), num_classes=10, exit=10)
    assert len(build(spec).eval()(torch.zeros(1, 1, 28, 28))) == 10
