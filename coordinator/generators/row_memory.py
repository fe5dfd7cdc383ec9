"""Vectors kept as coefficients times a shared low-rank basis in half precision.

A row of width P costs 2 P bytes as a basis vector, and only its coefficients once the basis is cut
back to `rank`: so n rows of P cost at most 2 P (rank + slack) bytes, whatever n. Products of rows
need the basis' Gram matrix only; sums of rows are sums of coefficients, so centred rows are never
formed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edge_sdk.protocol.tensors import Tensors

CHUNK = 2**15  # columns taken to float32 at once: what fits a core's cache


class RowMemory:
    """basis: (m, P) float16, rows of root mean square about 1; the caller keeps coefficients
    (n, m) float64 and passes them through `cut`."""

    def __init__(self, width: int, rank: int, device: str | torch.device = "cpu") -> None:
        self.width, self.rank = width, rank
        self._device = device
        self._rows: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_bytes(self) -> int:
        return 2 * self.width * len(self._rows)

    def add(self, ends: Sequence[Tensor], starts: Sequence[Tensor]) -> float:
        """Append ends - starts, one after another, as a basis vector; returns its coefficient in
        units of the basis (0 for zeros). At no time is there a second copy of the vector."""
        pairs = list(zip(ends, starts, strict=True))
        squares = sum(float((end - start).float().square().sum()) for end, start in pairs)
        size = math.sqrt(squares / self.width)
        row = torch.empty(self.width, dtype=torch.float16, device=self._device)
        widths = [end.numel() for end in ends]
        for part, (end, start) in zip(row.split(widths), pairs, strict=True):
            part.copy_(((end - start).float() / (size or 1.0)).flatten())
        self._rows.append(row)
        return size

    def gram(self) -> Tensor:
        """(m, m) float64 inner products of the basis vectors."""
        total = torch.zeros(len(self), len(self), dtype=torch.float64)
        for start in range(0, self.width, CHUNK):
            part = self._columns(start)
            total = total + (part @ part.T).double().cpu()
        return total

    def combine(self, coefficients: Tensor) -> Tensor:
        """(m,) -> the vector (P,) float32 on the memory's device."""
        weights = coefficients.float().to(self._device)
        made = torch.empty(self.width, device=self._device)
        for start in range(0, self.width, CHUNK):
            made[start : start + CHUNK] = weights @ self._columns(start)
        return made

    def cut(self, coefficients: Tensor, gram: Tensor) -> Tensor:
        """Cut the basis, whose products are `gram`, back to the best `rank` vectors for the rows
        (n, m), by the SVD of the stacked rows; returns their coefficients (n, m') in it."""
        products = coefficients @ gram @ coefficients.T  # (n, n)
        values, vectors = torch.linalg.eigh(products)
        kept = values.flip(0)[: self.rank] > 1e-12 * values.max().clamp(min=1e-300)
        vectors = vectors.flip(1)[:, : len(kept)][:, kept]  # (n, m'), largest first
        sizes = values.flip(0)[: len(kept)][kept].sqrt()
        # right singular vectors, brought to a root mean square of 1
        mixed = (vectors / sizes).T @ coefficients * math.sqrt(self.width)  # (m', m)
        weights = mixed.float().to(self._device)
        for start in range(0, self.width, CHUNK):  # in place: columns are mixed one by one
            part = weights @ self._columns(start)
            for row, values_ in zip(self._rows, part, strict=False):
                row[start : start + CHUNK] = values_
        del self._rows[len(sizes) :]
        found: Tensor = vectors * sizes / math.sqrt(self.width)
        return found

    def state_dict(self) -> Tensors:
        if not self._rows:
            return {}
        return {"basis": torch.stack(self._rows).cpu()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._rows = [row.to(self._device) for row in state["basis"]] if "basis" in state else []

    def _columns(self, start: int) -> Tensor:
        if not self._rows:
            return torch.zeros(0, min(CHUNK, self.width - start), device=self._device)
        return torch.stack([row[start : start + CHUNK].float() for row in self._rows])
