"""Text files and lines as editors and shells of Windows write them: a mark before them, CRLF."""

from __future__ import annotations

import io
import sys

import pytest

from coordinator.admission.client_list import Admission, add_client, remove_client
from coordinator.cli.main import main as coordinate
from edge_sdk.agent.settings import read_config
from edge_sdk.cli.main import main as on_device
from edge_sdk.errors import ConfigError
from edge_sdk.hardware.boards import board, board_folder
from edge_sdk.protocol.invitation import decode_line
from edge_sdk.protocol.keys import make_keys, read_all_keys, read_keys
from tests.support.admission import invited, new_key

WRITERS = {  # of Notepad, of PowerShell's Set-Content and of its >
    "notepad": lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
    "utf-8": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "utf-16": lambda text: b"\xff\xfe" + text.replace("\n", "\r\n").encode("utf-16-le"),
    "big endian": lambda text: b"\xfe\xff" + text.encode("utf-16-be"),
}


@pytest.fixture(params=WRITERS)
def written(request):
    return WRITERS[request.param]


def test_a_config_file(tmp_path, written):
    file = tmp_path / "config.toml"
    file.write_bytes(written('coordinator = "tcp://h:1"\n# größer\nid = "pi"\n'))
    found = read_config(file)
    assert (found.coordinator, found.id) == ("tcp://h:1", "pi")
    file.write_bytes(written('coordinator = "tcp://h:1"\nid = pi\n'))
    with pytest.raises(ConfigError, match=r'config.toml, line 2: Invalid value in "id = pi"'):
        read_config(file)


def test_a_config_file_that_join_and_keys_change(gate, tmp_path, capsys, written):
    file = tmp_path / "config.toml"
    file.write_bytes(written(f'threads = 2\nkeys = "{tmp_path}/own"\ndata = "digits"\n'))
    line = invited(gate, capsys, "--name", "pi-1")
    assert on_device(["join", "\ufeff" + line, "--config", str(file)]) == 0
    found = read_config(file)
    assert (found.threads, found.data, found.id) == (2, "digits", "pi-1")
    assert not file.read_text().startswith("\ufeff")
    assert on_device(["keys", "--config", str(file)]) == 0
    assert "clients add pi-1 '" in capsys.readouterr().out


def test_keys(tmp_path, written):
    pair = make_keys(tmp_path, "device")
    for file in (tmp_path / "device.public", tmp_path / "device.secret"):
        file.write_bytes(written(file.read_text()))
    assert read_keys(tmp_path, "device") == pair
    (tmp_path / "theirs.txt").write_bytes(written(f"{pair.public.decode()}\n"))
    assert read_all_keys(tmp_path, str(tmp_path / "theirs.txt")) == (pair, pair.public)


def test_the_list_of_clients(tmp_path, written, capsys):
    keys = {name: new_key() for name in ("pi-1", "pi-2", "pi-3")}
    file = tmp_path / "clients"
    file.write_bytes(written("".join(f"{name} {keys[name]}\n" for name in ("pi-1", "pi-2"))))
    assert sorted(Admission(file).names()) == ["pi-1", "pi-2"]
    add_client(file, "pi-3", keys["pi-3"].encode())
    assert remove_client(file, "pi-1")
    assert coordinate(["clients", "list", "--keys", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"pi-2 {keys['pi-2']}\npi-3 {keys['pi-3']}\n"


def test_an_invitation_from_a_pipe(gate, tmp_path, capsys, monkeypatch, written):
    line = invited(gate, capsys, "--name", "pi-1")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(written(f"{line}\n")), "ascii"))
    config = ["--config", str(tmp_path / "c.toml"), "--keys", str(tmp_path / "own")]
    assert on_device(["join", "-", *config]) == 0
    assert gate.names().keys() == {"pi-1"}


def test_an_invitation_that_is_no_text_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\x80\xff" * 20)))
    assert on_device(["join", "-", "--config", str(tmp_path / "c"), "--keys", str(tmp_path)]) == 2
    said = (
        "edge-sdk: the invitation is no text: invalid start byte; copy the whole line once more\n"
    )
    assert capsys.readouterr().err == said


def test_an_argument_with_a_mark(gate, capsys):
    line = invited(gate, capsys)
    assert decode_line("\ufeff" + line + "\r\n") == decode_line(line)


def test_a_board_file(tmp_path, written):
    (tmp_path / "mine.toml").write_bytes(written((board_folder() / "generic.toml").read_text()))
    assert board(str(tmp_path / "mine.toml")) == board("generic")
