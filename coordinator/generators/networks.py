"""The networks that predict one stage's weights from another's: factorised, or naive.

Pairs of one stage and of equal shapes are one group, evaluated by batched matrix products: G pairs,
B clients. Both kinds take and give matrices; what they need of a matrix is its code, so of a client
only codes are kept.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from coordinator.generators.factors import Factors, factorise, reconstruct, refactorise

Shape = tuple[int, int]
Code = TypeVar("Code")


class Codec(Protocol, Generic[Code]):
    """What a kind of network keeps of a matrix (rows, columns): its code. A stack is a code with
    two more dimensions, B clients by G pairs; networks map stacks to stacks."""

    def encode(self, matrix: Tensor) -> Code: ...
    def num_bytes(self, code: Code) -> int: ...
    def norm(self, code: Code) -> float: ...
    def stack(self, codes: Sequence[Sequence[Code]], scales: Sequence[float]) -> Code:
        """Codes of B clients by G pairs, with a scale for the matrices of each pair."""

    def take(self, stack: Code, clients: Tensor) -> Code: ...
    def predict(self, network: nn.Module, sources: Code) -> Code: ...
    def backward(self, made: Code, true: Code, factor: float) -> None:
        """Backpropagate factor times the sum of squared errors over whole stacks."""

    def matrix(self, stack: Code, client: int, pair: int) -> Tensor:
        """(rows, columns)."""

    def encode_made(self, stack: Code, client: int, pair: int, scale: float) -> Code:
        """The code of one matrix of a stack."""

    def network(self, pairs: int, source: Shape, target: Shape, hidden: int) -> nn.Module: ...


class GroupedMlp(nn.Module):
    """G independent MLPs (linear, ReLU, linear) of one shape; initialised like nn.Linear."""

    def __init__(self, pairs: int, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.first = _uniform((pairs, inputs, hidden), inputs)
        self.first_bias = _uniform((pairs, 1, hidden), inputs)
        self.second = _uniform((pairs, hidden, outputs), hidden)
        self.second_bias = _uniform((pairs, 1, outputs), hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, G, r, inputs) -> (B, G, r, outputs)."""
        clients, pairs, rank, inputs = x.shape
        flat = x.transpose(0, 1).reshape(pairs, clients * rank, inputs)
        hidden = torch.baddbmm(self.first_bias, flat, self.first).relu()
        out = torch.baddbmm(self.second_bias, hidden, self.second)
        return out.reshape(pairs, clients, rank, -1).transpose(0, 1)


class FactorMlps(nn.Module):
    """HypeMeFed's hypernetwork: one MLP maps each left singular vector of the source, one each
    right; the product of the outputs is the prediction. Its size does not depend on the rank."""

    def __init__(self, pairs: int, source: Shape, target: Shape, hidden: int) -> None:
        super().__init__()
        self.left = GroupedMlp(pairs, source[0], hidden, target[0])
        self.right = GroupedMlp(pairs, source[1], hidden, target[1])

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """(B, G, r, source rows), (B, G, r, source columns) -> (B, G, rows, columns)."""
        return reconstruct(self.factors(left, right))

    def factors(self, left: Tensor, right: Tensor) -> Factors:
        """The same, (B, G, r, rows) and (B, G, r, columns), not yet multiplied."""
        return Factors(self.left(left), self.right(right))


class FlatMlps(nn.Module):
    """The naive hypernetwork: one MLP from the flattened source to the flattened target."""

    def __init__(self, pairs: int, source: Shape, target: Shape, hidden: int) -> None:
        super().__init__()
        self.target = target
        self.mlp = GroupedMlp(pairs, source[0] * source[1], hidden, target[0] * target[1])

    def forward(self, matrices: Tensor) -> Tensor:
        """(B, G, source rows, source columns) -> (B, G, rows, columns)."""
        made: Tensor = self.mlp(matrices.flatten(2).unsqueeze(2))  # (B, G, 1, rows columns)
        return made.reshape(*made.shape[:2], *self.target)


@dataclass(frozen=True)
class SvdCodec:
    """Codes are factors of rank at most `rank`: O(rank (rows + columns)) a matrix, and so is all
    that is done with them while training: products of the factors' Gram matrices take the place of
    products of matrices."""

    rank: int

    def encode(self, matrix: Tensor) -> Factors:
        return factorise(matrix, self.rank)

    def num_bytes(self, code: Factors) -> int:
        return code.left.nbytes + code.right.nbytes

    def norm(self, code: Factors) -> float:
        return float(_inner(code, code).sqrt())

    def stack(self, codes: Sequence[Sequence[Factors]], scales: Sequence[float]) -> Factors:
        roots = torch.tensor(scales).sqrt().to(codes[0][0].left.device)[:, None, None]
        left = torch.stack([torch.stack([code.left for code in row]) for row in codes])
        right = torch.stack([torch.stack([code.right for code in row]) for row in codes])
        return Factors(left.mul_(roots), right.mul_(roots))

    def take(self, stack: Factors, clients: Tensor) -> Factors:
        return Factors(stack.left[clients], stack.right[clients])

    def predict(self, network: nn.Module, sources: Factors) -> Factors:
        assert isinstance(network, FactorMlps)
        return network.factors(sources.left, sources.right)

    def backward(self, made: Factors, true: Factors, factor: float) -> None:
        with torch.no_grad():  # of |L^T R - T^T U|^2 by L: 2 (R R^T L - R U^T T), and so by R
            by_left = _combined(made.right, true.right, made.left, true.left)
            by_right = _combined(made.left, true.left, made.right, true.right)
        gradients = [by_left.mul_(2 * factor), by_right.mul_(2 * factor)]
        torch.autograd.backward([made.left, made.right], gradients)

    def matrix(self, stack: Factors, client: int, pair: int) -> Tensor:
        return reconstruct(Factors(stack.left[client, pair], stack.right[client, pair]))

    def encode_made(self, stack: Factors, client: int, pair: int, scale: float) -> Factors:
        made = refactorise(Factors(stack.left[client, pair] * scale, stack.right[client, pair]))
        # a small source gives few factors; owners' matrices of the same shape have the full rank
        kept, rows = made.left.shape
        missing = min(self.rank, rows, made.right.shape[1]) - kept
        return Factors(*(nn.functional.pad(t, (0, 0, 0, missing)) for t in (made.left, made.right)))

    def network(self, pairs: int, source: Shape, target: Shape, hidden: int) -> nn.Module:
        return FactorMlps(pairs, source, target, hidden)


@dataclass(frozen=True)
class FlatCodec:
    """Codes are the matrices themselves."""

    def encode(self, matrix: Tensor) -> Tensor:
        return matrix.clone()

    def num_bytes(self, code: Tensor) -> int:
        return code.nbytes

    def norm(self, code: Tensor) -> float:
        return float(code.norm())

    def stack(self, codes: Sequence[Sequence[Tensor]], scales: Sequence[float]) -> Tensor:
        factors = torch.tensor(scales).to(codes[0][0].device)[:, None, None]
        return torch.stack([torch.stack(list(row)) for row in codes]).mul_(factors)

    def take(self, stack: Tensor, clients: Tensor) -> Tensor:
        return stack[clients]

    def predict(self, network: nn.Module, sources: Tensor) -> Tensor:
        made: Tensor = network(sources)
        return made

    def backward(self, made: Tensor, true: Tensor, factor: float) -> None:
        ((made - true).square().sum() * factor).backward()

    def matrix(self, stack: Tensor, client: int, pair: int) -> Tensor:
        return stack[client, pair]

    def encode_made(self, stack: Tensor, client: int, pair: int, scale: float) -> Tensor:
        return stack[client, pair] * scale

    def network(self, pairs: int, source: Shape, target: Shape, hidden: int) -> nn.Module:
        return FlatMlps(pairs, source, target, hidden)


def _combined(right: Tensor, true_right: Tensor, left: Tensor, true_left: Tensor) -> Tensor:
    """R R^T L - R U^T T, stacks of factors each: (B, G, r, rows or columns)."""
    across = right @ true_right.transpose(-1, -2)
    return (right @ right.transpose(-1, -2)) @ left - across @ true_left


def _inner(a: Factors, b: Factors) -> Tensor:
    """(..., r, rows) and (..., r, columns) each -> (...)."""
    left, right = a.left @ b.left.transpose(-1, -2), a.right @ b.right.transpose(-1, -2)
    return (left * right).sum((-1, -2))


def _uniform(shape: tuple[int, ...], fan_in: int) -> nn.Parameter:
    bound = 1 / math.sqrt(fan_in)
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
