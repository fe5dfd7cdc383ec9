"""One vector for a whole model: the same order there and back."""

from __future__ import annotations

import pytest
import torch

from edge_sdk.errors import ShapeError
from edge_sdk.models import build
from edge_sdk.models.flat import flatten, num_weights, parameter_shapes, unflatten
from tests.support.examples import cnn

SHAPES = {"b": torch.Size([2]), "a": torch.Size([2, 2]), "c": torch.Size([])}


def test_order_is_that_of_the_list_and_not_of_the_names():
    tensors = {"a": torch.tensor([[3.0, 4.0], [5.0, 6.0]]), "b": torch.tensor([1.0, 2.0])}
    tensors["c"] = torch.tensor(7.0)
    assert num_weights(SHAPES) == 7
    assert flatten(tensors, SHAPES).tolist() == [1, 2, 3, 4, 5, 6, 7]
    back = unflatten(torch.arange(1.0, 8.0), SHAPES)
    assert list(back) == ["b", "a", "c"]
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_a_vector_of_another_length_is_refused():
    with pytest.raises(ShapeError, match=r"\(6,\) weights came for a model of 7"):
        unflatten(torch.zeros(6), SHAPES)
    with pytest.raises(ShapeError, match=r"a is \(4,\), expected \(2, 2\)"):
        flatten({"b": torch.zeros(2), "a": torch.zeros(4), "c": torch.zeros(())}, SHAPES)
    with pytest.raises(ShapeError, match="b is missing"):
        flatten({}, SHAPES)


def test_a_model_comes_back_and_its_statistics_are_no_part_of_it():
    # two convolutions in stage 1 (1 -> 4, 4 -> 4), their norms, and the exit: 36 + 8 + 144 + 8 + 51
    model = build(cnn(exit=1))
    shapes = parameter_shapes(model)
    assert num_weights(shapes) == 36 + 8 + 144 + 8 + (16 * 3 + 3)
    held = model.tensors()
    back = unflatten(flatten(held, shapes), shapes)
    assert all(torch.equal(back[name], held[name]) for name in shapes)
    assert set(held) - set(back) == {n for n, _ in model.named_buffers()}
