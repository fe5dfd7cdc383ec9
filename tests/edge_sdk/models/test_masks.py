from __future__ import annotations

import pytest
import torch

from edge_sdk.errors import ShapeError
from edge_sdk.models import build
from edge_sdk.models.masks import mask_bits, mask_of, maskable, packed, unpacked
from edge_sdk.protocol.stream import layout
from edge_sdk.protocol.tensors import specs_of
from tests.support.examples import cnn

NAME = "stages.0.0.weight"
MASK = torch.tensor([[True, False, True], [False, False, True]])
SHAPES = {NAME: torch.Size((2, 3)), "bias": torch.Size((2,))}


def travelling(bits=(0b100101,), values=(1.0, 3.0, 6.0)):
    return {
        f"mask/{NAME}": torch.tensor(bits, dtype=torch.uint8),
        f"packed/{NAME}": torch.tensor(values),
    }


def test_first_entry_is_the_lowest_bit():
    assert mask_bits(MASK).tolist() == [0b100101]
    assert torch.equal(mask_of(torch.tensor([0b100101], dtype=torch.uint8), MASK.shape, "w"), MASK)


def test_kept_values_travel_in_the_order_of_their_entries():
    weights = {NAME: torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), "bias": torch.ones(2)}
    sent = packed(weights, {NAME: MASK})
    assert list(sent) == [f"mask/{NAME}", f"packed/{NAME}", "bias"]
    assert sent[f"packed/{NAME}"].tolist() == [1.0, 3.0, 6.0]
    back, masks = unpacked(sent, SHAPES)
    assert torch.equal(back[NAME], weights[NAME] * MASK)
    assert torch.equal(masks[NAME], MASK)
    assert list(back) == list(weights)


def test_a_kept_zero_is_kept():
    # published code takes what is smaller than 1e-6 for pruned
    sent = packed({NAME: torch.tensor([[0.0, 2.0, 1e-9], [4.0, 5.0, 6.0]])}, {NAME: MASK})
    back, masks = unpacked(sent, SHAPES)
    assert torch.equal(masks[NAME], MASK)
    assert back[NAME][0, 2] == torch.tensor(1e-9)


def test_bytes_are_those_of_the_kept_values_and_a_bit_an_entry():
    # 80 x 100 weights of which a quarter is kept: 8000 / 8 + 2000 * 4 bytes instead of 32000
    mask = torch.zeros(80, 100, dtype=torch.bool)
    mask[:20] = True
    sent = packed({NAME: torch.rand(80, 100)}, {NAME: mask})
    assert layout(specs_of(sent))[1] == 1000 + 8000


def test_biases_and_norms_are_never_under_a_mask():
    model = build(cnn())
    names = maskable(model)
    assert {name.rpartition(".")[2] for name in names} == {"weight"}
    held = model.tensors()
    assert all(held[name].ndim >= 2 for name in names)
    assert {name for name in held if held[name].ndim >= 2} == set(names)


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (travelling(bits=(0b1100101,)), "behind the 6 entries"),
        (travelling(bits=(0b100101, 0)), r"expected uint8 \(1,\)"),
        (travelling(values=(1.0, 3.0)), "its mask keeps 3 values"),
        (travelling(values=(1.0, 3.0, 6.0, 7.0)), "its mask keeps 3 values"),
        (dict(reversed(travelling().items())), "without mask/"),
        (dict(list(travelling().items())[:1]), "without packed/"),
        ({"mask/other": torch.zeros(1, dtype=torch.uint8)}, "does not belong to the model"),
    ],
)
def test_what_does_not_fit_is_refused(sent, said):
    with pytest.raises(ShapeError, match=said):
        unpacked(sent, SHAPES)
