"""Joining while the coordinator, its files or its link break. Real sockets and CURVE."""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from coordinator.admission import client_list as admission_module
from coordinator.admission import invitations as invitations_module
from coordinator.admission import join as joining
from coordinator.admission.client_list import add_client
from coordinator.admission.invitations import Invitations, read_invitations
from edge_sdk.errors import ConfigError, LinkError
from edge_sdk.helpers.files import locked
from edge_sdk.protocol import join as join_module
from edge_sdk.protocol.invitation import InvitationLine
from edge_sdk.protocol.join import Refused, join
from edge_sdk.protocol.keys import make_keys, read_keys
from edge_sdk.protocol.messages import Heartbeat
from tests.support.admission import DAY_S, LINE, Gate, only_invitation, pair_of
from tests.support.devices import WAIT_S
from tests.support.examples import settle
from tests.support.processes import free_port


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_coordinator_killed_while_it_admits(gate, tmp_path, monkeypatch, killed_at):
    """It writes invitation, list, invitation. The same device gets in later, and no other."""
    line = gate.invite()
    count = 0

    def write(path, text, *, _write=admission_module.write_whole, **options):
        nonlocal count
        count += 1
        if count == killed_at:
            raise OSError(errno.EIO, "killed")
        _write(path, text, **options)

    with monkeypatch.context() as patch:
        patch.setattr(admission_module, "write_whole", write)
        patch.setattr(invitations_module, "write_whole", write)
        with pytest.raises(Refused, match="could not write its list, its log says why"):
            join(line, tmp_path / "a", "a")
    if killed_at == 1:
        assert gate.names() == {}
        assert only_invitation(gate).client is None
    else:
        for folder, name in (("b", "b"), ("b", "a"), ("a", "b")):
            with pytest.raises(Refused, match="was used already"):
                join(line, tmp_path / folder, name)
    keys = join(line, tmp_path / "a", "a")
    assert gate.names() == {"a": keys.public}
    assert only_invitation(gate).is_done


def test_a_bad_list_refuses_and_says_so_in_the_log_only(gate, tmp_path, caplog):
    line = gate.invite()
    gate.clients.write_text("nonsense\n")
    settle(gate.clients)
    with pytest.raises(Refused, match="could not write its list") as caught:
        join(line, tmp_path / "pi", "pi")
    assert str(tmp_path) not in str(caught.value), "no paths for strangers"
    assert "join of pi failed" in caplog.text
    assert gate.clients.read_text() == "nonsense\n"


@pytest.mark.parametrize("content", [b"[{}]", b"\xff", b"[" * 100_000, b'{"a": 1}', b""])
def test_invitations_that_went_bad_invite_nobody_and_stop_nothing(gate, tmp_path, caplog, content):
    line = gate.invite()
    admitted = make_keys(tmp_path / "good", "device")
    add_client(gate.clients, "good", admitted.public)
    gate.invitations.write_bytes(content)
    with pytest.raises(Refused, match="refused this invitation"):
        join(line, tmp_path / "pi", "pi")
    device = gate.device(admitted)
    device.send(Heartbeat())
    device.expect(Heartbeat)
    assert caplog.text.count("cannot be read") == 1
    with pytest.raises(ConfigError, match="remove the file and invite again"):
        gate.invite()


def test_old_invitations_are_forgotten_in_time(gate):
    gate.invite("old", valid_s=-8 * DAY_S)
    gate.invite("late", valid_s=-6 * DAY_S)
    gate.invite("new")
    assert [i.name for i in read_invitations(gate.invitations)] == ["late", "new"]


def test_while_another_changes_the_list_the_device_asks_again(gate, tmp_path, monkeypatch):
    monkeypatch.setattr(join_module, "AGAIN_S", 0.05)
    line, asked = gate.invite(), threading.Event()

    def answer(*args, _answer=joining.answer):
        reply = _answer(*args)
        if reply is None:
            asked.set()
        return reply

    monkeypatch.setattr(joining, "answer", answer)
    with ThreadPoolExecutor(1) as pool:
        with locked(gate.clients.parent):
            joined = pool.submit(join, line, tmp_path / "pi", "pi")
            assert asked.wait(WAIT_S)
            assert gate.names() == {}
        joined.result(WAIT_S)
    assert list(gate.names()) == ["pi"]


def test_a_coordinator_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(join_module, "CONNECT_S", 0.1)
    line = InvitationLine(f"tcp://127.0.0.1:{free_port()}", "", LINE.server_key, LINE.secret)
    with pytest.raises(LinkError, match="is not reached for 0.1 s; is the coordinator running"):
        join(line, tmp_path / "pi", "pi")
    assert read_keys(tmp_path / "pi", "device"), "kept for the next time"


def test_a_coordinator_that_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setattr(join_module, "ANSWER_S", 0.1)
    gate = Gate(tmp_path / "keys")
    line = gate.invite()
    gate._is_open = False
    gate._thread.join(WAIT_S)
    try:
        with pytest.raises(LinkError, match="is reached but has not answered for 0.1 s"):
            join(line, tmp_path / "pi", "pi")
    finally:
        gate.close()


def test_a_coordinator_that_goes_and_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(join_module, "AGAIN_S", 0.05)
    first = Gate(tmp_path / "keys")
    line = first.invite()
    first._is_open = False
    first._thread.join(WAIT_S)
    with ThreadPoolExecutor(1) as pool:
        joined = pool.submit(join, line, tmp_path / "pi", "pi")
        assert first.router.socket.poll(int(1000 * WAIT_S)), "the question is there, and is lost"
        first.close()
        second = Gate(tmp_path / "keys", first.endpoint)
        try:
            keys = joined.result(WAIT_S)
            assert second.names() == {"pi": keys.public}
        finally:
            second.close()


def test_invitations_that_could_not_be_read_are_read_again(gate, monkeypatch, caplog):
    """As when too many files are open, for a moment."""
    line, invitations = gate.invite(), Invitations(gate.invitations)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: (_ for _ in ()).throw(OSError(24, "many")))
        for _ in range(3):
            assert invitations.find(pair_of(line).public) is None
    assert "cannot be read: [Errno 24] many" in caplog.text
    assert len(caplog.records) == 1
    assert invitations.find(pair_of(line).public) is not None
