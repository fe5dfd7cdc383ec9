"""The config file: what it may say, how it says what is wrong, and that flags win over it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edge_sdk.agent.own_model import OwnModel
from edge_sdk.agent.settings import (
    EXPECTED,
    RunSettings,
    Settings,
    parse_config,
    read_config,
    settled,
)
from edge_sdk.agent.setup import default_keys
from edge_sdk.cli import main, run
from edge_sdk.cli.flags import Parser
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.keys import read_key

FULL = """
coordinator = "tcp://192.168.1.10:5555"
data = "/srv/edge-sdk/data.npz"
id = "pi-1"
keys = "/var/lib/edge-sdk/keys"
server_key = "/etc/edge-sdk/server.public"
insecure = true
memory_cap = "1.5G"
threads = 2
device = "cuda:0"
ignore_conditions = true
import = ["my_models"]
augment = "my_transforms:flip"
model = "cnn"
exits = 2
option = ["channels=4,8", "kernel=3"]
"""


def test_a_file_may_set_every_key():
    settings = parse_config(FULL, "file")
    assert settings.cap_bytes == settings.given()["memory_cap"] == 3 * 1024**3 // 2
    assert settings.imports == ("my_models",)
    assert settings.augment == "my_transforms:flip"
    assert (settings.threads, settings.insecure, settings.device) == (2, True, "cuda:0")
    assert settings.id == "pi-1"
    assert settings.ignore_conditions is True
    assert settings.given()["option"] == (("channels", (4, 8)), ("kernel", 3))
    assert len(settings.given()) == len(EXPECTED) == len(Settings.__struct_fields__)


def test_an_empty_file_sets_nothing():
    assert parse_config("# nothing yet\n", "file").given() == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('\nthreads = "two"', 'line 2, key threads: got "two", expected a number from 0 (all '),
        ("threads = true", "line 1, key threads: got true, expected a number"),
        ("threads = 1025", "key threads: got 1025, expected a number from 0 (all cores) to 1024"),
        ('memory_cap = "5x"', 'key memory_cap: got "5x", expected a size such as "512M"'),
        ("memory_cap = 512", 'key memory_cap: got 512, expected a size such as "512M"'),
        ('insecure = "no"', 'key insecure: got "no", expected true or false'),
        ("ignore_conditions = 1", "key ignore_conditions: got 1, expected true or false"),
        ('import = "mine"', 'key import: got "mine", expected a list of module names'),
        ('import = [".x"]', "key import: got ['.x'], expected a list of module names"),
        ('server_key = "server.public"', 'key server_key: got "server.public", expected the coord'),
        ('id = "a b"', 'key id: got "a b", expected a name of 1 to 64 letters'),
        ('data = "here/data.npz"', 'key data: got "here/data.npz", expected the absolute path'),
        ('keys = "keys"', 'key keys: got "keys", expected the absolute path of the folder'),
        ('device = "gpu"', 'key device: got "gpu", expected "cpu" or "cuda"'),
        ('coordinator = "host:5555"', 'key coordinator: got "host:5555", expected the coordi'),
        ('coordinator = "tcp://h:70000"', 'key coordinator: got "tcp://h:70000", expected'),
        ("coordinator = 5", "line 1, key coordinator: got 5, expected the coordinator's address"),
        ("# a\n\nthread = 2", "line 3, key thread: there is no such key; did you mean threads?"),
        ("x = 2", "line 1, key x: there is no such key; known are coordinator, data, id"),
        ("id = 'a'\n[run]\nthreads = 1", "line 2: sections are not used; remove the line [run]"),
        ("[device]\nid = 'a'", "line 1: sections are not used; remove the line [device]"),
        ("[[ 'keys' ]] # of it\n", "line 1: sections are not used; remove the line [[ 'keys' ]]"),
        ("\n[a.b]\n", "line 2: sections are not used; remove the line [a.b]"),
        ("device = {x = 1}", "line 1, key device: got {'x': 1}, expected"),
        ("run.threads = 1", "line 1, key run: there is no such key"),
        ("id = pi-1", 'line 1: Invalid value in "id = pi-1"; a line is KEY = VALUE'),
        ("import = [\n'a',", "line 2: "),
        ("id = 'a'\nid = 'b'", "line 2: Cannot overwrite a value"),
        (f'id = "{"x" * 200}"', "xxx..., expected a name of 1 to 64"),
    ],
)
def test_what_is_wrong_is_one_line_with_line_and_key(text, said):
    with pytest.raises(ConfigError) as caught:
        parse_config(text, "/etc/file.toml")
    message = str(caught.value)
    assert message.startswith("/etc/file.toml, line ")
    assert said in message
    assert "\n" not in message


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        ConfigError, match="cannot be read: No such file .*--config.*edge-sdk join.*service install"
    ):
        read_config(tmp_path / "absent.toml")
    (tmp_path / "latin.toml").write_bytes('id = "ä"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin.toml is not UTF-8 text"):
        read_config(tmp_path / "latin.toml")


def test_what_never_ends_is_no_config_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_text("#" * 2**20 + "\n")
    (tmp_path / "full").write_text("#" * (2**20 - 1) + "\n")
    assert read_config(tmp_path / "full") == Settings()
    for path, said in (
        (Path("/dev/zero"), "it is not a regular file"),
        (tmp_path / "fifo", "it is not a regular file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "large", "it is larger than 1 MiB"),
    ):
        with pytest.raises(ConfigError, match=f"config file {path} cannot be read: {said}"):
            read_config(path)
        with pytest.raises(ConfigError, match=f"key file {path} cannot be read: {said}"):
            read_key(path)


# -- run --config ---------------------------------------------------------------------------------


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    (tmp_path / "c.toml").write_text(FULL)
    flags = {"threads": 0, "id": "other", "data": None}
    found = settled(tmp_path / "c.toml", flags, lambda: Path("unused"))
    assert (found.threads, found.id) == (0, "other")
    assert (found.data, found.memory_cap) == ("/srv/edge-sdk/data.npz", 3 * 1024**3 // 2)
    assert (found.keys, found.insecure) == (Path("/var/lib/edge-sdk/keys"), True)
    assert found.imports == ("my_models",)


def test_without_a_file_there_are_the_defaults(monkeypatch):
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/edge-sdk")
    flags = {"coordinator": "tcp://h:1", "data": "digits", "imports": ["a"]}
    found = settled(None, flags, default_keys)
    assert found.keys == Path("/var/lib/edge-sdk/keys")
    assert (found.insecure, found.threads, found.device, found.imports) == (False, 0, "cpu", ("a",))
    assert (found.id, found.memory_cap, found.server_key) == (None, None, None)


def test_every_setting_has_a_flag():
    parser = Parser()
    run.add_run_command(parser.add_subparsers())
    assert set(RunSettings.__struct_fields__) <= vars(parser.parse_args(["run"])).keys()


def test_coordinator_and_data_must_come_from_somewhere(tmp_path, capsys):
    (tmp_path / "c.toml").write_text('data = "digits"')
    assert main.main(["run", "--config", str(tmp_path / "c.toml")]) == 1
    assert capsys.readouterr().err.endswith("c.toml does not set coordinator; add it there\n")
    with pytest.raises(SystemExit) as usage:
        main.main(["run", "--data", "digits"])
    assert usage.value.code == 2
    assert "give --coordinator, or a --config FILE that sets coordinator" in capsys.readouterr().err


def test_keys_go_where_the_file_says(tmp_path, capsys):
    (tmp_path / "c.toml").write_text(f'id = "pi-7"\nkeys = "{tmp_path}/keys"')
    assert main.main(["keys", "--config", str(tmp_path / "c.toml")]) == 0
    assert "edge-coordinator clients add pi-7 '" in capsys.readouterr().out
    assert (tmp_path / "keys" / "device.secret").stat().st_mode & 0o777 == 0o600


def test_a_model_of_the_devices_own(tmp_path):
    file = tmp_path / "config.toml"
    file.write_text('insecure = true\nmodel = "cnn"\noption = ["channels=4,8"]\n')
    own = settled(file, {"exits": 2}, Path).own_model
    assert own == OwnModel(family="cnn", exits=2, options={"channels": (4, 8)})
    assert settled(None, {"insecure": True}, Path).own_model is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"exits": 2}, "exits and option are of a model of this device's own; set model too"),
        ({"option": (("a", 1),)}, "set model too"),
        ({"model": "cnn", "option": (("a", "x" * 3000),)}, "the device's own model (--model, "),
    ],
)
def test_a_model_of_its_own_that_cannot_be(flags, said):
    with pytest.raises(ConfigError) as found:
        _ = settled(None, {"insecure": True, **flags}, Path).own_model
    assert said in str(found.value)
