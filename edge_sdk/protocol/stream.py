"""The byte stream of a transfer: where each tensor lies in it, its parts and its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.messages import TensorSpec

PART_BYTES = 512 * 1024  # payload of every part but the last
MAX_TRANSFER_BYTES = 4 * 1024**3
ALIGNMENT = 8  # every tensor starts at a multiple of this in the stream


class Layout(NamedTuple):
    """Of a stream. offsets: of every tensor. gap: where a hole lies between tensors without a
    digest and those with one, as [start, end); nothing of it travels."""

    offsets: tuple[int, ...]
    total_bytes: int
    gap: tuple[int, int]

    @property
    def num_parts(self) -> int:
        return num_parts(self.total_bytes)

    @property
    def travelling_bytes(self) -> int:
        return self.total_bytes - (self.gap[1] - self.gap[0])

    def part_size(self, index: int) -> int:
        """Bytes of part `index`; 0 when there is no such part."""
        size, start = part_size(self.total_bytes, index), index * PART_BYTES
        return min(size, self.gap[0] - start) if start < self.gap[0] < self.gap[1] else size


def layout(specs: tuple[TensorSpec, ...]) -> Layout:
    """Where every tensor lies in the byte stream. The first that has a digest begins a part, so
    that whoever keeps all of these asks for none of their parts. Raises ProtocolError for a stream
    that is too long, and for a tensor without a digest behind one that has one."""
    offsets, end, gap = [], 0, (0, 0)
    previous: TensorSpec | None = None
    for spec in specs:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if spec.digest and not (previous and previous.digest):
            start = -(-end // PART_BYTES) * PART_BYTES
            gap = (end, start)
        elif previous and previous.digest and not spec.digest:
            said = f"tensor {spec.name!r} has no digest and follows one that has"
            raise ProtocolError(f"{said}; those with a digest come last")
        offsets.append(start)
        end, previous = start + spec.num_bytes, spec
    if end > MAX_TRANSFER_BYTES:
        raise ProtocolError(f"transfer of {end} bytes, at most {MAX_TRANSFER_BYTES} are accepted")
    return Layout(tuple(offsets), end, gap)


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """What an update or a tensor is known by: the first 16 bytes of SHA-256 of its stream, which
    processors with instructions for it hash quicker than anything else in hashlib."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()[:32]


def num_parts(total_bytes: int) -> int:
    return -(-total_bytes // PART_BYTES)


def part_size(total_bytes: int, index: int) -> int:
    """Bytes of part `index` of a stream of total_bytes without a gap; 0 when there is no such
    part."""
    return max(0, min(PART_BYTES, total_bytes - index * PART_BYTES))
