"""Which channels a narrow model has of the whole one. The families of the package are in
tests/contract/test_families.py; here are slices by hand, and families of a person's own."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace
from torch import nn

from edge_sdk.errors import ConfigError
from edge_sdk.models import StagedModel, build, register_family
from edge_sdk.models.widths import slice_of
from edge_sdk.protocol.messages import ModelSpec
from tests.contract.families import check_slice


def spec_of(family, shape=(1, 8, 8), **options):
    return ModelSpec(family=family, input_shape=shape, num_classes=3, exit=1, options=options)


def listed(part):
    return [None if kept is None else kept.tolist() for kept in part]


def test_slices_of_a_cnn_by_hand():
    # one stage of 4 channels, pooled to 2 x 2: channel c lies at 4c .. 4c + 3 of the exit's input
    found = slice_of(spec_of("cnn", channels=(4,)), 0.5)
    assert listed(found["stages.0.0.weight"]) == [[0, 1], None, None, None]  # the input is whole
    assert listed(found["stages.0.1.running_var"]) == [[0, 1]]
    assert listed(found["stages.0.3.weight"]) == [[0, 1], [0, 1], None, None]
    assert listed(found["exits.0.2.weight"]) == [None, [0, 1, 2, 3, 4, 5, 6, 7]]  # every class
    assert listed(found["exits.0.2.bias"]) == [None]


def test_a_window_moves_by_a_channel_and_begins_anew_after_the_last():
    spec = spec_of("cnn", channels=(4,))
    assert listed(slice_of(spec, 0.5, 3)["stages.0.3.weight"])[:2] == [[3, 0], [3, 0]]
    rows = slice_of(spec, 0.5, 3)["exits.0.2.weight"][1].tolist()
    assert rows == [12, 13, 14, 15, 0, 1, 2, 3]
    assert listed(slice_of(spec, 0.5, 7)["stages.0.1.bias"]) == [[3, 0]]  # modulo the channels


def test_gates_of_a_recurrent_layer_are_cut_alike():
    found = slice_of(spec_of("lstm", (2, 5), hidden=4), 0.5, 1)
    gates = [1, 2, 5, 6, 9, 10, 13, 14]
    assert listed(found["stages.0.lstm.weight_ih_l0"]) == [gates, None]
    assert listed(found["stages.0.lstm.weight_hh_l0"]) == [gates, [1, 2]]
    assert listed(found["stages.0.lstm.bias_hh_l0"]) == [gates]
    assert listed(found["exits.0.1.weight"]) == [None, [1, 2]]


def test_a_block_and_its_identity_shortcut_have_the_same_channels():
    """Windows of each layer's own would add unlike channels: a published defect."""
    options = {"channels": (4, 6), "blocks": (2, 1)}
    for shift in range(7):
        found = slice_of(spec_of("resnet18", **options), 0.5, shift)
        stem, *of_group = [
            kept[0].tolist()
            for name, kept in found.items()
            if len(kept) == 4 and kept[0].max() < 4 and len(kept[0]) == 2
        ]
        assert all(kept == stem for kept in of_group)
        block = "stages.0.5"  # stem of three, two blocks, the first of the second group
        convolution, shortcut = f"{block}.residual.0.weight", f"{block}.shortcut.0.weight"
        assert listed(found[convolution])[:2] == listed(found[shortcut])[:2]


def test_every_channel_is_covered_after_as_many_shifts_as_there_are():
    spec = spec_of("cnn", channels=(5,))
    seen = [slice_of(spec, 0.4, shift)["stages.0.1.weight"][0].tolist() for shift in range(5)]
    assert seen == [[0, 1], [1, 2], [2, 3], [3, 4], [4, 0]]


def test_a_share_of_channels_is_rounded_up_once():
    """0.07 * 100 is a little more than 7 in float64, and 0.55 * 100 than 55."""
    for width, channels in ((0.07, 7), (0.55, 55), (0.071, 8), (1e-9, 1)):
        model = build(replace(spec_of("cnn", channels=(100,)), width=width))
        assert model.get_parameter("stages.0.0.weight").shape[0] == channels


def test_a_wider_model_than_the_whole_is_refused():
    spec = replace(spec_of("cnn"), width=0.5)
    with pytest.raises(ConfigError, match=r"width 0.75 of a model of width 0.5, expected a part"):
        slice_of(spec, 0.75)
    check_slice(spec, 0.25, 1)


class Dense(nn.Module):
    """Concatenates what it makes to what it gets, twice, with a norm over both."""

    def __init__(self, c):
        super().__init__()
        self.first = nn.Conv2d(1, c, 3, padding=1)
        self.second = nn.Conv2d(c, 2 * c, 3, padding=1)
        self.norm = nn.BatchNorm2d(3 * c)
        self.third = nn.Conv2d(3 * c, c, 1)

    def forward(self, x):
        x = self.first(x)
        x = self.norm(torch.cat([self.second(torch.relu(x)), x], 1))
        return self.third(x)


class Squeeze(nn.Module):
    """A depthwise convolution, channels scaled by a bottleneck, a scale and a shift of its own."""

    def __init__(self, c):
        super().__init__()
        self.stem = nn.Conv2d(1, c, 3, padding=1)
        self.apart = nn.Conv2d(c, c, 3, padding=1, groups=c)
        self.down, self.up = nn.Linear(c, c // 2), nn.Linear(c // 2, c)
        self.scale = nn.Parameter(torch.rand(c, 1, 1))
        self.register_buffer("shift", torch.rand(1, c, 1, 1))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.scale * nn.functional.gelu(self.apart(x)) - self.shift
        weights = torch.sigmoid(self.up(torch.relu(self.down(x.mean((2, 3))))))
        x *= weights[:, :, None, None]
        return x


class Both(nn.Module):
    """Two bidirectional recurrent layers on rows, then tokens with a LayerNorm."""

    def __init__(self, c):
        super().__init__()
        self.rows = nn.GRU(8, c, num_layers=2, bidirectional=True, batch_first=True)
        self.norm = nn.LayerNorm(2 * c)

    def forward(self, x):
        made, _ = self.rows(x.squeeze(1))
        return self.norm(made)


class Twice(nn.Module):
    """One convolution used twice, its channels halved and joined again in order."""

    def __init__(self, c):
        super().__init__()
        self.stem = nn.Conv2d(1, c, 3, padding=1)
        self.again = nn.Conv2d(c, c, 3, padding=1)
        self.up = nn.ConvTranspose2d(c, c, 2, stride=2)

    def forward(self, x):
        x = self.again(torch.relu(self.again(self.stem(x))))
        return self.up(x)


class Softmax(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.stem = nn.Conv2d(1, c, 3, padding=1)

    def forward(self, x):
        return self.stem(x).softmax(1)


class Flipped(Softmax):
    def forward(self, x):
        x = self.stem(x)
        return x + x.flip(1)


class Attention(Softmax):
    def __init__(self, c):
        super().__init__(c)
        self.attention = nn.MultiheadAttention(c, 1, batch_first=True)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        return self.attention(tokens, tokens, tokens)[0]


class Grouped(Softmax):
    def __init__(self, c):
        super().__init__(c)
        self.grouped = nn.Conv2d(c, c, 3, padding=1, groups=2)

    def forward(self, x):
        return self.grouped(self.stem(x))


class Matrix(Softmax):
    def __init__(self, c):
        super().__init__(c)
        self.matrix = nn.Parameter(torch.rand(c, c))

    def forward(self, x):
        return torch.einsum("bchw,cd->bdhw", self.stem(x), self.matrix)


class Unequal(nn.Module):
    """A shortcut that is there only in the narrow model."""

    def __init__(self, c):
        super().__init__()
        self.stem = nn.Conv2d(1, c, 3, padding=1)
        if c < 8:
            self.shortcut = nn.Conv2d(1, c, 1)

    def forward(self, x):
        return self.stem(x)


def register(stage, own_channels=8):
    def made(spec):
        width = int(own_channels * spec.width)
        first = stage(width).eval()
        features = first(torch.zeros(2, *spec.input_shape)).flatten(1).shape[1]
        return StagedModel([first], [nn.Sequential(nn.Flatten(), nn.Linear(features, 3))])

    register_family(stage.__name__, made)
    return spec_of(stage.__name__)


@pytest.mark.parametrize("stage", [Dense, Squeeze, Twice, Both])
def test_families_of_ones_own_are_followed(stage, own_things):
    spec = register(stage)
    for width in (0.25, 0.5, 0.75):
        # a norm over all channels gives others over fewer: only the shapes are alike
        check_slice(spec, width, 0, is_same=stage is not Both)
        check_slice(spec, width, 3, is_same=stage is not Both)


def test_concatenated_channels_are_cut_each_by_their_own(own_things):
    spec = register(Dense, 4)
    found = slice_of(spec, 0.5)  # 8 of `second`, then 4 of `first`
    assert listed(found["stages.0.norm.weight"]) == [[0, 1, 2, 3, 8, 9]]
    assert listed(found["stages.0.third.weight"])[:2] == [[0, 1], [0, 1, 2, 3, 8, 9]]
    moved = slice_of(spec, 0.5, 5)  # 5 of 8, 1 of 4
    assert listed(moved["stages.0.norm.weight"]) == [[5, 6, 7, 0, 9, 10]]


REFUSED = {
    Softmax: r"softmax mixes channels in stages.0 \(Softmax\)",
    Flipped: r"channels are laid upon each other in another order in stages.0 \(Flipped\)",
    Attention: r"multi_head_attention_forward (mixes|takes) channels",
    Grouped: r"a convolution of 2 groups in stages.0.grouped \(Conv2d\)",
    Matrix: r"einsum mixes channels",
    Unequal: r"at width 0.5 it has other tensors, not only smaller ones",
}


@pytest.mark.parametrize("stage", REFUSED)
def test_what_cannot_be_followed_is_refused_with_the_reason(stage, own_things):
    spec = register(stage)
    with pytest.raises(ConfigError, match=REFUSED[stage]) as error:
        slice_of(spec, 0.5)
    assert f"family '{stage.__name__}'" in str(error.value)
    assert "\n" not in str(error.value)


def test_layers_that_take_other_shares_of_the_same_channels_are_refused(own_things):
    class Uneven(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, 8, 3), nn.Conv2d(1, c, 3)

        def forward(self, x):
            return (self.a(x)[:, : self.b.out_channels]) + self.b(x)

    class Other(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.a, self.b = nn.Conv2d(1, c, 3), nn.Conv2d(c, max(3, c), 3)
            self.c = nn.Conv2d(max(3, c), c, 3)
            self.lone = nn.Parameter(torch.zeros(c, c))

        def forward(self, x):
            return self.c(self.b(self.a(x)))

    with pytest.raises(ConfigError, match=r"axis 0 of stages.0.lone, from 8 to 4, is of no layer"):
        slice_of(register(Other), 0.5)
    check_slice(register(Uneven), 0.5, 0)


def test_nothing_is_drawn_from_the_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    slice_of(spec_of("cnn", channels=(6,)), 0.5)
    assert torch.equal(torch.rand(1), expected)
