"""Weights as matrices and their truncated, canonical SVD.

A convolution (OC, IC, *K) is brought to the matrix (IC * K_first, OC * K_rest) by permuting axes:
the paper's (IC KS) x (OC KS). The published code reshapes without permuting, which mixes input
channels (a rank-1 kernel becomes rank 9). Signs of singular vectors are arbitrary; each pair is
flipped so that the largest entry of the left vector is positive, which makes the factors a function
of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edge_sdk.errors import ShapeError


@dataclass(frozen=True)
class Factors:
    """A ~ left^T right. left: (r, rows) = S^1/2 U^T; right: (r, columns) = S^1/2 V^T."""

    left: Tensor
    right: Tensor


def matricise(weight: Tensor) -> Tensor:
    """(N) -> (1, N); (OC, IC) -> (IC, OC); (OC, IC, K) -> (IC K, OC);
    (OC, IC, KH, KW) -> (IC KH, OC KW)."""
    if weight.ndim == 1:
        return weight.unsqueeze(0)
    if weight.ndim == 2:
        return weight.T
    outputs, inputs, first = weight.shape[:3]
    rest = weight[0, 0, 0].numel()
    spread = weight.reshape(outputs, inputs, first, rest)
    return spread.permute(1, 2, 0, 3).reshape(inputs * first, outputs * rest)


def dematricise(matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Inverse of matricise for a weight of `shape`."""
    if len(shape) == 1:
        return matrix.squeeze(0)
    if len(shape) == 2:
        return matrix.T
    outputs, inputs, first = shape[:3]
    rest = matrix.shape[1] // outputs
    return matrix.reshape(inputs, first, outputs, rest).permute(2, 0, 1, 3).reshape(shape)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of matricise for a weight of `shape`."""
    rows, columns = matricise(torch.empty(shape, device="meta")).shape
    return rows, columns


def factorise(matrix: Tensor, rank: int) -> Factors:
    """Truncated canonical SVD at min(rank, rows, columns). matrix: (rows, columns) float32.
    Raises ShapeError where the SVD does not converge (huge values)."""
    try:
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ShapeError(f"a matrix {tuple(matrix.shape)} has no usable SVD: {error}") from error
    kept = min(rank, len(s))
    u, s, vt = u[:, :kept], s[:kept].sqrt(), vt[:kept]
    peaks = u.gather(0, u.abs().argmax(0, keepdim=True))[0]  # (r,) largest entry of each column
    signs = torch.where(peaks < 0, -1.0, 1.0).to(s)
    return Factors(left=(u * (s * signs)).T.contiguous(), right=vt * (s * signs).unsqueeze(1))


def reconstruct(factors: Factors) -> Tensor:
    """(..., rows, columns)."""
    return factors.left.transpose(-1, -2) @ factors.right
