"""Tensors as a stream of parts, put together here in numpy, and what came of them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from edge_sdk.protocol.tensors import Receiver, Sender

FLOATS_PER_PART = 131_072  # 524288 / 4


def stream_of(tensors: Mapping[str, Tensor]) -> bytes:
    """The stream of docs/protocol.md, section 5: 0s up to a multiple of 8, then the raw bytes."""
    stream = b""
    for tensor in tensors.values():
        stream += bytes(-len(stream) % 8) + tensor.numpy().tobytes()
    return stream


def parts_of(sender: Sender) -> list[bytes]:
    return [bytes(sender.part(index)) for index in range(sender.num_parts)]


def received(sender: Sender) -> Receiver:
    receiver = Receiver(sender.specs)
    for index, part in enumerate(parts_of(sender)):
        receiver.add(index, part)
    return receiver


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """Names, order, dtypes, shapes and every bit."""
    assert list(got) == list(want)
    for name, tensor in want.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert got[name].numpy().tobytes() == tensor.numpy().tobytes()
