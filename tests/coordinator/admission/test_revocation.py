"""Who is admitted now: the list's changes, by commands and by hand. Real sockets and CURVE."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from coordinator.admission import client_list as admission_module
from coordinator.admission import join as joining
from coordinator.admission.client_list import (
    Admission,
    add_client,
    read_list,
    remove_client,
    replace_client,
)
from coordinator.links.router import Router
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.keys import make_keys, read_keys
from edge_sdk.protocol.messages import Fault, Heartbeat, Join, Joined
from tests.support.admission import new_key, pair_of
from tests.support.devices import ANY_PORT
from tests.support.examples import settle


def test_who_is_admitted_now(gate):
    key = new_key().encode()
    assert not gate.router.is_admitted("pi")
    add_client(gate.clients, "pi", key)
    assert gate.router.is_admitted("pi")
    assert remove_client(gate.clients, "pi")
    assert not gate.router.is_admitted("pi")
    assert not remove_client(gate.clients, "pi")


@pytest.mark.parametrize("text", ["", " \n\n", "pi", "# nobody\n"])
def test_a_list_that_an_editor_empties_before_it_writes_revokes_nobody(gate, caplog, text):
    add_client(gate.clients, "pi", new_key().encode())
    assert gate.router.is_admitted("pi")
    gate.clients.write_text(text)
    assert gate.router.is_admitted("pi")
    assert not caplog.records
    settle(gate.clients)
    stays = not text.startswith("#")  # empty is as malformed: a full disk leaves that
    assert gate.router.is_admitted("pi") == stays
    assert ("not reloaded" in caplog.text) == stays


def test_a_list_that_an_editor_writes_anew_beside_the_old_revokes_nobody_until_it_is_whole(gate):
    """vim moves the old one away and writes another under its name; sed writes one and moves it."""
    keys = [new_key() for _ in range(2)]
    whole = "".join(f"{name} {key}\n" for name, key in zip(("pi", "nano"), keys, strict=True))
    gate.clients.write_text(whole)
    settle(gate.clients)
    assert gate.router.is_admitted("nano")
    gate.clients.replace(gate.clients.with_name("clients~"))
    gate.clients.write_text(whole.splitlines(True)[0])  # so far
    assert gate.router.is_admitted("nano")
    gate.clients.write_text(whole)
    settle(gate.clients)
    assert gate.router.is_admitted("nano")
    other = gate.clients.with_name("sedAb1")
    other.write_text(whole.splitlines(True)[0])
    other.replace(gate.clients)
    assert gate.router.is_admitted("nano"), "it looks as the other does"
    settle(gate.clients)
    assert not gate.router.is_admitted("nano")
    assert gate.router.is_admitted("pi")


def test_what_the_coordinator_writes_itself_is_in_force_at_once(gate, tmp_path):
    """And the next device is not told to ask again, as while somebody else writes."""
    admission = Admission(gate.clients)
    for name in ("pi", "nano"):
        line, keys = gate.invite(), make_keys(tmp_path / name, "device")
        join = Join(client_id=name, public_key=keys.public.decode())
        assert isinstance(joining.answer(admission, pair_of(line).public, join), Joined)
        assert admission.name_of(keys.public) == name
        rotated = new_key()
        turn = Join(client_id=name, public_key=rotated)
        assert isinstance(joining.answer(admission, keys.public, turn), Joined)
        assert admission.name_of(rotated.encode()) == name
        assert admission.name_of(keys.public) is None


def test_nobody_joins_a_list_that_an_editor_has_emptied(gate, tmp_path):
    """It would be written with that one alone. The device asks again."""
    add_client(gate.clients, "pi", new_key().encode())
    admission, line, keys = Admission(gate.clients), gate.invite(), make_keys(tmp_path, "nano")
    join = Join(client_id="nano", public_key=keys.public.decode())
    before = gate.clients.read_text()
    gate.clients.write_text("")
    assert joining.answer(admission, pair_of(line).public, join) is None
    gate.clients.write_text(before)
    settle(gate.clients)
    assert isinstance(joining.answer(admission, pair_of(line).public, join), Joined)
    assert gate.names().keys() == {"pi", "nano"}


@pytest.mark.parametrize("damage", [lambda path: path.write_text("\n"), Path.unlink])
def test_nobody_joins_a_list_that_is_empty_or_gone(gate, tmp_path, damage):
    add_client(gate.clients, "pi", new_key().encode())
    admission, line, keys = Admission(gate.clients), gate.invite(), make_keys(tmp_path, "nano")
    join, before = Join(client_id="nano", public_key=keys.public.decode()), gate.clients.read_text()
    damage(gate.clients)
    if gate.clients.exists():
        settle(gate.clients)
    refused = joining.answer(admission, pair_of(line).public, join)
    assert isinstance(refused, Fault)
    assert "could not write its list" in refused.detail
    assert admission.names().keys() == {"pi"}
    gate.clients.write_text(before)
    settle(gate.clients)
    assert isinstance(joining.answer(admission, pair_of(line).public, join), Joined)


def test_a_command_waits_for_who_is_writing_the_list(tmp_path, monkeypatch):
    path, first = tmp_path / "clients", new_key().encode()
    add_client(path, "pi", first)
    before = path.read_text()
    path.write_text("")

    def finish(seconds: float) -> None:
        if not path.read_text():
            path.write_text(before)
            settle(path)

    monkeypatch.setattr(admission_module.time, "sleep", finish)
    add_client(path, "nano", new_key().encode())
    assert Admission(path).names().keys() == {"pi", "nano"}


def test_a_list_that_is_emptied_while_it_is_read_revokes_nobody(tmp_path, monkeypatch, caplog):
    path, keys = tmp_path / "clients", [new_key().encode() for _ in range(2)]
    add_client(path, "pi", keys[0])
    admission, real = Admission(path), admission_module._read
    add_client(path, "nano", keys[1])  # so it is read again

    def emptied(path: Path) -> str:
        path.write_text("")
        return real(path)

    monkeypatch.setattr(admission_module, "_read", emptied)
    assert admission.name_of(keys[0]) == "pi"
    assert not caplog.records


def test_a_command_does_not_write_to_a_list_that_somebody_goes_on_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(admission_module, "MOST_PATIENCE_S", 0.0)
    path = tmp_path / "clients"
    add_client(path, "pi", new_key().encode())
    path.write_text("")
    with pytest.raises(ConfigError, match="is being written by hand; try again"):
        add_client(path, "nano", new_key().encode())
    assert path.read_text() == ""


def test_a_list_that_others_share_by_a_link_is_changed_for_all(tmp_path):
    shared, link = tmp_path / "shared", tmp_path / "keys" / "clients"
    link.parent.mkdir()
    link.symlink_to(shared)
    keys = [new_key().encode() for _ in range(2)]
    add_client(link, "pi", keys[0])
    add_client(link, "nano", keys[1])
    admission = Admission(shared)
    assert remove_client(link, "pi")
    assert link.is_symlink()
    assert [admission.name_of(key) for key in keys] == [None, "nano"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keys", "shared"]


def test_a_change_is_on_the_disk_with_its_name(tmp_path, monkeypatch):
    """Over a power cut nobody is admitted again."""
    synced: list[bool] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda file: (synced.append(stat.S_ISDIR(os.fstat(file).st_mode)), real(file))
    )
    add_client(tmp_path / "clients", "pi", new_key().encode())
    assert synced == [False, True]


def test_others_may_not_write_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        make_keys(tmp_path / "keys", "server")
        add_client(tmp_path / "lists" / "clients", "pi", new_key().encode())
    finally:
        os.umask(before)
    made = [*tmp_path.iterdir(), *tmp_path.glob("*/*")]
    assert len(made) == 5
    assert not [path for path in made if path.stat().st_mode & 0o022]


def test_a_list_of_the_future_is_read(gate):
    """As after a clock that was set back."""
    add_client(gate.clients, "pi", new_key().encode())
    assert gate.router.is_admitted("pi")
    gate.clients.write_text("# nobody\n")
    later = time.time() + 3600
    os.utime(gate.clients, (later, later))
    assert not gate.router.is_admitted("pi")


def test_the_last_client_is_revoked_by_a_command(tmp_path):
    path, key = tmp_path / "clients", new_key().encode()
    path.write_text("\n")
    settle(path)
    add_client(path, "pi", key)
    admission = Admission(path)
    assert remove_client(path, "pi")
    assert path.read_text() == "# nobody is admitted\n"
    assert admission.name_of(key) is None


def test_without_encryption_everybody_is_admitted():
    router = Router(ANY_PORT, None, None)
    assert router.is_admitted("anybody")
    router.close()


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
