"""A device changes its key: with `rotate`, cut short anywhere. Real sockets and CURVE."""

from __future__ import annotations

import stat
import threading
from pathlib import Path

import pytest

from coordinator.admission.client_list import remove_client
from edge_sdk.errors import ConfigError
from edge_sdk.protocol import join as join_module
from edge_sdk.protocol import keys as keys_module
from edge_sdk.protocol.join import Refused, join, rotate
from edge_sdk.protocol.keys import (
    KeyPair,
    has_next_keys,
    make_keys,
    next_keys,
    own_keys,
    read_keys,
    swap_keys,
)
from edge_sdk.protocol.messages import Fault, Heartbeat, Join, Joined
from tests.support.admission import Gate, only_invitation, pair_of
from tests.support.examples import settle


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
    wrap(keys_module, "sync")
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


def test_an_earlier_question_that_was_heard_late_costs_no_key(gate, member, monkeypatch):
    """An earlier one waited while the coordinator aggregated, and is handled just before."""
    old, new, real = read_keys(member, "device"), next_keys(member), join_module._answer

    def answer(link, question):
        monkeypatch.setattr(join_module, "_answer", real)
        device = gate.device(old)
        device.send(Join(client_id="pi", public_key=new.public.decode()))
        device.expect(Joined)
        raise Refused("the coordinator refused: this device is not admitted any more")

    monkeypatch.setattr(join_module, "_answer", answer)
    assert turn(gate, member) == new == read_keys(member, "device")
    assert gate.names()["pi"] == new.public


def test_who_hangs_up_costs_no_key(gate, member):
    """As a proxy does while the coordinator is not there."""
    new = next_keys(member)
    with pytest.raises(Refused, match="the handshake failed"):
        rotate(gate.endpoint, make_keys(member.parent / "other", "server").public, member, "pi")
    assert next_keys(member) == new
    assert turn(gate, member) == new


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


@pytest.mark.parametrize("text", ["", "cut sh"])
def test_a_first_secret_that_was_not_written_whole_makes_room(tmp_path, text):
    (tmp_path / "device.secret").write_text(text)
    made = own_keys(tmp_path)
    assert own_keys(tmp_path) == made == read_keys(tmp_path, "device")


def test_a_secret_that_was_in_use_is_never_made_anew(tmp_path):
    make_keys(tmp_path, "device")
    (tmp_path / "device.secret").write_text("cut sh")
    with pytest.raises(ConfigError, match="device.secret holds no key"):
        own_keys(tmp_path)
    assert (tmp_path / "device.secret").read_text() == "cut sh"


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
    assert has_next_keys(member), "for the next try"
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
