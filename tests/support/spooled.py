"""Updates for tests of the spool, and what of them is on disk."""

from __future__ import annotations

from coordinator.cohorts.base import ArrivedUpdate
from coordinator.fleet.spool import Spool
from edge_sdk.errors import StoreError
from edge_sdk.protocol.messages import ExitResult, Segment, Update
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import Receiver, Sender, Tensors, specs_of
from tests.support.devices import floats

JOB, OTHER = "1" * 32, "2" * 32
TENSORS = {"stages.0.w": floats(PART_BYTES // 4), "exits.0.b": floats(3, start=7.0)}  # two parts


def arrived(tensors: Tensors, job: str = JOB) -> ArrivedUpdate:
    update = Update(
        job=job,
        digest=Sender(tensors).digest(),
        round=3,
        num_examples=10,
        num_steps=2,
        exits=(ExitResult(exit=1, loss=0.5, metric=0.5),),
        phases={},
        peak_memory_bytes=0,
        tensors=specs_of(tensors),
    )
    segments = (Segment(first=1, last=1),)
    return ArrivedUpdate(
        update=update, segments=segments, upload_s=1.5, bytes_down=100, bytes_up=40
    )


def receive(
    spool: Spool, client: str = "a", tensors: Tensors = TENSORS, parts: int | None = None
) -> Receiver:
    """The first parts of an upload, or all."""
    sender = Sender(tensors)
    receiver = Receiver(sender.specs, spool.storage(3, client))
    for index in range(sender.num_parts if parts is None else parts):
        receiver.add(index, sender.part(index))
    return receiver


def keep(spool: Spool, client: str = "a", tensors: Tensors = TENSORS, job: str = JOB) -> None:
    receive(spool, client, tensors)
    spool.save_update(3, client, arrived(tensors, job))


def files(spool: Spool) -> list[str]:
    return sorted(path.name for path in spool.folder.iterdir())


def one_line(error: StoreError) -> str:
    assert "\n" not in str(error)
    assert "--resume" in str(error)
    return str(error)
