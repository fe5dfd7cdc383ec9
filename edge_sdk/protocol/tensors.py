"""Tensors to specs and a byte stream cut into parts, and back.

The stream is the tensors' raw little-endian bytes in the order of the specs, each beginning at a
multiple of 8; a part is a fixed-size cut of it, so a part's place follows from its index and any
part can be asked for again. Tensors with a digest come last and begin a part of their own. Neither
side ever holds a second copy of a large tensor: parts inside one tensor are views, and a receiver
writes into the one buffer that its tensors are views of."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol, TypeAlias

import torch
from msgspec.structs import replace
from torch import Tensor

from edge_sdk.errors import ProtocolError, ShapeError
from edge_sdk.protocol.fields import ITEM_BYTES
from edge_sdk.protocol.messages import TensorSpec
from edge_sdk.protocol.stream import PART_BYTES, digest_of, layout, part_size
from edge_sdk.protocol.tensor_lists import role_of, some_of

if sys.byteorder != "little":
    raise ImportError("edge_sdk needs a little-endian machine: tensors travel as raw bytes")

Tensors: TypeAlias = dict[str, Tensor]
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in ITEM_BYTES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def specs_of(tensors: Mapping[str, Tensor]) -> tuple[TensorSpec, ...]:
    """The full list that goes ahead of a transfer; a name says its role. Raises ShapeError for a
    dtype without name."""
    specs = []
    for name, tensor in tensors.items():
        dtype = NAMES.get(tensor.dtype)
        if dtype is None:
            raise ShapeError(f"tensor {name!r} is {tensor.dtype}; known: {', '.join(DTYPES)}")
        role, shape = role_of(name)[0], tuple(tensor.shape)
        specs.append(TensorSpec(name=name, shape=shape, dtype=dtype, role=role))  # type: ignore[arg-type]
    return tuple(specs)


def check_shapes(
    tensors: Mapping[str, Tensor], want: Mapping[str, Sequence[int | None]], where: str
) -> None:
    """Raise ShapeError unless `tensors` have the names and shapes of `want`; None: any size."""
    missing, extra = sorted(set(want) - set(tensors)), sorted(set(tensors) - set(want))
    if missing or extra:
        said = f"not expected: {some_of(extra)}"
        raise ShapeError(f"{where}: tensors missing: {some_of(missing)}; {said}")
    for name, shape in want.items():
        got = tuple(tensors[name].shape)
        if len(got) != len(shape) or any(
            size not in (None, has) for size, has in zip(shape, got, strict=True)
        ):
            raise ShapeError(f"{where}: {name} is {got}, expected {tuple(shape)}")


class Sender:
    """Parts of a set of tensors on demand; holds references, copies nothing large.

    digests: of tensors that a receiver may keep, by name; these are sent last. is_shared: sends to
    many; a part that crosses tensors' edges is made once and kept, for at most one more copy of the
    tensors, instead of once for every receiver."""

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        *,
        digests: Mapping[str, str] | None = None,
        is_shared: bool = False,
    ) -> None:
        self._joined: dict[int, bytes] | None = {} if is_shared else None
        digests = digests or {}
        tensors = {name: tensors[name] for name in sorted(tensors, key=lambda n: n in digests)}
        self.tensors = tuple(tensors.values())
        self.specs = specs_of(tensors)
        if digests:
            self.specs = tuple(replace(s, digest=digests.get(s.name)) for s in self.specs)
        self.layout = layout(self.specs)
        self.offsets, self.total_bytes = self.layout.offsets, self.layout.total_bytes
        self.num_parts = self.layout.num_parts
        self._views = [_bytes_of(tensor) for tensor in tensors.values()]

    def part(self, index: int) -> memoryview | bytes:
        """Payload of part `index`. Raises ProtocolError when there is no such part."""
        size = self.layout.part_size(index)
        if size == 0:
            raise ProtocolError(f"part {index} asked for, the transfer has {self.num_parts}")
        start = index * PART_BYTES
        first = bisect.bisect_right(self.offsets, start) - 1
        offset = start - self.offsets[first]
        if offset + size <= len(self._views[first]):
            return self._views[first][offset : offset + size]
        if self._joined is None:
            return self._join(start, size, first)
        if index not in self._joined:
            self._joined[index] = self._join(start, size, first)
        return self._joined[index]

    def _join(self, start: int, size: int, first: int) -> bytes:
        joined = bytearray(size)
        for offset, view in zip(self.offsets[first:], self._views[first:], strict=True):
            if offset >= start + size:
                break
            begin, end = max(offset, start), min(offset + len(view), start + size)
            if begin < end:
                joined[begin - start : end - start] = view[begin - offset : end - offset]
        return bytes(joined)

    def blocks(self) -> Iterator[memoryview | bytes]:
        """The whole stream in order, with zeros in its gap."""
        for index in range(self.num_parts):
            yield self.part(index)
            if lacking := part_size(self.total_bytes, index) - self.layout.part_size(index):
                yield bytes(lacking)

    def digest(self) -> str:
        """The digest of the whole stream."""
        return digest_of(self.blocks())


class Storage(Protocol):
    """Where a transfer's bytes go; in the end one flat tensor of them, dtype uint8."""

    def write(self, start: int, payload: memoryview | bytes) -> None: ...
    def whole(self) -> Tensor: ...


class Memory:
    """Storage in this process."""

    def __init__(self, num_bytes: int) -> None:
        self._bytes = torch.empty(num_bytes, dtype=torch.uint8)
        self._view = _bytes_of(self._bytes)

    def write(self, start: int, payload: memoryview | bytes) -> None:
        self._view[start : start + len(payload)] = payload

    def whole(self) -> Tensor:
        return self._bytes


class Receiver:
    """Collects parts in any order; the tensors are views of one buffer, make_storage(bytes)."""

    def __init__(
        self, specs: Sequence[TensorSpec], make_storage: Callable[[int], Storage] = Memory
    ) -> None:
        self.specs = tuple(specs)
        self.layout = layout(self.specs)
        self.offsets, self.total_bytes = self.layout.offsets, self.layout.total_bytes
        self.num_parts = self.layout.num_parts
        self._storage = make_storage(self.total_bytes)
        self._has = bytearray(self.num_parts)
        self.num_received = 0
        self._requested = 0  # parts before this index have been asked for, unless they were here

    @property
    def is_complete(self) -> bool:
        return self.num_received == self.num_parts

    @property
    def next_missing(self) -> int:
        """Index of the first part that has not arrived; num_parts when all have."""
        place = self._has.find(0)
        return self.num_parts if place < 0 else place

    def next_request(self, window: int) -> tuple[int, int] | None:
        """(first, count) of the parts to ask for now so that at most `window` are under way; None
        while more than half of the window is. Counts them as asked for.

        Under way is what was asked for and has not arrived. What came unasked changes nothing but
        that it is not asked for any more."""
        under_way = self.num_under_way
        return self.request(window - under_way) if under_way <= window // 2 else None

    @property
    def num_under_way(self) -> int:
        """Parts asked for that have not arrived."""
        return self._has.count(0, 0, self._requested)

    def request(self, count: int) -> tuple[int, int] | None:
        """(first, count) of at most `count` more parts, counted as asked for; None when there are
        none to ask for."""
        first = self._has.find(0, self._requested)
        if first < 0 or count < 1:
            return None
        here = self._has.find(1, first)
        end = self.num_parts if here < 0 else here
        self._requested = min(end, first + count)
        return first, self._requested - first

    def restart(self) -> None:
        """After a lost connection: what has not arrived is to be asked for again."""
        self._requested = self.next_missing

    def add(self, index: int, payload: memoryview | bytes) -> bool:
        """Take one part. False: it is here already, and ignored. Raises ProtocolError."""
        size = self.layout.part_size(index)
        if size == 0 or len(payload) != size:
            raise ProtocolError(
                f"part {index} has {len(payload)} bytes, expected {size} "
                f"(transfer of {self.total_bytes} bytes in {self.num_parts} parts)"
            )
        if self._has[index]:
            return False
        self._storage.write(index * PART_BYTES, payload)
        self._has[index] = 1
        self.num_received += 1
        return True

    def place_of(self, number: int) -> memoryview:
        """The bytes of tensor `number` of the list, to be read or written."""
        start = self.offsets[number]
        return self.stream()[start : start + self.specs[number].num_bytes]

    def has_whole(self, number: int) -> bool:
        """Whether all parts of this tensor are here."""
        return all(self._has[part] for part in self._parts_of(number))

    def skip(self, numbers: Collection[int]) -> None:
        """These tensors have been written to their places: parts that hold nothing else count as
        here, before any is asked for."""
        others = (n for n in range(len(self.specs)) if n not in numbers)
        wanted = {part for number in others for part in self._parts_of(number)}
        for part in range(self.num_parts):
            self._has[part] = part not in wanted
        self.num_received = self.num_parts - len(wanted)

    def _parts_of(self, number: int) -> range:
        start, size = self.offsets[number], self.specs[number].num_bytes
        return range(start // PART_BYTES, -(-(start + size) // PART_BYTES)) if size else range(0)

    def tensors(self) -> Tensors:
        """The tensors, views of this receiver's buffer. Raises ProtocolError when parts lack."""
        if not self.is_complete:
            said = "nothing is used"
            raise ProtocolError(f"{self.num_received} of {self.num_parts} parts arrived; {said}")
        return views(self.specs, self._storage.whole())

    def stream(self) -> memoryview:
        """The whole stream, once all parts are here."""
        return _bytes_of(self._storage.whole())


def views(specs: Sequence[TensorSpec], stream: Tensor) -> Tensors:
    """The tensors of a whole stream, dtype uint8, as views of it."""
    found: Tensors = {}
    for spec, offset in zip(specs, layout(tuple(specs))[0], strict=True):
        raw = stream[offset : offset + spec.num_bytes]
        found[spec.name] = raw.view(DTYPES[spec.dtype]).view(spec.shape)
    return found


def with_prefix(state: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The entries whose name begins with `prefix`, without it."""
    return {name[len(prefix) :]: t for name, t in state.items() if name.startswith(prefix)}


def check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise ShapeError naming the first tensor with NaN or infinite values."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or bool(torch.isfinite(tensor.sum())):
            continue  # a sum keeps every NaN and infinity, and needs no second tensor
        if not bool(torch.isfinite(tensor).all()):  # else finite values had an infinite sum
            raise ShapeError(f"{where}: {name} holds NaN or infinite values; nothing of it is used")


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel() == 0:
        return memoryview(b"")
    return flat.view(torch.uint8).numpy().data
