"""`edge-coordinator keys|clients|invite` and `edge-sdk join|keys` as a person meets them."""

from __future__ import annotations

import io
import logging
import re
import stat
import sys
import time
from pathlib import Path

import pytest

from coordinator import cli_clients
from coordinator.cli import main as coordinate
from coordinator.invitations import read_invitations
from coordinator.strangers import Strangers
from edge_sdk import cli_join, config_file
from edge_sdk.cli import main as on_device
from edge_sdk.config_file import parse_config, read_config, with_values
from edge_sdk.errors import ConfigError
from edge_sdk.invitation import decode_line
from edge_sdk.keys import make_keys, read_keys
from tests.helpers import settle
from tests.processes import World, run_cli
from tests.test_admission import Gate, new_key


@pytest.fixture
def gate(tmp_path):
    gate = Gate(tmp_path / "keys")
    yield gate
    gate.close()


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Of a user, where no service is installed."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    for module in (config_file, cli_join):
        monkeypatch.setattr(module, "DEFAULT_CONFIG", tmp_path / "etc" / "config.toml")
    return tmp_path / "home" / ".config" / "edge-sdk"


def invited(gate: Gate, capsys, *flags: str) -> str:
    """The line that `invite` prints."""
    folder = str(gate.clients.parent)
    assert coordinate(["invite", "--keys", folder, "--endpoint", gate.endpoint, *flags]) == 0
    return capsys.readouterr().out


def one_line(text: str, program: str) -> str:
    assert text.startswith(f"{program}: "), text
    assert text.count("\n") == 1, text
    return text


# -- on the coordinator ----------------------------------------------------------------------------


def test_invite_prints_one_line_and_says_the_rest_beside(gate, capsys):
    folder = ["--keys", str(gate.clients.parent)]
    flags = ["--name", "pi-1", "--endpoint", "tcp://fl.example:7777", "--valid", "0.5"]
    assert coordinate(["invite", *folder, *flags]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1
    line = decode_line(printed.out)
    assert (line.endpoint, line.name, line.server_key) == (
        "tcp://fl.example:7777", "pi-1", gate.keys.public,
    )  # fmt: skip
    assert re.fullmatch(
        r"edge-coordinator: for pi-1, until 20\d\d-\d\d-\d\d \d\d:\d\d UTC; on the device: "
        r"edge-sdk join LINE\n", printed.err,
    )  # fmt: skip
    (kept,) = read_invitations(gate.invitations)
    assert kept.name == "pi-1"
    assert time.time() + 1700 < kept.expires < time.time() + 1801
    assert line.secret.decode() not in gate.invitations.read_text() + printed.err


def test_invite_takes_this_hosts_address_and_a_day(gate, capsys, monkeypatch):
    monkeypatch.setattr(cli_clients, "own_address", lambda: "192.0.2.7")
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
    assert coordinate(["clients", "list", *folder]) == 0
    assert (tmp_path / "keys" / "clients").read_text() == ""


def test_invite_says_when_the_name_is_taken(gate, capsys):
    folder = ["--keys", str(gate.clients.parent)]
    assert coordinate(["clients", "add", "pi-1", new_key(), *folder]) == 0
    assert coordinate(["invite", *folder, "--name", "pi-1", "--endpoint", gate.endpoint]) == 0
    assert "pi-1 is in the list: only its present key can use this" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "said"), [
    (["--name", "../etc"], "--name '../etc' is not 1 to 64 letters"),
    (["--name", ""], "--name '' is not 1 to 64 letters"),
    (["--endpoint", "h:1"], "--endpoint 'h:1' is not tcp://HOST:PORT"),
    (["--endpoint", "tcp://*:5555"], "'tcp://*:5555' is no address that a device can connect to"),
    (["--endpoint", "tcp://0.0.0.0:5555"], "is no address that a device can connect to"),
    (["--endpoint", "tcp://h:0"], "port outside 1 to 65535"),
    (["--endpoint", "tcp://hé:1"], "is not ASCII"),
    (["--keys", "nowhere"], "nowhere/server.public cannot be read"),
], ids=str)  # fmt: skip
def test_an_invitation_that_cannot_be_made(gate, capsys, flags, said):
    before = gate.clients.read_text()
    status = coordinate(["invite", "--keys", str(gate.clients.parent), "--endpoint", "tcp://h:1",
                         *flags])  # fmt: skip
    printed = capsys.readouterr()
    assert (status, printed.out) == (1, "")
    assert said in one_line(printed.err, "edge-coordinator")
    assert gate.clients.read_text() == before
    assert not gate.invitations.exists()


@pytest.mark.parametrize("hours", ["0", "-1", "nan", "inf", "1e9", "a day", ""])
def test_hours_that_no_invitation_has(gate, capsys, hours):
    with pytest.raises(SystemExit) as stop:
        coordinate(["invite", "--keys", str(gate.clients.parent), f"--valid={hours}"])
    assert stop.value.code == 2
    assert f"{hours!r}, expected hours up to 8784" in capsys.readouterr().err


def test_clients_are_added_listed_and_removed(gate, capsys):
    folder = ["--keys", str(gate.clients.parent)]
    keys = {name: new_key() for name in ("nano", "pi-1")}
    for name, key in keys.items():
        assert coordinate(["clients", "add", name, key, *folder]) == 0
    assert coordinate(["clients", "list", *folder]) == 0
    assert capsys.readouterr().out == "".join(f"{name} {key}\n" for name, key in keys.items())
    assert gate.hub.is_admitted("nano")
    assert coordinate(["clients", "remove", "nano", *folder]) == 0
    assert capsys.readouterr().out == (
        "removed nano; a running coordinator takes nothing from it any more\n"
    )
    assert not gate.hub.is_admitted("nano")
    assert coordinate(["clients", "remove", "nano", *folder]) == 1
    assert "no client 'nano' in" in (said := capsys.readouterr().err)
    assert said.endswith("known: pi-1\n")


def test_removing_withdraws_the_invitations_too(gate, capsys, tmp_path):
    folder = ["--keys", str(gate.clients.parent)]
    for flags in (["--name", "pi-1"], ["--name", "pi-1"], ["--name", "pi-2"], []):
        invited(gate, capsys, *flags)
    assert coordinate(["clients", "remove", "pi-1", *folder]) == 0
    assert capsys.readouterr().out == "withdrew 2 invitations of pi-1\n"
    assert [i.name for i in read_invitations(gate.invitations)] == ["pi-2", None]


def test_pending_keys_are_shown_until_they_are_added(gate, capsys):
    folder = ["--keys", str(gate.clients.parent)]
    assert coordinate(["clients", "pending", *folder]) == 0
    assert capsys.readouterr().out == ""
    keys = [new_key(), new_key()]
    known = Strangers(gate.pending, clock=lambda: 1_800_000_000.0)
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
    assert capsys.readouterr().out == shown[1]
    gate.pending.write_text("nonsense")
    assert coordinate(["clients", "pending", *folder]) == 1
    assert "remove the file" in one_line(capsys.readouterr().err, "edge-coordinator")


@pytest.mark.parametrize(("words", "said"), [
    (["add"], "clients add needs NAME and PUBLIC_KEY"),
    (["add", "pi-1"], "clients add needs NAME and PUBLIC_KEY"),
    (["remove"], "clients remove needs NAME"),
    (["remove", "pi-1", "key"], "clients remove needs NAME"),
    (["list", "pi-1"], "clients list needs nothing more"),
    (["pending", "pi-1"], "clients pending needs nothing more"),
    (["add", "pi-1", "short"], "PUBLIC_KEY holds no key: expected 40 characters"),
    (["add", "a b", new_key()], "client name 'a b' is not"),
    (["remove", "pi-1"], "no client 'pi-1' in"),
    (["remove", "pi-1", "--keys", "nowhere"], "there is no folder nowhere"),
    (["list", "--keys", "nowhere"], "client list nowhere/clients cannot be read"),
], ids=str)  # fmt: skip
def test_wrong_words_are_one_clear_line(gate, capsys, words, said):
    before = gate.clients.read_text()
    assert coordinate(["clients", "--keys", str(gate.clients.parent), *words]) == 1
    assert said in one_line(capsys.readouterr().err, "edge-coordinator")
    assert gate.clients.read_text() == before
    assert not Path("nowhere").exists()


# -- on the device ---------------------------------------------------------------------------------


def test_join_does_the_rest(gate, home, capsys, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    line = invited(gate, capsys, "--name", "pi-1")
    monkeypatch.setattr(sys, "stdin", io.StringIO(line))
    assert on_device(["join", "-"]) == 0
    said = capsys.readouterr()
    config = home / "config.toml"
    assert said.out.splitlines() == [
        f"pi-1 is admitted by {gate.endpoint}; keys are in {home}",
        f"wrote {config}",
        f"next: edge-sdk run --config {config} --data YOUR_DATA",
    ]
    keys = read_keys(home, "device")
    assert gate.names() == {"pi-1": keys.public}
    assert (home / "server.public").read_text() == f"{gate.keys.public.decode()}\n"
    assert stat.S_IMODE((home / "device.secret").stat().st_mode) == 0o600
    settings = read_config(config)
    assert (settings.coordinator, settings.id, settings.keys) == (gate.endpoint, "pi-1", str(home))
    texts = said.out + said.err + caplog.text + config.read_text()
    for secret in (decode_line(line).secret, keys.secret):
        assert secret.decode() not in texts
    assert line[60:100] not in texts


def test_join_again_changes_nothing(gate, home, capsys):
    line = invited(gate, capsys).strip()
    for _ in range(2):
        assert on_device(["join", line[:40], line[40:], "--id", "kitchen"]) == 0
        files = {file.name: file.read_bytes() for file in home.iterdir()}
    assert on_device(["join", line]) == 0, "the id is in the config now"
    assert {file.name: file.read_bytes() for file in home.iterdir()} == files
    assert list(gate.names()) == ["kitchen"]


CONFIG = """# mine
 coordinator='tcp://old:1'   # where it was
data = "/srv/data.npz"
#keys = "/elsewhere"
server_key = "/etc/other.public"
insecure = true
import = [
  "my_models",
]"""


def test_join_keeps_the_rest_of_a_config(gate, home, capsys, tmp_path):
    config = tmp_path / "device.toml"
    config.write_text(CONFIG)
    config.chmod(0o600)
    line = invited(gate, capsys, "--name", "pi-1")
    folder = tmp_path / "own keys"
    flags = ["--config", str(config), "--keys", str(folder)]
    assert on_device(["join", line, *flags]) == 0
    assert (
        config.read_text()
        == f"""# mine
coordinator = "{gate.endpoint}"
data = "/srv/data.npz"
keys = "{folder}"
server_key = "{folder}/server.public"
insecure = false
import = [
  "my_models",
]
id = "pi-1"
"""
    )
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert capsys.readouterr().out.endswith(f"next: edge-sdk run --config {config}\n")
    assert read_keys(folder, "device").public == gate.names()["pi-1"]


def test_join_writes_the_services_config_where_there_is_one(gate, home, capsys, tmp_path):
    service = tmp_path / "etc" / "config.toml"
    service.parent.mkdir()
    service.write_text(f'keys = "{tmp_path}/state"\n')
    assert on_device(["join", invited(gate, capsys, "--name", "pi-1")]) == 0
    assert read_config(service).coordinator == gate.endpoint
    assert read_keys(tmp_path / "state", "device")
    assert not home.exists()
    said = capsys.readouterr().out
    assert f"next: set data in {service}, then sudo edge-sdk service install --start" in said


@pytest.mark.parametrize(("config", "said"), [
    ("nonsense\n", "line 1"),
    ('color = "red"\n', "there is no such key"),
    ('id = """\npi"""\n', "cannot be changed by a program; set in it coordinator = "),
    (None, "cannot be read"),
    (b"\xff", "cannot be read"),
], ids=str)  # fmt: skip
def test_a_config_that_cannot_be_changed_uses_no_invitation(gate, home, capsys, tmp_path, config,
                                                            said):  # fmt: skip
    line = invited(gate, capsys)
    path = tmp_path / "device.toml"
    if config is None:
        path.mkdir()
    else:
        path.write_bytes(config if isinstance(config, bytes) else config.encode())
    assert on_device(["join", line, "--config", str(path)]) == 1
    assert said in one_line(capsys.readouterr().err, "edge-sdk")
    assert gate.names() == {}
    assert not home.exists(), "no keys were made"


@pytest.mark.parametrize(("words", "said"), [
    (["nonsense"], "this is no invitation"),
    (["edge-join-2-AAAA"], "an invitation of version 2, this edge-sdk reads version 1"),
    (["edge-join-1-AAAA"], "the invitation is damaged"),
    (["LINE", "--id", "pi-2"], "the invitation is for 'pi-1', --id says 'pi-2'"),
    (["LINE", "--keys", "/dev/null/keys"], "keys"),
], ids=str)  # fmt: skip
def test_a_join_that_cannot_be_is_one_clear_line(gate, home, capsys, words, said):
    line = invited(gate, capsys, "--name", "pi-1").strip()
    assert on_device(["join", *[word.replace("LINE", line) for word in words]]) == 1
    printed = one_line(capsys.readouterr().err, "edge-sdk")
    assert said in printed
    assert line[60:100] not in printed
    assert gate.names() == {}


def test_a_refused_join_is_one_clear_line_and_writes_no_config(gate, home, capsys):
    line = invited(gate, capsys)
    assert on_device(["join", line, "--id", "a"]) == 0
    (home / "config.toml").unlink()
    assert on_device(["join", line, "--id", "b"]) == 1
    said = one_line(capsys.readouterr().err, "edge-sdk")
    assert "refused: this invitation was used already; ask for a new one" in said
    assert not (home / "config.toml").exists()


def test_a_line_is_asked_for_at_a_terminal_and_not_shown(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(cli_join.getpass, "getpass", lambda prompt: f"typed after {prompt!r}")
    assert cli_join._given_line(["-"]) == "typed after 'invitation (it is not shown): '"


def test_keys_are_rotated(gate, home, capsys):
    assert on_device(["join", invited(gate, capsys, "--name", "pi-1")]) == 0
    old = read_keys(home, "device")
    capsys.readouterr()
    assert on_device(["keys", "--rotate"]) == 0
    new = read_keys(home, "device")
    assert new != old
    assert gate.names() == {"pi-1": new.public}
    said = capsys.readouterr().out
    assert said.startswith(f"pi-1 has a new public key, {new.public.decode()}, also on the coord")
    assert "restart it" in said
    assert new.secret.decode() not in said


def test_keys_are_rotated_by_flags_alone(gate, home, capsys, tmp_path):
    folder = tmp_path / "own"
    old = make_keys(folder, "device")
    gate.clients.write_text(f"pi-1 {old.public.decode()}\n")
    settle(gate.clients)
    flags = ["--keys", str(folder), "--id", "pi-1", "--server-key", gate.keys.public.decode()]
    assert on_device(["keys", "--rotate", *flags]) == 1
    assert "give --coordinator, or a --config FILE" in capsys.readouterr().err
    assert on_device(["keys", "--rotate", "--coordinator", gate.endpoint, *flags]) == 0
    assert gate.names() == {"pi-1": read_keys(folder, "device").public} != {"pi-1": old.public}


@pytest.mark.parametrize(("change", "said"), [
    (("id", "pi-2"), "this key is that of 'pi-1', join says 'pi-2'"),
    (("insecure", True), "says insecure = true: there is no key to change"),
    (("keys", "/nowhere"), "/nowhere/device.public cannot be read"),
], ids=str)  # fmt: skip
def test_keys_that_cannot_be_rotated(gate, home, capsys, change, said):
    assert on_device(["join", invited(gate, capsys, "--name", "pi-1")]) == 0
    config, before = home / "config.toml", gate.names()
    config.write_text(with_values(config.read_text(), dict([change]), "here"))
    capsys.readouterr()
    assert on_device(["keys", "--rotate"]) == 1
    assert said in one_line(capsys.readouterr().err, "edge-sdk")
    assert gate.names() == before == {"pi-1": read_keys(home, "device").public}


def test_run_says_that_a_rotation_was_cut_short(home, tmp_path):
    with World(tmp_path, num_devices=1) as world:
        make_keys(world.folder / "a", "device.next")
        device = world.device("a")
        device.wait_said("run edge-sdk keys --rotate again")


# -- the config's text -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "\n", "# id = 'a'", "id='a'", ' "id" = "a"  # mine', "#id=1"])
def test_a_key_is_set_once_wherever_it_stood(text):
    changed = with_values(text, {"id": "pi-1"}, "here")
    assert parse_config(changed, "here").id == "pi-1"
    assert changed.count("pi-1") == 1
    assert with_values(changed, {"id": "pi-1"}, "here") == changed


@pytest.mark.parametrize("folder", ['/a "b" \\c', "/é/\t", "/#", "/\N{GRINNING FACE}"])
def test_any_path_is_quoted(folder):
    changed = with_values("", {"keys": folder}, "here")
    assert parse_config(changed, "here").keys == folder


@pytest.mark.parametrize("values", [{"id": "a b"}, {"coordinator": "h"}, {"keys": "/\x7f"}])
def test_values_that_no_config_has_are_not_set(values):
    with pytest.raises(ConfigError, match="here cannot be changed by a program; set in it"):
        with_values("", values, "here")


# -- both ends -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_device_that_joined_takes_part(tmp_path):
    """invite, join, run; as processes, with nothing but what a person types."""
    with World(tmp_path, num_devices=2) as world:
        assert coordinate(["clients", "remove", "b", "--keys", str(world.keys)]) == 0
        for file in (world.folder / "b").glob("*.*[tc]"):  # its keys
            file.unlink()
        invite = ["invite", "--keys", str(world.keys), "--endpoint", world.endpoint]
        printed = run_cli("coordinator.cli", *invite, "--name", "b")
        server = world.serve("--rounds", "2")
        a = world.device("a", "--once")
        server.wait_said("listening on")
        config = world.folder / "b" / "config.toml"
        joined = run_cli("edge_sdk.cli", "join", printed.stdout, "--config", str(config),
                         "--keys", str(world.folder / "b"))  # fmt: skip
        assert joined.returncode == 0, joined.stderr
        flags = world.device_flags("b", "--once", "--config", str(config))
        for flag in ("--coordinator", "--id", "--keys"):
            at = flags.index(flag)
            del flags[at : at + 2]
        b = world.start("b", ["tests.quick_device", *flags])
        assert (server.end(), a.end(), b.end()) == (0, 0, 0)
        assert world.outcomes("b") == {1: "ok", 2: "ok"}
        assert decode_line(printed.stdout).secret.decode() not in server.text() + b.text()
