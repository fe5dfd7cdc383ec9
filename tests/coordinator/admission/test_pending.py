"""The keys of devices that were turned away."""

from __future__ import annotations

import errno
import stat
import time

import pytest
import zmq

from coordinator.admission import pending
from coordinator.admission.client_list import Admission
from coordinator.admission.pending import MOST, PendingKeys, forget_pending, read_pending
from coordinator.links.router import Router
from edge_sdk.errors import ConfigError
from edge_sdk.helpers.files import locked
from edge_sdk.protocol.keys import KeyPair, make_keys, read_keys
from tests.support.admission import Gate, new_key
from tests.support.devices import ANY_PORT


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def nobody(key: bytes) -> bool:
    return False


@pytest.fixture
def clock():
    return Clock()


def test_a_device_that_was_turned_away_is_pending(tmp_path):
    gate = Gate(tmp_path / "keys")
    keys = KeyPair(*zmq.curve_keypair())
    before = time.time()
    for _ in range(2):
        assert gate.device(keys).refusal()
    gate.close()
    (pending_key,) = read_pending(gate.pending)
    assert pending_key.public_key == keys.public.decode()
    assert pending_key.tries >= 2
    assert before <= pending_key.first <= pending_key.last <= time.time()
    assert stat.S_IMODE(gate.pending.stat().st_mode) == 0o600


def test_the_end_does_not_wait_for_the_second_to_pass(tmp_path, clock):
    make_keys(tmp_path, "server")
    (tmp_path / "clients").write_text("")
    admission = Admission(tmp_path / "clients")
    admission.pending = PendingKeys(tmp_path / "pending", clock, clock)
    router = Router(ANY_PORT, read_keys(tmp_path, "server"), admission)
    for _ in range(2):
        admission.pending.note(new_key().encode())
        router.receive(0)
    assert len(read_pending(tmp_path / "pending")) == 1
    router.close()
    assert len(read_pending(tmp_path / "pending")) == 2


def test_pending_keys_survive_a_restart(tmp_path, clock):
    keys = [new_key().encode() for _ in range(2)]
    for tries in (1, 2):
        known = PendingKeys(tmp_path / "pending", clock, clock)
        clock.now += 100
        for key in keys:
            known.note(key)
        known.write_if_due(nobody)
        found = read_pending(tmp_path / "pending")
        assert [pending_key.public_key.encode() for pending_key in found] == keys
        assert {(s.first, s.last, s.tries) for s in found} == {(1100.0, clock.now, tries)}


def test_the_newest_are_kept(tmp_path, clock):
    known = PendingKeys(tmp_path / "pending", clock, clock)
    keys = [new_key().encode() for _ in range(MOST + 5)]
    for key in keys:
        clock.now += 1
        known.note(key)
    known.note(keys[6])  # once more: it is new again
    known.note(new_key().encode())
    known.write_if_due(nobody)
    found = [pending_key.public_key.encode() for pending_key in read_pending(tmp_path / "pending")]
    assert len(found) == MOST
    assert found[:-2] == keys[7:]
    assert found[-2] == keys[6]


def test_it_is_written_once_a_second_at_most(tmp_path, clock, monkeypatch):
    writes = []
    monkeypatch.setattr(pending, "write_private", lambda *args, **_: writes.append(clock.now))
    known = PendingKeys(tmp_path / "pending", clock, clock)
    known.write_if_due(nobody)
    assert writes == [], "nothing is new"
    for _ in range(40):  # 10 s
        known.note(new_key().encode())
        known.write_if_due(nobody)
        clock.now += 0.25
    assert writes == [1000.0 + second for second in range(10)]
    clock.now = writes[-1] + 0.5
    known.note(new_key().encode())
    known.write_if_due(nobody)
    assert len(writes) == 10
    known.write_if_due(nobody, is_last=True)
    assert len(writes) == 11, "at the end without delay"


def test_who_was_admitted_is_not_pending(tmp_path, clock):
    known = PendingKeys(tmp_path / "pending", clock, clock)
    keys = [new_key().encode() for _ in range(3)]
    for key in keys:
        known.note(key)
    known.write_if_due(nobody)
    forget_pending(tmp_path / "pending", keys[0])
    found = [pending_key.public_key.encode() for pending_key in read_pending(tmp_path / "pending")]
    assert found == keys[1:]
    clock.now += 5
    known.note(keys[2])
    known.write_if_due(lambda key: key in keys[:2])  # the coordinator's own memory agrees
    found = [pending_key.public_key.encode() for pending_key in read_pending(tmp_path / "pending")]
    assert found == keys[2:]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"", b'[{"public_key": "x"}]', b"[" * 100_000])
def test_a_corrupt_file_is_said_once_and_made_anew(tmp_path, clock, caplog, content):
    path = tmp_path / "pending"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="remove the file, it is made again"):
        read_pending(path)
    forget_pending(path, new_key().encode())
    assert path.read_bytes() == content
    caplog.clear()
    known = PendingKeys(path, clock, clock)
    assert len(caplog.records) == 1
    known.note(new_key().encode())
    known.write_if_due(nobody)
    assert len(read_pending(path)) == 1


def test_while_another_changes_the_files_it_waits(tmp_path, clock, caplog):
    known = PendingKeys(tmp_path / "pending", clock, clock)
    known.note(new_key().encode())
    with locked(tmp_path):
        known.write_if_due(nobody)
    assert not (tmp_path / "pending").exists()
    clock.now += pending.WRITE_S
    known.write_if_due(nobody)
    assert len(read_pending(tmp_path / "pending")) == 1
    assert not caplog.records


def test_a_full_disk_is_said_once_and_tried_again(tmp_path, clock, caplog, monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    known = PendingKeys(tmp_path / "pending", clock, clock)
    with monkeypatch.context() as patch:
        patch.setattr(pending, "write_private", full)
        for _ in range(3):
            known.note(new_key().encode())
            known.write_if_due(nobody)
            clock.now += pending.RETRY_S
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    known.write_if_due(nobody)
    assert len(read_pending(tmp_path / "pending")) == 3
