"""Rows as coefficients of a low-rank basis in half precision."""

from __future__ import annotations

import pytest
import torch

from coordinator.config import GeneratorOptions
from coordinator.generators.row_memory import RowMemory
from coordinator.generators.update_regression import SKETCH, _hashes, _sketched, slack
from tests.contract.test_generators import hypemefed, play, related
from tests.support.examples import client


def filled(rows, rank):
    memory = RowMemory(rows.shape[1], rank)
    sizes = [memory.add([row], [torch.zeros_like(row)]) for row in rows]
    return memory, torch.diag(torch.tensor(sizes, dtype=torch.float64))


def test_rows_come_back_to_half_precision():
    torch.manual_seed(0)  # products of rows that happen to cancel say nothing
    rows = torch.randn(3, 50) * torch.tensor([[1e-4], [1.0], [1e3]])
    memory, coefficients = filled(rows, 3)
    for row, coefficient in zip(rows, coefficients, strict=True):
        assert torch.allclose(memory.combine(coefficient), row, rtol=2e-3, atol=2e-3 * row.std())
    products = coefficients @ memory.gram() @ coefficients.T
    assert torch.allclose(products.float(), rows @ rows.T, rtol=1e-2, atol=1e-2)


def test_cut_keeps_the_best_rank():
    # rows of rank 2 with singular values 5 and 3, and a third of 0.1 that is cut away
    left, right = torch.linalg.qr(torch.randn(6, 3))[0], torch.linalg.qr(torch.randn(40, 3))[0]
    rows = left @ torch.diag(torch.tensor([5.0, 3.0, 0.1])) @ right.T
    memory, coefficients = filled(rows, 2)
    assert len(memory) == 6
    kept = memory.cut(coefficients, memory.gram())
    assert (len(memory), kept.shape, memory.num_bytes) == (2, (6, 2), 2 * 40 * 2)
    back = torch.stack([memory.combine(row) for row in kept])
    assert float((back - rows).norm()) == pytest.approx(0.1, abs=0.01)


def test_a_row_of_zeros_is_no_trouble():
    memory, coefficients = filled(torch.zeros(2, 9), 1)
    kept = memory.cut(coefficients, memory.gram())
    assert len(memory) == 0
    assert kept.shape == (2, 0)
    assert memory.add([torch.ones(9)], [torch.zeros(9)]) == 1.0


def test_the_memory_has_the_configured_rows_and_rank():
    method = hypemefed("update-regression", memory_rows=5, rank=3)
    play(method, 9)
    for stage in method._generator._stages.values():
        assert (len(stage.rows), len(stage.z), len(stage.basis)) == (5, 5, 3)
    assert GeneratorOptions().memory_rows == 30


def test_a_rank_above_the_rows_keeps_no_more_than_the_rows_need():
    method = hypemefed("update-regression", memory_rows=5, rank=1000)
    play(method, 9)
    for stage in method._generator._stages.values():
        assert 3 < len(stage.basis) <= 6  # five rows and their mean


def test_order_of_arrival_does_not_matter_with_many_owners():
    """20 owners of every stage in a round, four times the rank."""
    method, turned = (hypemefed("update-regression", rank=5) for _ in range(2))
    cohort = [client(f"z{number}", 3) for number in range(20)] + [client("a", 1)]
    for number in range(1, 5):
        updates = [related(who, method.assign(who, number), number) for who in cohort]
        method.aggregate(number, updates)
        turned.aggregate(number, updates[::-1])
    for key, tensor in method.current().items():
        assert torch.allclose(tensor, turned.current()[key], atol=1e-5), key


def test_a_round_of_large_tensors_is_cut_before_all_have_arrived():
    assert slack(1000) == 256 * 1024**2 // 2000
    assert slack(20_000_000) == 8


def test_large_tensors_are_sketched_to_a_fixed_size():
    shape = (40, 50, 3, 3)
    a, b = torch.randn(18000), torch.randn(18000)
    hashes = _hashes("stages.0.0.weight", shape, 1)
    near = _sketched(a, hashes), _sketched(a + 0.1 * b, hashes), _sketched(b, hashes)
    assert all(len(sketch) == SKETCH for sketch in near)
    # inner products within a few standard deviations, 18000 / sqrt(4096) = 281
    assert float(near[0] @ near[1]) == pytest.approx(float(a @ (a + 0.1 * b)), abs=1200)
    assert float(near[0] @ near[2]) == pytest.approx(float(a @ b), abs=1200)
    assert _hashes("x", (16, 16), 1) is None
