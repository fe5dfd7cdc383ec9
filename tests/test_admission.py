"""How devices come into the list, change their key, and are put out: invitations, `join`, rotation,
revocation, and the keys of those who were turned away. Real sockets and CURVE throughout."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import pytest
import zmq

from coordinator import admission as admission_module
from coordinator import invitations as invitations_module
from coordinator import joining, strangers
from coordinator.admission import (
    Admission,
    add_client,
    read_list,
    remove_client,
    replace_client,
)
from coordinator.hub import Hub
from coordinator.invitations import Invitation, read_invitations, withdraw, write_invitation
from coordinator.key_files import locked
from coordinator.strangers import MOST, Strangers, forget_stranger, read_strangers
from edge_sdk import join as join_module
from edge_sdk import keys as keys_module
from edge_sdk.errors import ConfigError, LinkError
from edge_sdk.invitation import InvitationLine, decode_line, encode_line
from edge_sdk.join import Refused, join, rotate
from edge_sdk.keys import KeyPair, has_next_keys, make_keys, next_keys, read_keys, swap_keys
from edge_sdk.wire import Bye, Fault, Heartbeat, Join, Joined, Part, Ready
from tests.helpers import settle
from tests.processes import free_port
from tests.scripted import ANY_PORT, WAIT_S, ScriptedDevice

DAY_S = 24 * 3600.0


class Gate:
    """A coordinator's hub that takes messages in a thread of its own; what passes it is kept.

    folder: of its keys and lists, made here."""

    def __init__(self, folder: Path, endpoint: str = ANY_PORT) -> None:
        self.clients = folder / "clients"
        self.invitations = folder / "invitations"
        self.pending = folder / "pending"
        if not self.clients.exists():
            make_keys(folder, "server")
            self.clients.write_text("# those who may\n")
        self.keys = read_keys(folder, "server")
        self.hub = Hub(endpoint, self.keys, Admission(self.clients))
        self.endpoint = self.hub.endpoint
        self.passed: list[str] = []  # types of the messages that a cohort would see
        self._is_open = True
        self._devices: list[ScriptedDevice] = []
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while self._is_open:
            _, received = self.hub.receive(20)
            if received is not None:
                self.passed.append(f"{received.name} {type(received.message).__name__}")
                self.hub.send(received.route, Heartbeat())

    def invite(self, name: str | None = None, *, valid_s: float = DAY_S) -> InvitationLine:
        public, secret = zmq.curve_keypair()
        invitation = Invitation(
            public_key=public.decode(), name=name, expires=time.time() + valid_s
        )
        write_invitation(self.invitations, invitation)
        return InvitationLine(self.endpoint, name or "", self.keys.public, secret)

    def device(self, keys: KeyPair, name: str = "pi") -> ScriptedDevice:
        device = ScriptedDevice(self.endpoint, name, keys, self.keys.public)
        self._devices.append(device)
        return device

    def names(self) -> dict[str, bytes]:
        return Admission(self.clients).names()

    def files(self) -> tuple[str, str]:
        return self.clients.read_text(), self.invitations.read_text()

    def close(self) -> None:
        for device in self._devices:
            device.close()
        self._is_open = False
        self._thread.join(WAIT_S)
        self.hub.close()


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "keys")
    yield gate
    gate.close()


def pair_of(line: InvitationLine) -> KeyPair:
    return KeyPair(zmq.curve_public(line.secret), line.secret)


def new_key() -> str:
    return zmq.curve_keypair()[0].decode()


def only_invitation(gate: Gate) -> Invitation:
    (invitation,) = read_invitations(gate.invitations)
    return invitation


# -- the line --------------------------------------------------------------------------------------

LINE = InvitationLine("tcp://192.0.2.1:5555", "pi-1", *(zmq.curve_keypair()))


@pytest.mark.parametrize("name", ["", "pi-1", "a" * 64])
@pytest.mark.parametrize("endpoint", ["tcp://192.0.2.1:5555", "tcp://[2001:db8::1]:1"])
def test_a_line_is_read_back(name, endpoint):
    line = InvitationLine(endpoint, name, LINE.server_key, LINE.secret)
    text = encode_line(line)
    assert decode_line(text) == line
    assert decode_line(f"  {text[:30]} \r\n {text[30:]}\n") == line  # as a mail program wraps it
    assert text.split("-", 2)[:2] == ["edge", "join"]
    assert text.replace("-", "").replace("_", "").isalnum(), "nothing that a shell would take"


def test_a_line_does_not_show_its_secret():
    assert LINE.secret.decode() not in repr(LINE) + str(LINE) + f"{[LINE]}"


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda text: "", "this is no invitation: .*got 0 other characters"),
    (lambda text: text.removeprefix("edge-"), "this is no invitation"),
    (lambda text: text + "!", "this is no invitation"),
    (lambda text: text + "é", "this is no invitation"),
    (lambda text: text + "A" * 1000, "this is no invitation"),
    (lambda text: text[:-1], "the invitation is damaged"),
    (lambda text: text[:40], "the invitation is damaged"),
    (lambda text: text[:12], "the invitation is damaged"),
    (lambda text: text[:50] + "AAAA" + text[54:], "the invitation is damaged"),
    (lambda text: text.replace("-1-", "-2-", 1), "an invitation of version 2, this .* version 1"),
    (lambda text: text.replace("-1-", "-999999999999-", 1), "this is no invitation"),
], ids=str)  # fmt: skip
def test_a_line_that_is_none_is_one_clear_error(spoil, said):
    text = spoil(encode_line(LINE))
    with pytest.raises(ConfigError, match=said) as caught:
        decode_line(text)
    assert encode_line(LINE)[60:80] not in str(caught.value), "a part of the secret"


@pytest.mark.parametrize(("endpoint", "name", "said"), [
    ("ipc:///tmp/x", "", "endpoint 'ipc:///tmp/x' is not tcp://HOST:PORT"),
    ("tcp://h:0", "", "port outside"),
    ("tcp://h:1", "../etc", "no device's name"),
    ("tcp://h:1", "a b", "no device's name"),
])  # fmt: skip
def test_a_whole_line_may_still_say_nonsense(endpoint, name, said):
    with pytest.raises(ConfigError, match=said):
        decode_line(encode_line(InvitationLine(endpoint, name, LINE.server_key, LINE.secret)))


# -- joining ---------------------------------------------------------------------------------------


def test_an_invited_device_is_admitted_under_its_own_key(gate, tmp_path):
    line = gate.invite("pi-1")
    assert gate.names() == {}
    keys = join(line, tmp_path / "pi", "pi-1")
    assert keys == read_keys(tmp_path / "pi", "device")
    assert gate.names() == {"pi-1": keys.public}
    assert gate.clients.read_text().startswith("# those who may\n")
    device = gate.device(keys)
    device.send(Heartbeat())
    device.expect(Heartbeat)
    assert gate.passed == ["pi-1 Heartbeat"], "join itself does not pass the hub"


def test_the_coordinator_keeps_no_secret_of_an_invitation(gate, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    line = gate.invite()
    keys = join(line, tmp_path / "pi", "pi-1")
    kept = "".join(file.read_text() for file in gate.clients.parent.iterdir())
    for secret in (line.secret, keys.secret):
        assert secret.decode() not in kept + caplog.text
    assert stat.S_IMODE(gate.invitations.stat().st_mode) == 0o600


def test_an_invitation_without_a_name_takes_the_devices(gate, tmp_path):
    join(gate.invite(), tmp_path / "pi", "kitchen")
    assert list(gate.names()) == ["kitchen"]
    used = only_invitation(gate)
    assert (used.client, used.is_done) == ("kitchen", True)


def test_joining_again_is_answered_again(gate, tmp_path):
    """The answer may have been lost."""
    line = gate.invite("pi-1")
    first = join(line, tmp_path / "pi", "pi-1")
    before = gate.files()
    assert join(line, tmp_path / "pi", "pi-1") == first
    assert gate.files() == before


def test_an_invitation_admits_one_device(gate, tmp_path):
    line = gate.invite()
    join(line, tmp_path / "a", "a")
    before = gate.files()
    for name in ("a", "b"):
        with pytest.raises(Refused, match="refused: this invitation was used already; ask for a"):
            join(line, tmp_path / "b", name)
    with pytest.raises(Refused, match="was used already"):
        join(line, tmp_path / "a", "other")
    assert gate.files() == before


def test_of_two_devices_at_once_one_gets_in(gate, tmp_path):
    line = gate.invite()

    def attempt(name: str) -> str:
        try:
            join(line, tmp_path / name, name)
        except Refused as refusal:
            return str(refusal)
        return "in"

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(attempt, ("a", "b")))
    assert sorted("used already" in result for result in results) == [False, True]
    assert results.count("in") == len(gate.names()) == 1


def test_an_expired_invitation(gate, tmp_path):
    line = gate.invite("pi-1", valid_s=-1.0)
    with pytest.raises(Refused, match=r"this invitation expired at 20\d\d-.* UTC; ask for a new"):
        join(line, tmp_path / "pi", "pi-1")
    assert gate.names() == {}


def test_a_used_invitation_expires_too(gate, tmp_path):
    line = gate.invite("pi-1")
    join(line, tmp_path / "pi", "pi-1")
    expired = Invitation(**(json.loads(gate.invitations.read_text())[0] | {"expires": 1.0}))
    gate.invitations.write_text(f"[{json.dumps(vars_of(expired))}]")
    with pytest.raises(Refused, match="this invitation expired at 1970-01-01 00:00 UTC"):
        join(line, tmp_path / "pi", "pi-1")


def vars_of(invitation: Invitation) -> dict:
    return {name: getattr(invitation, name) for name in invitation.__struct_fields__}


def test_a_withdrawn_invitation(gate, tmp_path):
    line = gate.invite("pi-1")
    assert len(withdraw(gate.invitations, "pi-1")) == 1
    with pytest.raises(Refused, match="does not know this invitation: it was withdrawn"):
        join(line, tmp_path / "pi", "pi-1")


def test_an_invitation_withdrawn_on_a_live_link(gate):
    line = gate.invite("pi-1")
    device = gate.device(pair_of(line))
    device.send(Ready(exit=1))
    assert device.expect(Fault).code == "admission"
    withdraw(gate.invitations, "pi-1")
    device.send(Join(client_id="pi-1", public_key=new_key()))
    assert "not admitted any more" in device.expect(Fault).detail
    assert gate.names() == {}


def test_a_line_with_another_coordinators_key(gate, tmp_path):
    line = gate.invite()
    other = InvitationLine(line.endpoint, "", LINE.server_key, line.secret)
    with pytest.raises(Refused, match="public key here is probably not the one it runs with"):
        join(other, tmp_path / "pi", "pi-1")


def refused_joins() -> list:
    """(what to prepare, the join, what is said); prepared by (gate, invitation line)."""
    taken, listed = new_key(), new_key()

    def add(gate, line):
        add_client(gate.clients, "taken", taken.encode())
        add_client(gate.clients, "other", listed.encode())

    return [
        pytest.param("pi-1", Join(client_id="pi-2", public_key=new_key()), add,
                     "this invitation is for 'pi-1', not for 'pi-2'", id="another name"),
        pytest.param(None, Join(client_id="taken", public_key=new_key()), add,
                     "the name 'taken' is taken by another key", id="taken name"),
        pytest.param("taken", Join(client_id="taken", public_key=new_key()), add,
                     "the name 'taken' is taken by another key", id="invited, but taken"),
        pytest.param(None, Join(client_id="new", public_key=listed), add,
                     "this device's key is in the list already, as 'other'", id="listed key"),
        pytest.param(None, Join(client_id="new", public_key="#" * 40), add,
                     "join holds no key: 40 characters, but not Z85", id="not a key"),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "question", "prepare", "said"), refused_joins())
def test_a_refused_join_changes_nothing(gate, name, question, prepare, said):
    line = gate.invite(name)
    prepare(gate, line)
    before = gate.files()
    device = gate.device(pair_of(line))
    device.send(question)
    fault = device.expect(Fault)
    assert (fault.code, fault.round) == ("admission", 0)
    assert said in fault.detail
    assert gate.files() == before
    good = Join(client_id=name if name == "pi-1" else "free", public_key=new_key())
    device.send(good)
    if name != "taken":
        assert device.expect(Joined).client_id == good.client_id, "it still admits one"


def test_an_invitations_key_does_not_become_a_clients(gate):
    """Its secret has been in a line of text."""
    line = gate.invite()
    device = gate.device(pair_of(line))
    device.send(Join(client_id="pi", public_key=pair_of(line).public.decode()))
    assert "an invitation's key is nobody's own" in device.expect(Fault).detail
    other = pair_of(gate.invite())
    device.send(Join(client_id="pi", public_key=other.public.decode()))
    assert "an invitation's key is nobody's own" in device.expect(Fault).detail
    assert gate.names() == {}


def test_an_invitations_key_may_do_nothing_else(gate, tmp_path):
    line = gate.invite()
    device = gate.device(pair_of(line))
    before = gate.files()
    for message in (device.make_hello(), Heartbeat(), Ready(exit=1), Bye(), Joined(client_id="a")):
        device.send(message)
        fault = device.expect(Fault)
        assert (fault.code, fault.round) == ("admission", 0)
        assert fault.detail == "an invitation's key may send join and nothing else"
    device.send(Part(round=1, index=0), b"bytes")
    assert device.expect(Fault).code == "admission"
    device.send_frames(b"\xc1")
    assert device.expect(Fault).code == "protocol"
    assert gate.passed == []
    assert gate.files() == before
    join(line, tmp_path / "pi", "pi")  # and it is as good as before


@pytest.mark.parametrize(("field", "value"), [
    ("client_id", ""), ("client_id", "-pi"), ("client_id", "a b"), ("client_id", "a" * 65),
    ("client_id", "pi\n"), ("client_id", None), ("public_key", "a" * 39), ("public_key", "a" * 41),
    ("public_key", "a" * 40 + "\n"), ("public_key", '"' * 40), ("public_key", b"a" * 40),
])  # fmt: skip
def test_a_malformed_join_is_refused_by_its_field(gate, field, value):
    device = gate.device(pair_of(gate.invite()))
    good = {"type": "join", "client_id": "pi", "public_key": new_key()}
    device.send_frames(msgpack.packb(good | {field: value}))
    assert device.expect(Fault).code == "protocol"
    assert gate.names() == {}


def test_strangers_do_not_get_so_far(gate):
    stranger = gate.device(KeyPair(*zmq.curve_keypair()))
    assert "does not know this device's key" in stranger.refusal()


def test_a_coordinator_without_encryption_has_no_list_to_join():
    hub = Hub(ANY_PORT, None, None)
    device = ScriptedDevice(hub.endpoint, "pi")
    device.send(Join(client_id="pi", public_key=new_key()))
    assert hub.receive(int(1000 * WAIT_S)) == (True, None)
    assert "--insecure and has no list" in device.expect(Fault).detail
    device.close()
    hub.close()


def test_a_device_in_the_list_may_use_its_invitation_again(gate, tmp_path):
    """As after a change of the coordinator's own pair: only server.public is new for the device."""
    keys = make_keys(tmp_path / "pi", "device")
    add_client(gate.clients, "pi-1", keys.public)
    before = gate.clients.read_text()
    assert join(gate.invite("pi-1"), tmp_path / "pi", "pi-1") == keys
    assert gate.clients.read_text() == before
    assert only_invitation(gate).is_done


def test_a_removed_device_does_not_come_back_with_its_invitation(gate, tmp_path):
    line = gate.invite()
    join(line, tmp_path / "pi", "pi")
    assert remove_client(gate.clients, "pi")
    with pytest.raises(Refused, match="was used already"):
        join(line, tmp_path / "pi", "pi")
    gate.clients.write_text("")  # by hand, likewise
    settle(gate.clients)
    with pytest.raises(Refused, match="was used already"):
        join(line, tmp_path / "pi", "pi")


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_coordinator_killed_while_it_admits(gate, tmp_path, monkeypatch, killed_at):
    """It writes invitation, list, invitation. The same device gets in later, and no other."""
    line = gate.invite()
    count = 0

    def write(path, text, mode=None, *, _write=admission_module.replace_text):
        nonlocal count
        count += 1
        if count == killed_at:
            raise OSError(errno.EIO, "killed")
        _write(path, text, mode)

    with monkeypatch.context() as patch:
        patch.setattr(admission_module, "replace_text", write)
        patch.setattr(invitations_module, "replace_text", write)
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
    with pytest.raises(Refused, match="does not know this invitation"):
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
        assert first.hub.socket.poll(int(1000 * WAIT_S)), "the question is there, and is lost"
        first.close()
        second = Gate(tmp_path / "keys", first.endpoint)
        try:
            keys = joined.result(WAIT_S)
            assert second.names() == {"pi": keys.public}
        finally:
            second.close()


# -- another key -----------------------------------------------------------------------------------


@pytest.fixture
def member(gate, tmp_path):
    """A device's folder with the keys of the admitted client pi."""
    folder = tmp_path / "pi"
    add_client(gate.clients, "first", new_key().encode())
    add_client(gate.clients, "pi", make_keys(folder, "device").public)
    return folder


def turn(gate: Gate, folder: Path, name: str = "pi") -> KeyPair:
    return rotate(gate.endpoint, gate.keys.public, folder, name)


def test_a_device_changes_its_key(gate, member):
    old = read_keys(member, "device")
    new = turn(gate, member)
    assert new != old
    assert read_keys(member, "device") == new
    assert sorted(file.name for file in member.iterdir()) == ["device.public", "device.secret"]
    assert stat.S_IMODE((member / "device.secret").stat().st_mode) == 0o600
    assert gate.names()["pi"] == new.public
    assert list(gate.names()) == ["first", "pi"], "the other one is still there"
    assert "does not know this device's key" in gate.device(old).refusal()
    device = gate.device(new)
    device.send(Heartbeat())
    device.expect(Heartbeat)
    assert turn(gate, member) != new, "and once more"


def test_a_live_link_under_the_old_key_ends_with_it(gate, member):
    device = gate.device(read_keys(member, "device"))
    device.send(Heartbeat())
    device.expect(Heartbeat)
    turn(gate, member)
    device.send(Heartbeat())
    assert device.expect(Fault).code == "admission"


class Killed(BaseException):
    """Not caught by anything in the product."""


def kill_points(monkeypatch, number: int) -> list[str]:
    """Raise Killed at the number-th point of a rotation; the list of those that were passed."""
    passed: list[str] = []

    def wrap(owner, name):
        call = getattr(owner, name)

        def step(*args, **kwargs):
            reach(f"before {name}")
            result = call(*args, **kwargs)
            reach(f"after {name}")
            return result

        monkeypatch.setattr(owner, name, step)

    def reach(point):
        passed.append(point)
        if len(passed) == number:
            raise Killed

    wrap(keys_module, "_write_new")
    wrap(keys_module, "_sync")
    wrap(join_module, "_ask")
    for name in ("replace", "unlink"):
        call = getattr(Path, name)

        def step(self, *args, _call=call, _name=name, **kwargs):
            if threading.current_thread() is not threading.main_thread():
                return _call(self, *args, **kwargs)
            reach(f"before {_name} {self.name}")
            result = _call(self, *args, **kwargs)
            reach(f"after {_name} {self.name}")
            return result

        monkeypatch.setattr(Path, name, step)
    return passed


def test_a_rotation_killed_at_any_point_is_finished_by_the_next(gate, member, monkeypatch):
    points = 0
    while True:
        points += 1
        before = read_keys(member, "device")
        with monkeypatch.context() as patch:
            passed = kill_points(patch, points)
            try:
                turn(gate, member)
            except Killed:
                pass
            else:
                break
        listed = gate.names()["pi"]
        pairs = [read_keys(member, "device")]
        if has_next_keys(member):
            pairs.append(next_keys(member))
        assert listed in [pair.public for pair in pairs], f"lost its key {passed[-1]}"
        after = turn(gate, member)
        assert read_keys(member, "device") == after != before
        assert gate.names()["pi"] == after.public
        assert not has_next_keys(member)
    assert points > 20
    assert {"before _ask", "after _ask", "before replace device.next.public"} <= set(passed)


def test_a_rotation_whose_answer_was_lost_is_finished_by_join(gate, member):
    new = next_keys(member)
    line = gate.invite("pi")
    gate.clients.write_text(f"pi {new.public.decode()}\n")
    settle(gate.clients)
    assert join(line, member, "pi") == new == read_keys(member, "device")
    assert not has_next_keys(member)
    assert only_invitation(gate).client is None, "it was not needed"


def test_a_device_that_joins_anew_forgets_its_next_pair(gate, member):
    old = read_keys(member, "device")
    next_keys(member)
    remove_client(gate.clients, "pi")
    assert join(gate.invite("pi"), member, "pi") == old
    assert not has_next_keys(member)


def test_half_a_swap_reads_as_the_new_pair(tmp_path):
    old, new = make_keys(tmp_path, "device"), next_keys(tmp_path)
    (tmp_path / "device.next.secret").replace(tmp_path / "device.secret")
    assert read_keys(tmp_path, "device") == new != old
    assert sorted(file.name for file in tmp_path.iterdir()) == ["device.public", "device.secret"]
    assert read_keys(tmp_path, "device") == new


def test_a_next_pair_is_kept_until_it_is_in_force(tmp_path):
    make_keys(tmp_path, "device")
    new = next_keys(tmp_path)
    assert next_keys(tmp_path) == new
    (tmp_path / "device.next.public").write_text("cut sh")
    assert next_keys(tmp_path) == new
    (tmp_path / "device.next.public").unlink()
    assert next_keys(tmp_path) == new
    (tmp_path / "device.next.secret").write_text("cut sh")
    other = next_keys(tmp_path)
    assert other != new
    swap_keys(tmp_path)
    assert read_keys(tmp_path, "device") == other


def test_a_revoked_device_cannot_change_its_key(gate, member):
    remove_client(gate.clients, "pi")
    with pytest.raises(Refused, match="knows neither this device's key nor the next one"):
        turn(gate, member)
    assert list(gate.names()) == ["first"]


def test_a_client_changes_its_own_key_only(gate, member):
    before = gate.clients.read_text()
    with pytest.raises(Refused, match="this key is that of 'pi', join says 'first'"):
        turn(gate, member, "first")
    assert not has_next_keys(member), "the old pair is the one in the list"
    device = gate.device(read_keys(member, "device"))
    invited = gate.invite()
    for taken in (gate.names()["first"], pair_of(invited).public):
        device.send(Join(client_id="pi", public_key=taken.decode()))
        assert "the new key is in use already" in device.expect(Fault).detail
    assert gate.clients.read_text() == before


def test_the_key_in_force_asks_and_is_confirmed(gate, member):
    before = gate.clients.read_text()
    device = gate.device(read_keys(member, "device"))
    device.send(Join(client_id="pi", public_key=gate.names()["pi"].decode()))
    assert device.expect(Joined).client_id == "pi"
    assert gate.clients.read_text() == before


# -- revocation ------------------------------------------------------------------------------------


def test_who_is_admitted_now(gate):
    key = new_key().encode()
    assert not gate.hub.is_admitted("pi")
    add_client(gate.clients, "pi", key)
    assert gate.hub.is_admitted("pi")
    assert remove_client(gate.clients, "pi")
    assert not gate.hub.is_admitted("pi")
    assert not remove_client(gate.clients, "pi")


@pytest.mark.parametrize("text", ["", "pi", "# nobody\n"])
def test_a_list_that_an_editor_empties_before_it_writes_revokes_nobody(gate, caplog, text):
    add_client(gate.clients, "pi", new_key().encode())
    assert gate.hub.is_admitted("pi")
    gate.clients.write_text(text)
    assert gate.hub.is_admitted("pi")
    assert not caplog.records
    settle(gate.clients)
    assert gate.hub.is_admitted("pi") == (text == "pi"), "a malformed one never does"
    assert ("not reloaded" in caplog.text) == (text == "pi")


def test_a_list_of_the_future_is_read(gate):
    """As after a clock that was set back."""
    add_client(gate.clients, "pi", new_key().encode())
    assert gate.hub.is_admitted("pi")
    gate.clients.write_text("")
    later = time.time() + 3600
    os.utime(gate.clients, (later, later))
    assert not gate.hub.is_admitted("pi")


def test_without_encryption_everybody_is_admitted():
    hub = Hub(ANY_PORT, None, None)
    assert hub.is_admitted("anybody")
    hub.close()


def test_a_removed_device_is_refused_on_its_live_link(gate, member):
    device = gate.device(read_keys(member, "device"))
    device.send(Heartbeat())
    device.expect(Heartbeat)
    remove_client(gate.clients, "pi")
    device.send(Heartbeat())
    assert "not admitted any more" in device.expect(Fault).detail
    assert gate.passed == ["pi Heartbeat"]
    device.link.open()
    assert "does not know this device's key" in device.refusal()


def test_a_key_that_takes_anothers_place_within_a_tick_is_seen(tmp_path):
    """The same length and the same time, but another file."""
    path, first, second = tmp_path / "clients", new_key().encode(), new_key().encode()
    add_client(path, "pi", first)
    admission = Admission(path)
    stamp = path.stat()
    replace_client(path, read_list(path), "pi", second)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert admission.name_of(second) == "pi"
    assert admission.name_of(first) is None


def test_removing_leaves_the_rest_as_it_is(tmp_path):
    path = tmp_path / "clients"
    keys = [new_key() for _ in range(3)]
    text = f"# pi is mine\npi {keys[0]}\n\npi-2 {keys[1]}\n  nano   {keys[2]}"
    path.write_text(text)
    path.chmod(0o640)
    assert remove_client(path, "pi")
    assert path.read_text() == text.replace(f"pi {keys[0]}\n", "", 1)
    assert remove_client(path, "nano")
    assert path.read_text() == f"# pi is mine\n\npi-2 {keys[1]}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.write_text("nonsense\n")
    with pytest.raises(ConfigError, match="line 1"):
        remove_client(path, "pi-2")


# -- pending ---------------------------------------------------------------------------------------


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
    (stranger,) = read_strangers(gate.pending)
    assert stranger.public_key == keys.public.decode()
    assert stranger.tries >= 2
    assert before <= stranger.first <= stranger.last <= time.time()
    assert stat.S_IMODE(gate.pending.stat().st_mode) == 0o600


def test_the_end_does_not_wait_for_the_second_to_pass(tmp_path, clock):
    make_keys(tmp_path, "server")
    (tmp_path / "clients").write_text("")
    admission = Admission(tmp_path / "clients")
    admission.strangers = Strangers(tmp_path / "pending", clock, clock)
    hub = Hub(ANY_PORT, read_keys(tmp_path, "server"), admission)
    for _ in range(2):
        admission.strangers.note(new_key().encode())
        hub.receive(0)
    assert len(read_strangers(tmp_path / "pending")) == 1
    hub.close()
    assert len(read_strangers(tmp_path / "pending")) == 2


def test_pending_keys_survive_a_restart(tmp_path, clock):
    keys = [new_key().encode() for _ in range(2)]
    for tries in (1, 2):
        known = Strangers(tmp_path / "pending", clock, clock)
        clock.now += 100
        for key in keys:
            known.note(key)
        known.write_if_due(nobody)
        found = read_strangers(tmp_path / "pending")
        assert [stranger.public_key.encode() for stranger in found] == keys
        assert {(s.first, s.last, s.tries) for s in found} == {(1100.0, clock.now, tries)}


def test_the_newest_are_kept(tmp_path, clock):
    known = Strangers(tmp_path / "pending", clock, clock)
    keys = [new_key().encode() for _ in range(MOST + 5)]
    for key in keys:
        clock.now += 1
        known.note(key)
    known.note(keys[6])  # once more: it is new again
    known.note(new_key().encode())
    known.write_if_due(nobody)
    found = [stranger.public_key.encode() for stranger in read_strangers(tmp_path / "pending")]
    assert len(found) == MOST
    assert found[:-2] == keys[7:]
    assert found[-2] == keys[6]


def test_it_is_written_once_a_second_at_most(tmp_path, clock, monkeypatch):
    writes = []
    monkeypatch.setattr(strangers, "replace_text", lambda *args: writes.append(clock.now))
    known = Strangers(tmp_path / "pending", clock, clock)
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
    known = Strangers(tmp_path / "pending", clock, clock)
    keys = [new_key().encode() for _ in range(3)]
    for key in keys:
        known.note(key)
    known.write_if_due(nobody)
    forget_stranger(tmp_path / "pending", keys[0])
    found = [stranger.public_key.encode() for stranger in read_strangers(tmp_path / "pending")]
    assert found == keys[1:]
    clock.now += 5
    known.note(keys[2])
    known.write_if_due(lambda key: key in keys[:2])  # the coordinator's own memory agrees
    found = [stranger.public_key.encode() for stranger in read_strangers(tmp_path / "pending")]
    assert found == keys[2:]


@pytest.mark.parametrize("content", [b"{", b"\xff", b"", b'[{"public_key": "x"}]', b"[" * 100_000])
def test_a_corrupt_file_is_said_once_and_made_anew(tmp_path, clock, caplog, content):
    path = tmp_path / "pending"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="remove the file, it is made again"):
        read_strangers(path)
    forget_stranger(path, new_key().encode())
    assert path.read_bytes() == content
    caplog.clear()
    known = Strangers(path, clock, clock)
    assert len(caplog.records) == 1
    known.note(new_key().encode())
    known.write_if_due(nobody)
    assert len(read_strangers(path)) == 1


def test_while_another_changes_the_files_it_waits(tmp_path, clock, caplog):
    known = Strangers(tmp_path / "pending", clock, clock)
    known.note(new_key().encode())
    with locked(tmp_path):
        known.write_if_due(nobody)
    assert not (tmp_path / "pending").exists()
    clock.now += strangers.WRITE_S
    known.write_if_due(nobody)
    assert len(read_strangers(tmp_path / "pending")) == 1
    assert not caplog.records


def test_a_full_disk_is_said_once_and_tried_again(tmp_path, clock, caplog, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    known = Strangers(tmp_path / "pending", clock, clock)
    with monkeypatch.context() as patch:
        patch.setattr(strangers, "replace_text", full)
        for _ in range(3):
            known.note(new_key().encode())
            known.write_if_due(nobody)
            clock.now += strangers.RETRY_S
    assert len(caplog.records) == 1
    assert "No space left" in caplog.text
    known.write_if_due(nobody)
    assert len(read_strangers(tmp_path / "pending")) == 3
