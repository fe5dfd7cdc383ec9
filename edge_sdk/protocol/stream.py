"""The byte stream of a transfer: where each tensor lies in it, its parts and its digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.messages import TensorSpec

PART_BYTES = 512 * 1024  # payload of every part but the last
MAX_TRANSFER_BYTES = 4 * 1024**3
ALIGNMENT = 8  # every tensor starts at a multiple of this in the stream


def layout(specs: tuple[TensorSpec, ...]) -> tuple[tuple[int, ...], int]:
    """Offset of every tensor in the byte stream, and the stream's length in bytes."""
    offsets, end = [], 0
    for spec in specs:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        offsets.append(start)
        end = start + spec.num_bytes
    if end > MAX_TRANSFER_BYTES:
        raise ProtocolError(f"transfer of {end} bytes, at most {MAX_TRANSFER_BYTES} are accepted")
    return tuple(offsets), end


def digest_of(parts: Iterable[bytes | memoryview]) -> str:
    """What an update is known by: the first 16 bytes of SHA-256 of its stream, which processors
    with instructions for it hash quicker than anything else in hashlib."""
    hashed = hashlib.sha256()
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()[:32]


def num_parts(total_bytes: int) -> int:
    return -(-total_bytes // PART_BYTES)


def part_size(total_bytes: int, index: int) -> int:
    """Bytes of part `index` of a stream of total_bytes; 0 when there is no such part."""
    return max(0, min(PART_BYTES, total_bytes - index * PART_BYTES))
