"""`edge-sdk join|keys` as a person meets them."""

from __future__ import annotations

import io
import logging
import stat
import sys
from pathlib import Path

import pytest

from coordinator.cli.main import main as coordinate
from edge_sdk.agent import settings as config_file
from edge_sdk.agent.settings import parse_config, read_config, with_values
from edge_sdk.cli import join as cli_join
from edge_sdk.cli.main import main as on_device
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.invitation import decode_line
from edge_sdk.protocol.keys import make_keys, read_keys
from tests.support.admission import invited
from tests.support.examples import one_line, settle
from tests.support.processes import World, run_cli


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Of a user, where no service is installed."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    for module in (config_file, cli_join):
        monkeypatch.setattr(module, "DEFAULT_CONFIG", tmp_path / "etc" / "config.toml")
    return tmp_path / "home" / ".config" / "edge-sdk"


# -- on the device ---------------------------------------------------------------------------------


def test_join_does_the_rest(gate, home, capsys, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    line = invited(gate, capsys, "--name", "pi-1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(line.encode())))
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


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("nonsense\n", "line 1"),
        ('color = "red"\n', "there is no such key"),
        ('id = """\npi"""\n', "cannot be changed by a program; set in it coordinator = "),
        (None, "cannot be read"),
        (b"\xff", "cannot be read"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_changed_uses_no_invitation(
    gate, home, capsys, tmp_path, config, said
):
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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "this is no invitation"),
        (["edge-join-2-AAAA"], "an invitation of version 2, this edge-sdk reads version 1"),
        (["edge-join-1-AAAA"], "the invitation is damaged"),
        (["LINE", "--id", "pi-2"], "the invitation is for 'pi-1', --id says 'pi-2'"),
        (["LINE", "--keys", "/dev/null/keys"], "keys"),
    ],
    ids=str,
)
def test_a_join_that_cannot_be_is_one_clear_line(gate, home, capsys, words, said):
    line = invited(gate, capsys, "--name", "pi-1").strip()
    status = 1 if "--keys" in words else 2
    assert on_device(["join", *[word.replace("LINE", line) for word in words]]) == status
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
    assert "refused: this key is that of 'a', join says 'b'" in said
    assert not (home / "config.toml").exists()


def test_a_config_that_is_not_written_in_the_end_does_not_hide_that_the_device_is_admitted(
    gate, home, capsys, tmp_path, monkeypatch
):
    def full(path: Path, text: str) -> None:
        raise ConfigError(f"config file {path} cannot be written: no space")

    line = invited(gate, capsys).strip()
    with monkeypatch.context() as patch:
        patch.setattr(cli_join, "write_config", full)
        assert on_device(["join", line, "--id", "pi-1"]) == 1
    said = one_line(capsys.readouterr().err, "edge-sdk")
    assert f"{home}/config.toml cannot be written: no space; but pi-1 is admitted" in said
    assert "join again with the same LINE and a --config FILE" in said
    assert f'coordinator = "{gate.endpoint}", keys = "{home}", id = "pi-1"' in said
    assert line[60:100] not in said
    assert list(gate.names()) == ["pi-1"]
    assert on_device(["join", line, "--id", "pi-1", "--config", str(tmp_path / "c.toml")]) == 0
    assert read_config(tmp_path / "c.toml").id == "pi-1"


def test_leaving_another_coordinator_is_told(gate, home, capsys, tmp_path):
    config = home / "config.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text('coordinator = "tcp://192.0.2.9:5555"\n')
    line = invited(gate, capsys, "--name", "pi-1")
    join = ["join", line, "--config", str(config)]
    assert on_device(join) == 0
    said = f"edge-sdk: {config} named the coordinator tcp://192.0.2.9:5555, where this device"
    assert capsys.readouterr().err.startswith(said)
    assert read_config(config).coordinator == gate.endpoint
    assert on_device(join) == 0
    assert capsys.readouterr().err == "", "it is the same one"
    config.write_text('coordinator = "tcp://192.0.2.9:5555"\n')
    assert on_device(join) == 0
    assert capsys.readouterr().err == "", "it has moved, and its key tells"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_line_is_asked_for_at_a_terminal_and_not_shown(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(cli_join.getpass, "getpass", lambda prompt: f"typed after {prompt!r}")
    assert cli_join._given_line(["-"]) == "typed after 'invitation (it is not shown): '"


def test_ctrl_d_instead_of_a_line_is_one_line(monkeypatch, capsys):
    def nothing(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr(cli_join.getpass, "getpass", nothing)
    assert on_device(["join", "-"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("edge-sdk: ")


def test_keys_that_are_there_are_shown_and_stay(tmp_path, capsys):
    folder = tmp_path / "keys"
    command = ["keys", "--id", "pi-2", "--keys", str(folder)]
    assert on_device(command) == 0
    first = capsys.readouterr()
    assert first.out.startswith(f"wrote {folder}/device.public and .secret; on the coordinator run")
    assert first.err == ""
    before = {file: file.read_bytes() for file in folder.iterdir()}
    assert on_device(command) == 0
    again = capsys.readouterr()
    key = read_keys(folder, "device").public.decode()
    assert f"  edge-coordinator clients add pi-2 '{key}'\n" in again.out
    assert again.out.splitlines()[1:] == first.out.splitlines()[1:]
    assert "were there and stay as they are" in one_line(again.err, "edge-sdk")
    assert {file: file.read_bytes() for file in folder.iterdir()} == before


def test_half_a_pair_of_keys_is_not_shown(tmp_path, capsys):
    make_keys(tmp_path, "device")
    (tmp_path / "device.public").unlink()
    assert on_device(["keys", "--id", "pi-2", "--keys", str(tmp_path)]) == 1
    assert "device.secret exists; a key is never" in one_line(capsys.readouterr().err, "edge-sdk")
    assert [file.name for file in tmp_path.iterdir()] == ["device.secret"]


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
    assert on_device(["keys", "--rotate", *flags]) == 2
    assert "give --coordinator, or a --config FILE" in capsys.readouterr().err
    assert on_device(["keys", "--rotate", "--coordinator", gate.endpoint, *flags]) == 0
    assert gate.names() == {"pi-1": read_keys(folder, "device").public} != {"pi-1": old.public}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("id", "pi-2"), "this key is that of 'pi-1', join says 'pi-2'"),
        (("insecure", True), "says insecure = true: there is no key to change"),
        (("keys", "/nowhere"), "/nowhere/device.public cannot be read"),
    ],
    ids=str,
)
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
        joined = run_cli(
            "edge_sdk.cli",
            "join",
            printed.stdout,
            "--config",
            str(config),
            "--keys",
            str(world.folder / "b"),
        )
        assert joined.returncode == 0, joined.stderr
        flags = world.device_flags("b", "--once", "--config", str(config))
        for flag in ("--coordinator", "--id", "--keys"):
            at = flags.index(flag)
            del flags[at : at + 2]
        b = world.start("b", ["tests.support.fast_device_program", *flags])
        assert (server.end(), a.end(), b.end()) == (0, 0, 0)
        assert world.outcomes("b") == {1: "ok", 2: "ok"}
        assert decode_line(printed.stdout).secret.decode() not in server.text() + b.text()
