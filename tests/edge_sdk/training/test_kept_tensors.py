"""Frozen tensors that a device keeps: by what digest, for how long, and within how many bytes."""

from __future__ import annotations

import os

import pytest
import torch

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.stream import PART_BYTES, layout
from edge_sdk.protocol.tensors import Receiver, Sender
from edge_sdk.training.kept_tensors import KeptTensors
from edge_sdk.training.saved_update import KEPT

PART = PART_BYTES // 4  # floats
TENSORS = {
    "stages.0.w": torch.arange(2.0 * PART),
    "exits.0.w": torch.ones(3),
    "stages.1.w": torch.arange(1000.0),
    "stages.1.count": torch.tensor(7),
}


def sender_of(tensors) -> Sender:
    digests = {n: Sender({n: t}).digest() for n, t in tensors.items() if n.startswith("stages.")}
    return Sender(tensors, digests=digests)


def transfer(sender: Sender, kept: KeptTensors) -> tuple[Receiver, list[int]]:
    """A download, by a device that keeps tensors; and the parts that it asked for."""
    receiver, asked = Receiver(sender.specs), []
    kept.fill(receiver)
    while request := receiver.request(1):
        asked.append(request[0])
        receiver.add(request[0], sender.part(request[0]))
    assert receiver.is_complete
    kept.check(receiver)
    kept.keep(receiver)
    return receiver, asked


def test_frozen_tensors_begin_a_part_and_nothing_of_the_gap_travels():
    sender = sender_of(TENSORS)
    assert [spec.name for spec in sender.specs] == [
        "exits.0.w",
        "stages.0.w",
        "stages.1.w",
        "stages.1.count",
    ]
    assert sender.layout.gap == (12, PART_BYTES)
    assert sender.offsets == (0, PART_BYTES, 3 * PART_BYTES, 3 * PART_BYTES + 4000)
    sizes = [len(sender.part(index)) for index in range(sender.num_parts)]
    assert sizes == [12, PART_BYTES, PART_BYTES, 4008]
    assert sum(sizes) == sender.layout.travelling_bytes == 12 + 2 * PART_BYTES + 4008
    assert len(b"".join(sender.blocks())) == sender.total_bytes


def test_tensors_with_a_digest_come_last():
    (own, *frozen) = sender_of(TENSORS).specs
    with pytest.raises(ProtocolError, match="'exits.0.w' has no digest and follows one that has"):
        layout((*frozen, own))


def test_what_is_kept_never_comes_again_also_after_a_restart(tmp_path):
    sender = sender_of(TENSORS)
    assert transfer(sender, KeptTensors(tmp_path))[1] == [0, 1, 2, 3]
    again, asked = transfer(sender, KeptTensors(tmp_path))
    assert asked == [0], "the tensor that is trained"
    found = again.tensors()
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    deeper = sender_of(TENSORS | {"stages.2.w": torch.zeros(5)})
    assert transfer(deeper, KeptTensors(tmp_path))[1] == [0, 3], "the part that holds what is new"
    assert transfer(deeper, KeptTensors(None))[1] == [0, 1, 2, 3], "a device that keeps nothing"


@pytest.mark.parametrize("damage", [b"short", None, "flip"])
def test_a_damaged_file_is_noticed_and_fetched_again(tmp_path, caplog, damage):
    sender = sender_of(TENSORS)
    transfer(sender, KeptTensors(tmp_path))
    path = tmp_path / KEPT / str(sender.specs[1].digest)
    content = path.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    path.write_bytes(flipped if damage == "flip" else damage or content + b"more")
    again, asked = transfer(sender, KeptTensors(tmp_path))
    assert asked == [0, 1, 2]
    assert torch.equal(again.tensors()["stages.0.w"], TENSORS["stages.0.w"])
    assert path.read_bytes() == content
    assert "is damaged; stages.0.w is fetched again" in caplog.text


def test_bytes_of_another_digest_are_refused_and_not_kept(tmp_path):
    sender = sender_of(TENSORS)
    receiver, kept = Receiver(sender.specs), KeptTensors(tmp_path)
    for index in range(sender.num_parts):
        part = bytearray(sender.part(index))
        part[-1] ^= index == 2  # of stages.0.w
        receiver.add(index, part)
    with pytest.raises(ProtocolError, match="stages.0.w came with other bytes than its digest"):
        kept.check(receiver)
    kept.keep(receiver)
    names = {path.name for path in (tmp_path / KEPT).iterdir()}
    assert names == {sender.specs[2].digest, sender.specs[3].digest}


def test_what_came_of_a_job_that_is_given_up_is_kept(tmp_path):
    sender = sender_of(TENSORS)
    receiver = Receiver(sender.specs)
    for index in (1, 3):
        receiver.add(index, sender.part(index))
    KeptTensors(tmp_path).keep(receiver)
    assert transfer(sender, KeptTensors(tmp_path))[1] == [0, 1, 2]


def test_what_was_asked_for_longest_ago_goes_first(tmp_path):
    """Room for two of three tensors of 400 bytes; the middle one is asked for again."""
    folder, digests = tmp_path / KEPT, []
    for value in range(3):
        sender = sender_of({"stages.0.w": torch.full((100,), float(value))})
        digests.append(str(sender.specs[0].digest))
        transfer(sender, KeptTensors(tmp_path, most_bytes=800))
        for age, digest in enumerate(reversed(digests)):
            if (folder / digest).exists():
                os.utime(folder / digest, (1000 - age, 1000 - age))
        if value == 1:
            first = sender_of({"stages.0.w": torch.zeros(100)})
            assert transfer(first, KeptTensors(tmp_path, most_bytes=800))[1] == []
    assert {path.name for path in folder.iterdir()} == {digests[0], digests[2]}


def test_a_job_larger_than_the_bound_keeps_what_fits(tmp_path, caplog):
    """1 MiB, 4000 bytes and 8; drafts of a killed trainer go."""
    (tmp_path / KEPT).mkdir()
    (tmp_path / KEPT / ".abc.0.new").write_bytes(b"draft")
    sender = sender_of(TENSORS)
    transfer(sender, KeptTensors(tmp_path, most_bytes=2 * PART_BYTES + 100))
    assert [path.name for path in (tmp_path / KEPT).iterdir()] == [sender.specs[1].digest]
    assert "take more than 1048676 bytes; the rest is not kept" in caplog.text


def test_a_folder_that_cannot_be_written_costs_a_transfer_only(tmp_path, caplog):
    (tmp_path / KEPT).write_text("a file is in the way")
    sender = sender_of(TENSORS)
    for _ in range(2):
        assert transfer(sender, KeptTensors(tmp_path))[1] == [0, 1, 2, 3]
    assert "frozen tensors are not kept" in caplog.text


def test_a_disk_that_is_nearly_full_keeps_none(tmp_path, caplog):
    sender = sender_of(TENSORS)
    kept = KeptTensors(tmp_path, least_free_bytes=2**62)
    transfer(sender, kept)
    assert not list((tmp_path / KEPT).iterdir())
    assert caplog.text.count("frozen tensors are not kept") == 1
    assert transfer(sender, kept)[1] == [0, 1, 2, 3], "all come again"
