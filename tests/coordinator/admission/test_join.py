"""How invited devices come into the list: who gets in, and who does not. Real sockets and CURVE."""

from __future__ import annotations

import json
import logging
import stat
from concurrent.futures import ThreadPoolExecutor

import msgpack
import pytest
import zmq

from coordinator.admission.client_list import add_client, remove_client
from coordinator.admission.invitations import Invitation, withdraw
from coordinator.links.router import Router
from edge_sdk.protocol.invitation import InvitationLine
from edge_sdk.protocol.join import Refused, join
from edge_sdk.protocol.keys import KeyPair, make_keys, read_keys
from edge_sdk.protocol.messages import Bye, Fault, Heartbeat, Join, Joined, Part, Ready
from tests.support.admission import LINE, new_key, only_invitation, pair_of
from tests.support.devices import ANY_PORT, WAIT_S, ScriptedDevice
from tests.support.examples import settle


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
    assert gate.passed == ["pi-1 Heartbeat"], "join itself does not pass the router"


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
        with pytest.raises(Refused, match="refused this invitation: it was used already"):
            join(line, tmp_path / "b", name)
    with pytest.raises(Refused, match="this key is that of 'a', join says 'other'"):
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
    with pytest.raises(Refused, match="refused this invitation: it was used already, expired or"):
        join(line, tmp_path / "pi", "pi-1")
    assert gate.names() == {}


def test_a_used_invitation_expires_too(gate, tmp_path):
    line = gate.invite("pi-1")
    join(line, tmp_path / "pi", "pi-1")
    expired = Invitation(**(json.loads(gate.invitations.read_text())[0] | {"expires": 1.0}))
    gate.invitations.write_text(f"[{json.dumps(vars_of(expired))}]")
    with pytest.raises(Refused, match="refused this invitation"):
        join(line, tmp_path / "other", "pi-2")


def vars_of(invitation: Invitation) -> dict:
    return {name: getattr(invitation, name) for name in invitation.__struct_fields__}


def test_a_withdrawn_invitation(gate, tmp_path):
    line = gate.invite("pi-1")
    assert len(withdraw(gate.invitations, "pi-1")) == 1
    with pytest.raises(Refused, match="expired or withdrawn, or is another coordinator's; ask for"):
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
        pytest.param(
            "pi-1",
            Join(client_id="pi-2", public_key=new_key()),
            add,
            "this invitation is for 'pi-1', not for 'pi-2'",
            id="another name",
        ),
        pytest.param(
            None,
            Join(client_id="taken", public_key=new_key()),
            add,
            "the name 'taken' is taken by another key",
            id="taken name",
        ),
        pytest.param(
            "taken",
            Join(client_id="taken", public_key=new_key()),
            add,
            "the name 'taken' is taken by another key",
            id="invited, but taken",
        ),
        pytest.param(
            None,
            Join(client_id="new", public_key=listed),
            add,
            "this device's key is in the list already, as 'other'",
            id="listed key",
        ),
        pytest.param(
            None,
            Join(client_id="new", public_key="#" * 40),
            add,
            "join holds no key: 40 characters, but not Z85",
            id="not a key",
        ),
    ]


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("client_id", ""),
        ("client_id", "-pi"),
        ("client_id", "a b"),
        ("client_id", "a" * 65),
        ("client_id", "pi\n"),
        ("client_id", None),
        ("public_key", "a" * 39),
        ("public_key", "a" * 41),
        ("public_key", "a" * 40 + "\n"),
        ("public_key", '"' * 40),
        ("public_key", b"a" * 40),
    ],
)
def test_a_malformed_join_is_refused_by_its_field(gate, field, value):
    device = gate.device(pair_of(gate.invite()))
    good = {"type": "join", "client_id": "pi", "public_key": new_key()}
    device.send_frames(msgpack.packb(good | {field: value}))
    assert device.expect(Fault).code == "protocol"
    assert gate.names() == {}


def test_strangers_do_not_get_so_far(gate):
    pending_key = gate.device(KeyPair(*zmq.curve_keypair()))
    assert "does not know this device's key" in pending_key.refusal()


def test_a_coordinator_without_encryption_has_no_list_to_join():
    router = Router(ANY_PORT, None, None)
    device = ScriptedDevice(router.endpoint, "pi")
    device.send(Join(client_id="pi", public_key=new_key()))
    assert router.receive(int(1000 * WAIT_S)) == (True, None)
    assert "--insecure and has no list" in device.expect(Fault).detail
    device.close()
    router.close()


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
