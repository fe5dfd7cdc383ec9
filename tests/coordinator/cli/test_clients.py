"""`edge-coordinator keys|clients|invite` as a person meets them."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from coordinator.admission.invitations import read_invitations
from coordinator.admission.pending import PendingKeys
from coordinator.cli import clients
from coordinator.cli.main import main as coordinate
from edge_sdk.protocol.invitation import decode_line
from tests.support.admission import invited, new_key
from tests.support.examples import one_line
from tests.support.other_user import closed


def test_invite_prints_one_line_and_says_the_rest_beside(gate, capsys):
    folder = ["--keys", str(gate.clients.parent)]
    flags = ["--name", "pi-1", "--endpoint", "tcp://fl.example:7777", "--valid", "0.5"]
    assert coordinate(["invite", *folder, *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    line = decode_line(printed.out)
    assert (line.endpoint, line.name, line.server_key) == (
        "tcp://fl.example:7777",
        "pi-1",
        gate.keys.public,
    )
    assert re.fullmatch(
        r"edge-coordinator: for pi-1, until 20\d\d-\d\d-\d\d \d\d:\d\d UTC; on the device: "
        r"edge-sdk join LINE\n",
        printed.err,
    )
    (kept,) = read_invitations(gate.invitations)
    assert kept.name == "pi-1"
    assert time.time() + 1700 < kept.expires < time.time() + 1801
    assert line.secret.decode() not in gate.invitations.read_text() + printed.err


def test_invite_takes_this_hosts_address_and_a_day(gate, capsys, monkeypatch):
    monkeypatch.setattr(clients, "own_address", lambda: "192.0.2.7")
    assert coordinate(["invite", "--keys", str(gate.clients.parent)]) == 0
    printed = capsys.readouterr()
    assert decode_line(printed.out).endpoint == "tcp://192.0.2.7:5555"
    assert "assumed that devices reach this coordinator at tcp://192.0.2.7:5555" in printed.err
    (kept,) = read_invitations(gate.invitations)
    assert kept.name is None
    assert abs(kept.expires - time.time() - 86_400) < 60


def test_invite_before_anybody_is_in_the_list_makes_one(tmp_path, capsys):
    folder = ["--keys", str(tmp_path / "keys")]
    assert coordinate(["keys", *folder]) == 0
    assert coordinate(["invite", *folder, "--endpoint", "tcp://h:1"]) == 0
    capsys.readouterr()
    assert coordinate(["clients", "list", *folder]) == 0
    assert (tmp_path / "keys" / "clients").read_text() == ""
    printed = capsys.readouterr()
    assert printed.out == "", "for a program it is an empty list"
    said = f"no clients in {tmp_path}/keys/clients yet; admit one with `edge-coordinator invite`\n"
    assert one_line(printed.err, "edge-coordinator").endswith(said)


def test_invite_says_when_the_name_is_taken(gate, capsys):
    folder = ["--keys", str(gate.clients.parent)]
    assert coordinate(["clients", "add", "pi-1", new_key(), *folder]) == 0
    assert coordinate(["invite", *folder, "--name", "pi-1", "--endpoint", gate.endpoint]) == 0
    assert "pi-1 is in the list: only its present key can use this" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--name", "../etc"], "--name '../etc' is not 1 to 64 letters"),
        (["--endpoint", "h:1"], "--endpoint 'h:1' is not tcp://HOST:PORT"),
        (
            ["--endpoint", "tcp://*:5555"],
            "'tcp://*:5555' is no address that a device can connect to",
        ),
        (["--endpoint", "tcp://0.0.0.0:5555"], "is no address that a device can connect to"),
        (["--endpoint", "tcp://[::]:5555"], "is no address that a device can connect to"),
        (["--endpoint", "tcp://::1:5555"], "an IPv6 address stands in brackets: tcp://[::1]:5555"),
        (["--endpoint", "tcp://h:0"], "port outside 1 to 65535"),
        (["--endpoint", "tcp://hé:1"], "is not ASCII"),
        (["--keys", "nowhere"], "nowhere/server.public cannot be read"),
    ],
    ids=str,
)
def test_an_invitation_that_cannot_be_made(gate, capsys, flags, said):
    before = gate.clients.read_text()
    status = coordinate(
        ["invite", "--keys", str(gate.clients.parent), "--endpoint", "tcp://h:1", *flags]
    )
    printed = capsys.readouterr()
    assert (status, printed.out) == (1 if flags[0] == "--keys" else 2, "")
    assert said in one_line(printed.err, "edge-coordinator")
    assert gate.clients.read_text() == before
    assert not gate.invitations.exists()


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "1e9", "1e-9", "0.016", "a day", ""])
def test_hours_that_no_invitation_has(gate, capsys, hours):
    with pytest.raises(SystemExit) as stop:
        coordinate(["invite", "--keys", str(gate.clients.parent), f"--valid={hours}"])
    assert stop.value.code == 2
    assert (
        f"{hours!r}, expected hours up to 8784, a minute (0.017) or more" in capsys.readouterr().err
    )


def test_clients_are_added_listed_and_removed(gate, capsys):
    folder = ["--keys", str(gate.clients.parent)]
    keys = {name: new_key() for name in ("nano", "pi-1")}
    for name, key in keys.items():
        assert coordinate(["clients", "add", name, key, *folder]) == 0
    assert coordinate(["clients", "list", *folder]) == 0
    assert capsys.readouterr().out == "".join(f"{name} {key}\n" for name, key in keys.items())
    assert gate.router.is_admitted("nano")
    assert coordinate(["clients", "remove", "nano", *folder]) == 0
    assert capsys.readouterr().out == (
        "removed nano; a running coordinator takes nothing from it any more\n"
    )
    assert not gate.router.is_admitted("nano")
    assert coordinate(["clients", "remove", "nano", *folder]) == 1
    assert "no client 'nano' in" in (said := capsys.readouterr().err)
    assert said.endswith("known: pi-1\n")


def test_adding_says_what_of_a_client_is_there_already(gate, capsys):
    folder = ["--keys", str(gate.clients.parent)]
    key, other = new_key(), new_key()
    assert coordinate(["clients", "add", "pi-1", key, *folder]) == 0
    before = gate.clients.read_text()
    for name, its_key, said in (
        ("pi-1", other, "pi-1 is there already, with another key"),
        ("pi-2", key, "the key of pi-2 is there already, under the name pi-1"),
        ("pi-1", key, "pi-1 is there already, with this key"),
    ):
        assert coordinate(["clients", "add", name, its_key, *folder]) == 1
        assert one_line(capsys.readouterr().err, "edge-coordinator").endswith(
            f"client list {gate.clients}: {said}; to replace it, "
            "`edge-coordinator clients remove pi-1`\n"
        )
    assert gate.clients.read_text() == before


def test_removing_withdraws_the_invitations_too(gate, capsys, tmp_path):
    folder = ["--keys", str(gate.clients.parent)]
    for flags in (["--name", "pi-1"], ["--name", "pi-1"], ["--name", "pi-2"], []):
        invited(gate, capsys, *flags)
    assert coordinate(["clients", "remove", "pi-1", *folder]) == 0
    assert capsys.readouterr().out == "withdrew 2 invitations of pi-1\n"
    assert [i.name for i in read_invitations(gate.invitations)] == ["pi-2", None]


def test_a_client_is_removed_though_the_invitations_are_damaged(gate, capsys):
    folder = ["--keys", str(gate.clients.parent)]
    assert coordinate(["clients", "add", "nano", new_key(), *folder]) == 0
    gate.invitations.write_text("[{")
    capsys.readouterr()
    assert coordinate(["clients", "remove", "nano", *folder]) == 1
    printed = capsys.readouterr()
    assert printed.out == "removed nano; a running coordinator takes nothing from it any more\n"
    said = one_line(printed.err, "edge-coordinator")
    assert f"nano's invitations are not withdrawn: invitations in {gate.invitations} cannot" in said
    assert "remove the file and invite again" in said
    assert not gate.router.is_admitted("nano")
    assert gate.invitations.read_text() == "[{"


def test_pending_keys_are_shown_until_they_are_added(gate, capsys):
    folder = ["--keys", str(gate.clients.parent)]
    assert coordinate(["clients", "pending", *folder]) == 0
    printed = capsys.readouterr()
    assert printed.out == ""
    said = "no keys are pending; a device's shows here once `serve` has turned it away\n"
    assert one_line(printed.err, "edge-coordinator").endswith(said)
    keys = [new_key(), new_key()]
    known = PendingKeys(gate.pending, clock=lambda: 1_800_000_000.0)
    for key in (*keys, keys[1]):
        known.note(key.encode())
    known.write_if_due(lambda key: False)
    when = "2027-01-15 08:00 UTC"
    shown = [
        f"{keys[0]}  first {when}, last {when}, tries 1\n",
        f"{keys[1]}  first {when}, last {when}, tries 2\n",
    ]
    assert coordinate(["clients", "pending", *folder]) == 0
    assert capsys.readouterr().out == "".join(shown)
    assert coordinate(["clients", "add", "pi-1", keys[0], *folder]) == 0
    assert keys[0] not in gate.pending.read_text()
    assert coordinate(["clients", "pending", *folder]) == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == (shown[1], "")
    gate.pending.write_text("nonsense")
    assert coordinate(["clients", "pending", *folder]) == 1
    assert "remove the file" in one_line(capsys.readouterr().err, "edge-coordinator")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "there is no such file; make it with `edge-coordinator clients add` or `invite`\n"),
        ("folder", "Is a directory; expected a text file that this user may read\n"),
        (b"# \xe9", "this is not UTF-8 text; expected lines of `NAME PUBLIC_KEY`\n"),
    ],
    ids=str,
)
def test_a_list_that_cannot_be_read_is_one_line_with_the_next_step(gate, capsys, content, said):
    gate.clients.unlink()
    if content == "folder":
        gate.clients.mkdir()
    elif content:
        gate.clients.write_bytes(content)
    assert coordinate(["clients", "list", "--keys", str(gate.clients.parent)]) == 1
    printed = one_line(capsys.readouterr().err, "edge-coordinator")
    assert printed.endswith(f"client list {gate.clients} cannot be read: {said}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["add"], "clients add needs NAME and PUBLIC_KEY"),
        (["add", "pi-1"], "clients add needs NAME and PUBLIC_KEY"),
        (["remove"], "clients remove needs NAME"),
        (["remove", "pi-1", "key"], "clients remove needs NAME"),
        (["list", "pi-1"], "clients list needs nothing more"),
        (["pending", "pi-1"], "clients pending needs nothing more"),
        (["add", "pi-1", "short"], "PUBLIC_KEY holds no key: expected 40 characters"),
        (["add", "a b", "0" * 40], "client name 'a b' is not"),
        (["remove", "pi-1"], "no client 'pi-1' in"),
        (["remove", "pi-1", "--keys", "nowhere"], "there is no folder nowhere"),
        (
            ["pending", "--keys", "nowhere"],
            "there is no folder nowhere; give --keys or --clients-file",
        ),
        (["pending", "--keys", "/dev/null"], "there is no folder /dev/null; give --keys"),
        (["list", "--keys", "nowhere"], "client list nowhere/clients cannot be read"),
    ],
    ids=str,
)
def test_wrong_words_are_one_clear_line(gate, capsys, words, said):
    before = gate.clients.read_text()
    status = 1 if "--keys" in words or "no client" in said else 2
    assert coordinate(["clients", "--keys", str(gate.clients.parent), *words]) == status
    assert said in one_line(capsys.readouterr().err, "edge-coordinator")
    assert gate.clients.read_text() == before
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("words", [["pending"], ["remove", "pi-1"], ["list"]], ids=str)
def test_a_folder_of_keys_that_cannot_be_read_is_one_line(tmp_path, capsys, words):
    folder = tmp_path / "keys"
    folder.mkdir()
    with closed(folder):
        assert coordinate(["clients", *words, "--keys", str(folder)]) == 1
    printed = capsys.readouterr()
    assert "cannot be read: Permission denied" in one_line(printed.err, "edge-coordinator")
    assert printed.out == ""


def test_pending_keys_of_another_user_are_not_said_to_be_broken(gate, capsys):
    gate.pending.write_text("[]\n")
    with closed(gate.pending):
        assert coordinate(["clients", "pending", "--keys", str(gate.clients.parent)]) == 1
    said = one_line(capsys.readouterr().err, "edge-coordinator")
    assert said.endswith("Permission denied; run this as the user who runs the coordinator\n")
