"""Each family's own numbers: published sizes, shapes and options."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from edge_sdk.errors import ConfigError
from edge_sdk.models import StagedModel, build
from edge_sdk.models.resnet import BasicBlock
from edge_sdk.protocol.messages import ModelSpec

FOLDED = ModelSpec(family="vgg", input_shape=(3, 51), num_classes=3, exit=3)


def num_parameters(spec: ModelSpec) -> int:
    return sum(parameter.numel() for parameter in build(spec).parameters())


@pytest.mark.parametrize(("exit", "parameters"), [(1, 106_922), (2, 349_364), (3, 1_245_886)])
def test_vgg_has_the_published_size_svhn(exit, parameters):
    spec = ModelSpec(family="vgg", input_shape=(3, 32, 32), num_classes=10, exit=exit)
    assert num_parameters(spec) == parameters


@pytest.mark.parametrize(("exit", "parameters"), [(1, 998_218), (2, 2_253_140), (3, 5_979_486)])
def test_vgg_has_the_published_size_stl10(exit, parameters):
    spec = ModelSpec(
        family="vgg",
        input_shape=(3, 96, 96),
        num_classes=10,
        exit=exit,
        options={"channels": (64, 128, 256, 512)},
    )
    assert num_parameters(spec) == parameters


# The published counts imply an image of 18 x 25 with one channel: see edge_sdk/models/vgg.py.
@pytest.mark.parametrize(("exit", "parameters"), [(1, 284_360), (2, 1_182_928), (3, 4_729_048)])
@pytest.mark.parametrize(("shape", "fold"), [((1, 18, 25), None), ((3, 151), (18, 25))])
def test_vgg_has_the_published_size_unimib(exit, parameters, shape, fold):
    options = {"channels": (64, 128, 256, 512)} | ({"fold": fold} if fold else {})
    spec = ModelSpec(family="vgg", input_shape=shape, num_classes=8, exit=exit, options=options)
    assert num_parameters(spec) == parameters


def test_fold_keeps_the_first_steps_of_each_axis():
    # 3 axes of 4 steps into 2 x 3: two steps of each axis, one after the other
    fold = build(replace(FOLDED, input_shape=(3, 4), exit=1, options={"fold": (2, 3)})).stages[0][0]
    series = torch.arange(12).reshape(1, 3, 4)
    assert fold(series).tolist() == [[[[0, 1, 4], [5, 8, 9]]]]


@pytest.mark.parametrize(
    ("shape", "fold"),
    [((3, 4), (3, 5)), ((3, 4), (2, 2)), ((3, 4), (1, 2, 3)), ((3, 4, 4), (2, 3)), ((3, 4), 3)],
)
def test_a_fold_that_does_not_fit_is_refused(shape, fold):
    with pytest.raises(ConfigError, match="model option fold is"):
        build(replace(FOLDED, input_shape=shape, options={"fold": fold}))


@pytest.mark.parametrize(
    ("exit", "parameters"),
    # Standard: 11,220,132. Without groups 3 and 4 (2,099,712 and 8,393,728) and the last head
    # (512 * 100 + 100 = 51,300) 675,392 are left: stem and groups 1 and 2. The heads of exits 1
    # and 2 have 128 * 100 + 100 = 12,900 and 256 * 100 + 100 = 25,700.
    [
        (1, 675_392 + 12_900),
        (2, 675_392 + 12_900 + 2_099_712 + 25_700),
        (3, 11_220_132 + 12_900 + 25_700),
    ],
)
def test_resnet18_has_the_standard_size(exit, parameters):
    spec = ModelSpec(family="resnet18", input_shape=(3, 32, 32), num_classes=100, exit=exit)
    assert num_parameters(spec) == parameters


def test_resnet18_halves_from_the_second_group_on():
    spec = ModelSpec(
        family="resnet18",
        input_shape=(3, 32, 32),
        num_classes=2,
        exit=3,
        options={"channels": (2, 3, 4, 5)},
    )
    x, shapes = torch.zeros(1, 3, 32, 32), []
    for stage in build(spec).eval().stages:
        shapes.append(tuple((x := stage(x)).shape[1:]))
    assert shapes == [(3, 16, 16), (4, 8, 8), (5, 4, 4)]


def test_a_basic_block_adds_its_input():
    block = BasicBlock(2, 2, stride=1).eval()
    with torch.no_grad():
        for weight in block.parameters():
            weight.zero_()
    x = torch.randn(1, 2, 3, 3)
    assert torch.equal(block(x), x.relu())  # the residual is 0


@pytest.mark.parametrize("sides", [(1, 1), (2, 3), (5, 4), (8, 8), (9, 7)])
def test_a_shortcut_is_the_convolution_of_stride_2(sides):
    """In forward and backward, as it trains, with the channels last. The convolution to compare
    with has them first, where torch's is sound on every CPU."""
    torch.manual_seed(0)
    block = BasicBlock(3, 5, stride=2).eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        block.residual[-1].weight.zero_()  # the residual is 0: the block is its shortcut
    again = torch.randn(2, 3, *sides).requires_grad_()
    x = again.detach().to(memory_format=torch.channels_last).requires_grad_()
    conv, norm = block.shortcut
    weight = conv.weight.detach().contiguous().clone().requires_grad_()
    wanted = nn.functional.conv2d(again, weight, stride=2)
    wanted = (wanted / (1 + norm.eps) ** 0.5).relu()  # mean 0 and variance 1, as built
    out = block(x)
    assert out.shape == (2, 5, -(-sides[0] // 2), -(-sides[1] // 2))
    assert torch.allclose(out, wanted, atol=1e-6)
    slope = torch.randn_like(wanted)
    out.backward(slope)
    wanted.backward(slope)
    assert torch.allclose(x.grad, again.grad, atol=1e-6)
    assert torch.allclose(conv.weight.grad, weight.grad, atol=1e-5)


def test_a_shortcut_sees_every_second_pixel():
    """Of 0 1 2 / 3 4 5 / 6 7 8 it sees 0 2 / 6 8, together 16; the weights are 1 and 3."""
    block = BasicBlock(1, 2, stride=2).eval()
    conv, norm = block.shortcut
    norm.eps = 0.0
    with torch.no_grad():
        block.residual[-1].weight.zero_()
        conv.weight.copy_(torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1))
    x = torch.arange(9.0).reshape(1, 1, 3, 3).requires_grad_()
    out = block(x)
    assert out.tolist() == [[[[0, 2], [6, 8]], [[0, 6], [18, 24]]]]
    out.sum().backward()  # a relu of 0 passes nothing on
    assert x.grad.tolist() == [[[[0, 0, 4], [0, 0, 0], [4, 0, 4]]]]
    assert conv.weight.grad.flatten().tolist() == [16, 16]


def test_main_weights_of_resnet18_leave_the_shortcuts_out():
    model = build(ModelSpec(family="resnet18", input_shape=(3, 8, 8), num_classes=2, exit=3))
    assert len(model.main_weights) == 17  # the stem and two in each of 8 blocks
    assert {tuple(model.get_parameter(name).shape[2:]) for name in model.main_weights} == {(3, 3)}


def test_main_weights_of_lstm_are_both_matrices():
    model = build(ModelSpec(family="lstm", input_shape=(3, 9), num_classes=2, exit=2))
    assert model.main_weights == tuple(
        f"stages.{i}.lstm.weight_{kind}_l0" for i in (0, 1) for kind in ("ih", "hh")
    )


def test_a_family_may_name_its_main_weights():
    def model(names):
        stages = [nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))]
        return StagedModel(stages, [nn.Linear(4, 2)], main_weights=names)

    assert model(None).main_weights == ("stages.0.0.weight", "stages.0.1.weight")
    assert model(["stages.0.1.weight"]).main_weights == ("stages.0.1.weight",)
    assert model([]).main_weights == ()
    for wrong in ("stages.0.2.weight", "stages.0.0.bias", "exits.0.weight"):
        with pytest.raises(ConfigError, match=f"{wrong} are no parameters .* stages.0.0.weight"):
            model([wrong])


def test_lstm_exits_see_the_last_step():
    model = build(ModelSpec(family="lstm", input_shape=(2, 6), num_classes=3, exit=2)).eval()
    x = torch.randn(4, 2, 6)
    sequence = model.stages[0].lstm(x.transpose(1, 2))[0]  # (4, 6, 64)
    expected = model.exits[0][1](sequence[:, -1])
    assert torch.allclose(model(x)[0], expected, atol=1e-6)


@pytest.mark.parametrize("family", ["vgg", "resnet18"])
def test_families_of_few_exits_say_so(family):
    with pytest.raises(ConfigError, match="use 'cnn'"):
        build(ModelSpec(family=family, input_shape=(3, 32, 32), num_classes=2, exit=7))


@pytest.mark.parametrize(
    ("family", "shape", "exit"),
    [("cnn", (1, 28, 28), 10), ("mlp", (1, 28, 28), 10), ("mlp", (6,), 100), ("lstm", (3, 151), 2)],
)
def test_any_number_of_exits(family, shape, exit):
    spec = ModelSpec(family=family, input_shape=shape, num_classes=10, exit=exit)
    logits = build(spec).eval()(torch.zeros(2, *shape))
    assert [tuple(logit.shape) for logit in logits] == [(2, 10)] * exit


def test_cnn_stops_halving_before_nothing_is_left():
    model = build(ModelSpec(family="cnn", input_shape=(1, 28, 28), num_classes=10, exit=10)).eval()
    x, sides = torch.zeros(1, 1, 28, 28), []
    for stage in model.stages:
        x = stage(x)
        sides.append(x.shape[-1])
    assert sides == [14, 7] + [3] * 8
