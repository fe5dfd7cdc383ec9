"""Key files."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys

import pytest
import zmq
from zmq.utils import z85

from edge_sdk.errors import ConfigError
from edge_sdk.protocol import keys
from edge_sdk.protocol.keys import KeyPair, check_key, make_keys, read_all_keys, read_key, read_keys
from tests.support.examples import KEY_A, KEY_B, mode_of


def test_made_keys_are_read_back(tmp_path):
    made = make_keys(tmp_path / "new" / "folder", "device")
    assert read_keys(tmp_path / "new" / "folder", "device") == made
    assert zmq.curve_public(made.secret) == made.public
    assert make_keys(tmp_path, "other") != made


def test_key_files_hold_one_line_each(tmp_path):
    made = make_keys(tmp_path, "device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.public", "device.secret"]
    assert (tmp_path / "device.public").read_bytes() == made.public + b"\n"
    assert (tmp_path / "device.secret").read_bytes() == made.secret + b"\n"


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_secrets_are_for_their_owner_only_whatever_the_umask(tmp_path, mask):
    before = os.umask(mask)
    try:
        make_keys(tmp_path, "device")
    finally:
        os.umask(before)
    assert mode_of(tmp_path / "device.secret") == 0o600


@pytest.mark.parametrize("left", ["device.secret", "device.public"])
def test_keys_are_never_overwritten(tmp_path, left):
    (tmp_path / left).write_text("something")
    with pytest.raises(ConfigError, match=rf"{left} exists; a key is never overwritten"):
        make_keys(tmp_path, "device")
    assert [path.name for path in tmp_path.iterdir()] == [left]
    assert (tmp_path / left).read_text() == "something"


def test_keys_that_cannot_be_written_are_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"keys cannot be written to .*file/keys"):
        make_keys(tmp_path / "file" / "keys", "device")


@pytest.mark.parametrize("mode", [0o604, 0o640, 0o660, 0o644, 0o601, 0o777])
def test_secrets_that_others_can_read_are_refused(tmp_path, mode):
    make_keys(tmp_path, "device")
    secret = tmp_path / "device.secret"
    secret.chmod(mode)
    with pytest.raises(
        ConfigError, match=f"has mode {mode:04o}, others can read it; run chmod 600"
    ):
        read_keys(tmp_path, "device")
    secret.chmod(0o400)
    assert read_keys(tmp_path, "device")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n",
        KEY_A[:-1],
        KEY_A + b"a",
        KEY_A + b"\n" + KEY_B,
        b'"' * 40,  # not in the alphabet of Z85
        b" " * 40,
        b"x" * 100_000,
    ],
)
@pytest.mark.parametrize("file", ["device.public", "device.secret"])
def test_malformed_keys_are_refused(tmp_path, file, content):
    make_keys(tmp_path, "device")
    (tmp_path / file).write_bytes(content)
    length = len(content.strip())
    with pytest.raises(ConfigError, match=rf"{file} holds no key: expected 40 .*, got {length}$"):
        read_keys(tmp_path, "device")


@pytest.mark.parametrize("content", [b"\xff" * 40, b"\xe9" * 20])
def test_key_files_that_are_not_text_are_refused(tmp_path, content):
    (tmp_path / "device.public").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"device.public cannot be read: .*; make one with `keys`"
    ):
        read_key(tmp_path / "device.public")


@pytest.mark.parametrize("file", ["device.public", "device.secret"])
def test_missing_keys_are_named(tmp_path, file):
    make_keys(tmp_path, "device")
    (tmp_path / file).unlink()
    with pytest.raises(ConfigError, match=f"{file} cannot be read"):
        read_keys(tmp_path, "device")


def test_a_folder_without_keys_tells_every_way_to_them(tmp_path):
    with pytest.raises(ConfigError) as caught:
        read_all_keys(tmp_path / "none", None)
    for way in ("edge-sdk join LINE --keys", "edge-sdk keys --keys"):
        assert f"{way} {tmp_path / 'none'}" in str(caught.value)
    assert str(caught.value).endswith("or give --keys with the folder that has it")
    make_keys(tmp_path, "device")
    with pytest.raises(ConfigError, match=r"server.public .*coordinator's .* or give --its-key"):
        read_all_keys(tmp_path, None, "--its-key")
    with pytest.raises(ConfigError, match="no-file cannot .* in the coordinator's folder of keys"):
        read_all_keys(tmp_path, "no-file")


def test_the_servers_key_is_a_text_or_a_file(tmp_path):
    own = make_keys(tmp_path, "device")
    file = tmp_path / "k"
    file.write_bytes(KEY_A)
    for given in (KEY_A.decode(), str(file)):
        assert read_all_keys(tmp_path, given) == (own, KEY_A)


@pytest.mark.parametrize("given", ["/no/such/server.public", "short", "x" * 5000, "/a\0b"])
def test_what_is_neither_is_named(tmp_path, given):
    make_keys(tmp_path, "device")
    with pytest.raises(ConfigError, match="^--server-key is neither a key of 40 characters nor"):
        read_all_keys(tmp_path, given)


def test_blanks_around_a_key_do_not_matter(tmp_path):
    (tmp_path / "server.public").write_bytes(b"  " + KEY_A + b" \r\n")
    assert read_key(tmp_path / "server.public") == KEY_A


@pytest.mark.parametrize("text", ["#" * 40, KEY_A.decode()[:35] + "%nSc1"])
def test_a_key_that_is_no_number_is_refused(text):
    # Five characters are one number below 2^32. "#####" is 85^5 - 1, "%nSc0" is 2^32 - 1.
    with pytest.raises(ConfigError, match="^here holds no key: 40 characters, but not Z85 of 32"):
        check_key(text, "here")
    assert check_key(KEY_A.decode()[:35] + "%nSc0", "here")


def test_every_character_of_z85_may_be_in_a_key():
    for char in z85.Z85CHARS.decode():
        assert check_key(f"0{char}00{char}" * 8, "here")


def test_checking_keys_needs_no_zmq_until_then():
    code = (
        "import sys, edge_sdk.protocol.keys, coordinator.admission.client_list;"
        "print('zmq' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


def test_files_that_are_not_a_pair_are_refused(tmp_path):
    make_keys(tmp_path, "device")
    make_keys(tmp_path, "other")
    (tmp_path / "other.public").replace(tmp_path / "device.public")
    with pytest.raises(ConfigError, match=r"device.public does not belong to .*device.secret; "):
        read_keys(tmp_path, "device")


def test_a_pair_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write = keys._write_new

    def full(file, *rest):
        write(file, *rest)
        if file.suffix == ".public":
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(keys, "_write_new", full)
        with pytest.raises(ConfigError, match="keys cannot be written to .*No space left"):
            make_keys(tmp_path, "device")
    assert list(tmp_path.iterdir()) == []
    assert make_keys(tmp_path, "device")


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root rights")
@pytest.mark.parametrize("folder", [".", "keys"], ids=["there", "new"])
def test_what_root_makes_belongs_to_the_owner_of_the_folder(tmp_path, folder):
    os.chown(tmp_path, 4711, 4712)
    make_keys(tmp_path / folder, "device")
    for file in (tmp_path / folder, *(tmp_path / folder).iterdir()):
        assert (file.stat().st_uid, file.stat().st_gid) == (4711, 4712)
    assert mode_of(tmp_path / folder / "device.secret") == 0o600


def test_a_folder_that_cannot_be_looked_into_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="keys cannot be written to"):
        make_keys(tmp_path / ("x" * 300), "device")  # longer than a file's name may be


def test_no_secret_in_texts(tmp_path, caplog):
    pair = KeyPair(public=KEY_A, secret=KEY_B)
    for text in (repr(pair), str(pair), f"{pair}", f"{[pair]}"):
        assert KEY_A.decode() in text
        assert KEY_B.decode()[:8] not in text
    (tmp_path / "device.public").write_bytes(KEY_A)
    (tmp_path / "device.secret").write_bytes(KEY_B + b"!")
    with caplog.at_level(logging.DEBUG), pytest.raises(ConfigError) as caught:
        read_keys(tmp_path, "device")
    assert KEY_B.decode()[:8] not in str(caught.value) + caplog.text
