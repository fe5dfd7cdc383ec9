"""What every model family must do."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.capacity.counting import segment_costs
from edge_sdk.errors import ConfigError, EdgeError, ShapeError
from edge_sdk.models import FAMILIES, build, initial_tensors, register_family
from edge_sdk.models.checking import check_family
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.tensor_lists import needed_names, stage_of, trained_names
from edge_sdk.training.trainer import train
from tests.contract.families import (
    ALL,
    FOLDED,
    IDS,
    SPECS,
    TABLE,
    WIDTHS,
    check_slice,
    check_trains_apart,
)
from tests.support.examples import examples

# The others make modules of packages (tests/edge_sdk/models/test_packages.py).
BUILT_IN = {name for name in FAMILIES if FAMILIES[name].is_built_in}


@pytest.fixture(params=ALL, ids=IDS)
def spec(request):
    return request.param


def test_every_family_is_in_the_table():
    assert set(TABLE) == BUILT_IN


def test_every_exit_gives_logits(spec):
    model = build(spec).eval()
    logits = model(torch.zeros(2, *spec.input_shape))
    assert [tuple(logit.shape) for logit in logits] == [(2, 3)] * 3


def test_what_a_family_of_ones_own_must_be_those_of_the_package_are(spec, own_things):
    """They are not tried at run time."""
    family = FAMILIES[spec.family]
    assert family.is_built_in

    def build_as_own(spec, options):
        return family.build(spec, options)

    register_family("as-own", build_as_own, family.options)
    assert not FAMILIES["as-own"].is_built_in
    check_family(replace(spec, family="as-own"))


def test_prefix_is_a_real_cut(spec):
    whole = initial_tensors(spec, 0)
    x = torch.randn(2, *spec.input_shape, generator=torch.Generator().manual_seed(1))
    full = build(spec).eval()
    full.load(whole)
    for exit in (1, 2):
        cut = build(replace(spec, exit=exit)).eval()
        part = {name: t for name, t in whole.items() if stage_of(name)[1] <= exit}
        assert set(part) == set(cut.tensors())
        cut.load(part)
        assert cut.main_weights == tuple(name for name in full.main_weights if name in part)
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
    check_trains_apart(spec.family)
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


def test_main_weights_are_matrices_of_the_stages(spec):
    model = build(spec)
    assert model.main_weights
    stages = set()
    for name in model.main_weights:
        kind, number = stage_of(name)
        assert kind == "stages"
        assert model.get_parameter(name).ndim >= 2
        stages.add(number)
    assert stages == {1, 2, 3}, "a stage has nothing that could be generated"


@pytest.mark.parametrize("family", sorted(BUILT_IN))
def test_costs_of_every_segment_can_be_counted(family):
    check_trains_apart(family)
    spec = next(spec for spec in SPECS if spec.family == family)
    found = segment_costs(spec, Plan(segments=(Segment(first=1, last=3),), batch_size=4), 9, 0)
    assert [(c.first, c.last) for c in found] == [(1, 1), (1, 2), (1, 3), (2, 2), (3, 3)]
    for cost in found:
        assert (
            min(
                max(moment.at(4) for moment in cost.moments),
                cost.flops_per_example,
                cost.num_layers,
            )
            > 0
        )
        assert (cost.frozen_flops_per_example > 0) == (cost.first > 1)


def test_an_image_trains_alike_in_both_memory_layouts(spec):
    """`ready` and `moved` put the channels last where there are any; the function stays."""
    model = build(spec).eval()
    x = torch.randn(2, *spec.input_shape, generator=torch.Generator().manual_seed(1))
    plain = model(x)
    for a, b in zip(plain, model.ready("cpu")(moved(x, "cpu")), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_width_scales_what_lies_between(spec):
    whole, half = (
        sum(p.numel() for p in build(replace(spec, width=width)).parameters()) for width in (1, 0.5)
    )
    assert half < whole


@pytest.mark.parametrize("width", WIDTHS[::2])
def test_a_narrow_model_is_a_part_of_the_whole(spec, width):
    """Of the first channels, and of a window of them that begins anew after the last."""
    check_slice(spec, width, 0)
    check_slice(spec, width, 3)


def test_wrong_options_name_the_known(spec):
    options = TABLE[spec.family][1]
    with pytest.raises(ConfigError, match=f"no option depth; known: {next(iter(options))}"):
        build(replace(spec, options={"depth": 3}))
    for key in options:
        for wrong in ((0, 1, 1, 1), "a", 1.5, (True,) * 4):
            with pytest.raises(ConfigError, match=f"model option {key} is"):
                build(replace(spec, options={key: wrong}))


def test_wrong_number_of_channels_is_refused():
    for family, key in [("cnn", "channels"), ("mlp", "widths"), ("resnet18", "blocks")]:
        spec = ModelSpec(
            family=family, input_shape=(3, 8, 8), num_classes=2, exit=3, options={key: (4, 4)}
        )
        with pytest.raises(ConfigError, match=rf"option {key} is \(4, 4\), expected at least"):
            build(spec)


@pytest.mark.parametrize("family", sorted(BUILT_IN))
def test_inputs_that_a_family_does_not_take(family):
    shape = TABLE[family][2]
    with pytest.raises(ConfigError, match=rf"'{family}' takes input \("):
        build(ModelSpec(family=family, input_shape=shape, num_classes=3, exit=3))


def test_load_refuses_what_does_not_belong(spec):
    model = build(spec)
    with pytest.raises(ShapeError, match="does not belong"):
        model.load({"stages.9.weight": torch.zeros(1)})
    name = next(iter(model.tensors()))
    with pytest.raises(EdgeError, match="expected"):
        model.load({name: torch.zeros(1, 2, 3)})


def test_unknown_family_lists_the_known():
    with pytest.raises(
        ConfigError, match="known: cnn, huggingface, llama, lstm, mlp, resnet18, timm, torch"
    ):
        build(ModelSpec(family="resnet99", input_shape=(1, 8, 8), num_classes=2, exit=1))


def test_recomputing_gives_the_same_update_bit_by_bit(spec):
    check_recomputed(spec)


def test_recomputing_draws_the_same_dropout():
    check_recomputed(replace(FOLDED, options=FOLDED.options | {"dropout": 0.5}))


def check_recomputed(spec):
    check_trains_apart(spec.family)
    data = examples(12, shape=spec.input_shape)
    plan = Plan(
        segments=(Segment(first=1, last=2), Segment(first=3, last=3)), batch_size=6, epochs=2
    )
    start = initial_tensors(spec, 0)
    kept, again = (
        train(spec, replace(plan, recompute=recompute), start, data) for recompute in (False, True)
    )
    assert kept.exits == again.exits
    for name, tensor in kept.tensors.items():
        assert torch.equal(tensor, again.tensors[name]), name
