from __future__ import annotations

import numpy as np
import pytest
import torch
from msgspec.structs import replace
from torch import nn

from edge_sdk.capacity.counting import segment_costs
from edge_sdk.errors import ConfigError
from edge_sdk.models import StagedModel, build, initial_tensors
from edge_sdk.models.factorised import (
    factor_names,
    factor_ranks,
    factorised,
    lowered,
    merged,
    raised,
    split,
)
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.tensor_lists import stage_of
from tests.support.examples import cnn

WIDE = cnn(exit=4, channels=(8, 8, 12, 12))
PLAN = Plan(segments=(Segment(first=1, last=4),), batch_size=4)


def second_stage(*layers: nn.Module) -> StagedModel:
    """A model whose stage 2 is of these layers."""
    stage = nn.Sequential(*layers)
    return StagedModel([nn.Identity(), stage], [nn.Identity(), nn.Identity()])


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Conv2d(8, 12, 3), (2, 8, 9, 7)),
        (nn.Conv2d(8, 12, (3, 5), stride=(2, 1), padding=(1, 2), bias=False), (2, 8, 9, 7)),
        (nn.Conv2d(8, 12, 3, stride=2, padding=(0, 1)), (2, 8, 9, 7)),
        (nn.Conv2d(8, 12, 3, padding="same", dilation=(2, 1)), (2, 8, 9, 7)),
        (nn.Conv2d(8, 12, 3, padding=(2, 1), padding_mode="circular"), (2, 8, 9, 7)),
        (nn.Conv2d(8, 12, 3, padding=(2, 1), padding_mode="reflect"), (2, 8, 9, 7)),
        (nn.Conv1d(8, 12, 5, stride=2, padding=3, dilation=2), (2, 8, 20)),
        (nn.Conv1d(8, 12, 5, padding="same", padding_mode="replicate", bias=False), (2, 8, 20)),
        (nn.Linear(16, 12), (2, 16)),
        (nn.Linear(16, 12, bias=False), (2, 5, 16)),
    ],
    ids=str,
)
def test_two_layers_compute_what_the_product_of_their_weights_does(layer, x):
    model = factorised(second_stage(layer), 0.25)
    tensors = model.tensors()
    v, u = (tensors[name] for name in factor_names("stages.1.0.weight"))
    assert v.shape[0] == u.shape[1] == 3  # round(12 / 4)
    with torch.no_grad():
        layer.weight.copy_(merged(v, u))
        if layer.bias is not None:
            layer.bias.copy_(tensors["stages.1.0.u.bias"])
        assert torch.allclose(model.stages[1](drawn(*x)), layer(drawn(*x)), atol=1e-5)


def test_kernel_of_rank_1_in_the_layout_of_the_factors_comes_back():
    # W[o, i, y, x] = a[o, y] b[i, x]; flattened otherwise, (O, I k k), it is of rank 3
    kernel = torch.einsum("oy,ix->oiyx", drawn(6, 3), drawn(4, 3))
    assert torch.linalg.matrix_rank(kernel.reshape(6, -1)) == 3
    assert torch.allclose(merged(*split(kernel, 1)), kernel, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 4, 5), (6, 4)])
def test_error_is_that_of_the_singular_values_left_out(shape):
    weight = drawn(*shape)
    outputs, inputs, *kernel = shape
    kh, kw = [1, 1, *kernel][-2:]
    matrix = weight.reshape(outputs, inputs, kh, kw).permute(0, 2, 1, 3).numpy()
    sizes = np.linalg.svd(matrix.reshape(outputs * kh, inputs * kw), compute_uv=False)
    left_out = (merged(*split(weight, 2)) - weight).square().sum()
    assert float(left_out) == pytest.approx(float(np.square(sizes[2:]).sum()), rel=1e-4)
    v, u = split(weight, 2)
    assert float(v.square().sum()) == pytest.approx(float(u.square().sum()), rel=1e-4)  # balanced


def test_factors_of_a_smaller_rank_are_the_first_channels():
    weight = drawn(6, 4, 3, 3)
    (v, u), (small_v, small_u) = split(weight, 4), split(weight, 2)
    assert torch.equal(v[:2], small_v)
    assert torch.equal(u[:, :2], small_u)


def test_signs_are_fixed():
    u = split(drawn(6, 4, 3, 3), 4)[1].permute(0, 2, 1, 3).reshape(18, 4)
    assert bool((u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all())


def test_every_convolution_after_the_first_stage_has_the_rank_that_is_asked_for():
    # published code maps only the first factor that is above 1
    ranks = factor_ranks(build(WIDE), 0.25)
    assert ranks == {"stages.1.0.weight": 2, "stages.2.0.weight": 3, "stages.3.0.weight": 3}
    held = build(replace(WIDE, rank=0.25)).tensors()
    for name, rank in ranks.items():
        v, u = (held[part] for part in factor_names(name))
        outputs, inputs = build(WIDE).tensors()[name].shape[:2]
        assert v.shape == (rank, inputs, 1, 3)
        assert u.shape == (outputs, rank, 3, 1)
        assert v.numel() + u.numel() == rank * 3 * (outputs + inputs)
        assert name not in held


def test_a_device_counts_the_costs_of_the_factors():
    whole, small = (segment_costs(replace(WIDE, rank=rank), PLAN, 8, 0)[3] for rank in (1.0, 0.25))
    # of 3 x 3 x (8 x 8 + 8 x 12 + 12 x 12) there are 3 x (2 x 16 + 3 x 20 + 3 x 24) left
    assert whole.upload_bytes - small.upload_bytes == 4 * (9 * 304 - 3 * 164)
    assert small.parameter_bytes < whole.parameter_bytes
    # built of the whole model, while the received factors wait
    assert small.load_bytes == 2 * small.parameter_bytes + whole.parameter_bytes
    assert small.flops_per_example < whole.flops_per_example


def test_names_and_order_are_those_of_the_whole_model():
    spec = replace(WIDE, family="vgg", exit=2)  # its convolutions have biases
    whole, small = build(spec).tensors(), build(replace(spec, rank=0.25)).tensors()
    expected = []
    for name in whole:
        layer, _, kind = name.rpartition(".")
        is_cut = f"{layer}.weight" in factor_ranks(build(spec), 0.25)
        is_weight = is_cut and kind == "weight"
        expected += factor_names(name) if is_weight else [f"{layer}.u.bias" if is_cut else name]
    assert list(small) == expected
    assert expected != list(whole)


def test_first_stage_exits_and_shortcuts_stay_whole():
    spec = ModelSpec(
        family="resnet18",
        input_shape=(3, 8, 8),
        num_classes=3,
        exit=3,
        options={"channels": (4, 4, 8, 8), "blocks": (1,) * 4},
    )
    whole, small = build(spec).tensors(), build(replace(spec, rank=0.25)).tensors()
    kept = {name for name in whole if stage_of(name) == ("stages", 1)}
    kept |= {name for name in whole if ".shortcut." in name or name.startswith("exits.")}
    assert kept <= set(small)
    cut = {name for name in whole if whole[name].ndim == 4} - kept
    assert cut
    assert not cut & set(small)


def test_main_weights_are_the_factors():
    model = build(replace(WIDE, rank=0.25))
    assert model.main_weights[2:4] == factor_names("stages.1.0.weight")
    assert set(model.main_weights) <= set(model.tensors())


def test_a_layer_in_two_places_is_one_pair():
    layer = nn.Conv2d(8, 8, 3, padding=1)
    model = factorised(second_stage(layer, nn.ReLU(), layer), 0.25)
    assert model.stages[1][0] is model.stages[1][2]
    assert list(model.tensors()) == [
        "stages.1.0.v.weight",
        "stages.1.0.u.weight",
        "stages.1.0.u.bias",
    ]


class OwnConv(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def tied() -> list[nn.Module]:
    one, other = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
    other.weight = one.weight
    return [one, other]


def hooked() -> list[nn.Module]:
    layer = nn.Conv2d(8, 8, 3)
    layer.register_forward_hook(lambda module, given, made: 2 * made)
    return [layer]


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(8, 8, 3, groups=4)],
        [nn.ConvTranspose2d(8, 8, 3)],
        [OwnConv(8, 8, 3)],
        [nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3))],
        [nn.utils.parametrizations.spectral_norm(nn.Linear(32, 8))],
        [nn.Conv2d(8, 8, 1)],  # 4 (8 + 8) are no fewer than 8 x 8
        [nn.LSTM(8, 8)],
        [nn.TransformerEncoderLayer(8, 2, 32)],  # in eval mode it reads linear1.weight
        tied(),
        hooked(),
    ],
    ids=lambda layers: type(layers[0]).__name__,
)
def test_what_is_no_plain_layer_or_would_not_become_smaller_stays_whole(layers):
    other = nn.Conv2d(8, 8, 3)
    assert factor_ranks(second_stage(*layers), 0.5) == {}
    held = factorised(second_stage(*layers, other), 0.5).tensors()
    place = f"stages.1.{len(layers)}"
    rest = {name for name in held if not name.startswith(place)}
    assert rest == set(second_stage(*layers).tensors())
    assert set(held) - rest == {*factor_names(f"{place}.weight"), f"{place}.u.bias"}


def test_a_rank_that_makes_nothing_smaller_is_refused():
    spec = ModelSpec(family="lstm", input_shape=(3, 9), num_classes=3, exit=2, rank=0.25)
    with pytest.raises(ConfigError, match="family 'lstm': rank 0.25: two factors make none of its"):
        build(spec)
    build(replace(spec, exit=1))  # its stage is whole anyway
    square = replace(spec, family="mlp", rank=0.5)
    with pytest.raises(ConfigError, match="rank 0.5"):  # 64 (128 + 128) are no fewer than 128 x 128
        build(square)
    build(replace(square, rank=0.49))


def test_factors_of_several_ranks_come_from_one_whole_model():
    spec = replace(WIDE, family="vgg", exit=2)  # its convolutions have biases
    whole = initial_tensors(spec, 0)
    ranks = [factor_ranks(build(spec), rank) for rank in (0.25, 1.0, 0.5)]
    assert ranks[1] == {}
    for made, own, rank in zip(lowered(whole, ranks), ranks, (0.25, 1.0, 0.5), strict=True):
        expected = build(replace(spec, rank=rank)).tensors()
        assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in expected.items()}
        assert list(made) == list(expected)
        back = raised(made, ranks[0])
        assert list(back) == list(whole)
        for name, tensor in back.items():
            if name in own:
                v, u = split(whole[name], own[name])
                assert torch.equal(tensor, merged(v, u))
            else:
                assert tensor is whole[name]
