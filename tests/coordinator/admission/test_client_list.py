"""The list of admitted clients."""

from __future__ import annotations

import threading

import pytest

from coordinator.admission import client_list
from coordinator.admission.client_list import Admission, add_client, parse_clients
from coordinator.links.router import Router
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.keys import make_keys
from tests.support.examples import KEY_A, KEY_B, mode_of, settle


def line(name: str, key: bytes) -> str:
    return f"{name} {key.decode()}\n"


def test_a_list_has_names_keys_comments_and_blank_lines():
    text = "# devices\n\n" + line("pi", KEY_A) + "   \n" + line("Nano.2_x-1", KEY_B)
    assert parse_clients(text, "clients") == {KEY_A: "pi", KEY_B: "Nano.2_x-1"}
    assert parse_clients("", "clients") == {}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("pi\n", "expected `NAME PUBLIC_KEY`, got 'pi'"),
        (f"pi {KEY_B.decode()} more\n", "expected `NAME PUBLIC_KEY`"),
        (line("-pi", KEY_B), "expected `NAME PUBLIC_KEY`"),
        (line("a/b", KEY_B), "expected `NAME PUBLIC_KEY`"),
        (line("a" * 65, KEY_B), "expected `NAME PUBLIC_KEY`"),
        (line("pi", KEY_B[:-1]), "holds no key: expected 40 characters of Z85, got 39"),
        (line("pi", b'"' * 40), "holds no key"),
        (line("first", KEY_B), "first is there already, with another key"),
        (line("second", KEY_A), "the key of second is there already, under the name first"),
        (line("first", KEY_A), "first is there already, with this key"),
    ],
)
def test_errors_name_the_line(bad, message):
    text = "# one\n" + line("first", KEY_A) + "\n" + bad
    with pytest.raises(ConfigError, match=f"^clients line 4:? {message}"):
        parse_clients(text, "clients")


def test_strangers_have_no_name(tmp_path):
    path = tmp_path / "clients"
    path.write_text(line("pi", KEY_A))
    admission = Admission(path)
    assert admission.name_of(KEY_A) == "pi"
    assert admission.name_of(KEY_B) is None
    assert admission.names() == {"pi": KEY_A}


def test_changes_of_the_list_are_seen(tmp_path):
    path = tmp_path / "clients"
    path.write_text("")
    admission = Admission(path)
    assert admission.name_of(KEY_A) is None
    add_client(path, "pi", KEY_A)
    assert admission.name_of(KEY_A) == "pi"
    path.write_text(line("nano", KEY_B))
    settle(path)
    assert admission.name_of(KEY_A) is None
    assert admission.name_of(KEY_B) == "nano"


def test_a_list_that_went_bad_changes_nothing(tmp_path, caplog):
    path = tmp_path / "clients"
    path.write_text(line("pi", KEY_A))
    admission = Admission(path)
    path.write_text("nonsense\n")
    settle(path)
    assert admission.name_of(KEY_A) == "pi"
    assert "line 1" in caplog.text
    path.unlink()
    assert admission.name_of(KEY_A) == "pi"
    assert "the last one stays in force" in caplog.text
    path.write_text("# nobody\n")
    settle(path)
    assert admission.name_of(KEY_A) is None


def test_a_list_that_went_bad_is_complained_about_once(tmp_path, caplog):
    path = tmp_path / "clients"
    path.write_text(line("pi", KEY_A))
    admission = Admission(path)
    for bad in (b"nonsense\n", b"other nonsense\n", b"\xff\xff\n", None):
        caplog.clear()
        if bad is None:
            path.unlink()
        else:
            path.write_bytes(bad)
            settle(path)
        for _ in range(3):
            assert admission.name_of(KEY_A) == "pi"
        assert len(caplog.records) == 1


def test_a_list_that_stays_bad_is_complained_about_every_minute(tmp_path, caplog, monkeypatch):
    path, now = tmp_path / "clients", [1000.0]
    monkeypatch.setattr(client_list.time, "monotonic", lambda: now[0])
    path.write_text(line("pi", KEY_A))
    admission = Admission(path)
    path.write_text("# pi is revoked\nnonsense\n")
    settle(path)
    for seconds, lines in ((0, 1), (59, 1), (1, 2), (59, 2), (1, 3)):
        now[0] += seconds
        assert admission.name_of(KEY_A) == "pi"
        assert len(caplog.records) == lines
    assert len({record.getMessage() for record in caplog.records}) == 1
    said = caplog.records[-1].getMessage()
    assert "nobody is admitted or removed by it until this is corrected" in said
    assert "clients line 2: expected `NAME PUBLIC_KEY`" in said
    path.write_text("# pi is revoked\n")
    settle(path)
    now[0] += 100
    assert admission.name_of(KEY_A) is None
    assert len(caplog.records) == 3


def test_a_list_that_could_not_be_read_is_tried_again(tmp_path, caplog):
    path, away = tmp_path / "clients", tmp_path / "away"
    path.write_text(line("pi", KEY_A))
    admission = Admission(path)
    for _ in range(2):
        caplog.clear()
        path.replace(away)
        assert admission.name_of(KEY_A) == "pi"
        assert len(caplog.records) == 1
        away.replace(path)  # the same file, so the same stamp
        assert admission.name_of(KEY_A) == "pi"
    path.unlink()
    path.mkdir()
    path.chmod(0o755)
    assert admission.name_of(KEY_A) == "pi"
    path.rmdir()
    path.write_text(line("nano", KEY_A))
    settle(path)
    assert admission.name_of(KEY_A) == "nano"


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_adding_a_client_keeps_the_mode_of_the_list(tmp_path, mode):
    path = tmp_path / "clients"
    path.write_text(line("pi", KEY_A))
    path.chmod(mode)
    add_client(path, "nano", KEY_B)
    assert mode_of(path) == mode


@pytest.mark.parametrize("content", [None, b"\xff\n", b"nonsense\n"])
def test_nothing_is_added_to_a_list_that_is_no_list(tmp_path, content):
    path = tmp_path / "clients"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError):
        add_client(path, "pi", KEY_A)
    assert [entry.name for entry in tmp_path.iterdir()] == ["clients"]
    assert content is None or path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: .*; make it with `edge-coordinator clients add`"),
        (b"\xff\n", "cannot be read"),
        (b"pi\n", "line 1: expected"),
    ],
)
def test_a_list_that_was_never_good_is_refused(tmp_path, content, message):
    path = tmp_path / "clients"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Admission(path)


def test_clients_are_added_behind_what_is_there(tmp_path):
    path = tmp_path / "new" / "clients"
    add_client(path, "pi", KEY_A)
    assert path.read_text() == line("pi", KEY_A)
    path.write_text("# mine\n" + line("pi", KEY_A).rstrip())  # no line feed at the end
    add_client(path, "nano", KEY_B)
    assert path.read_text() == "# mine\n" + line("pi", KEY_A) + line("nano", KEY_B)
    assert [entry.name for entry in path.parent.iterdir()] == ["clients"]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("pi", KEY_B),
        ("nano", KEY_A),
        ("a b", KEY_B),
        ("", KEY_B),
        ("nano", b"x"),
        ("#nano", KEY_B),
        ("nano\n", KEY_B),
        ("nano #", KEY_B),
    ],
)
def test_clients_that_cannot_be_added_leave_the_list_alone(tmp_path, name, key):
    path = tmp_path / "clients"
    path.write_text(line("pi", KEY_A))
    with pytest.raises(ConfigError):
        add_client(path, name, key)
    assert path.read_text() == line("pi", KEY_A)


def test_a_hub_closes_though_the_thread_that_checks_keys_has_died(tmp_path):
    """pyzmq's own stop() would block: it sends to a thread that is not there any more."""
    (tmp_path / "clients").write_text("")
    router = Router(
        "tcp://127.0.0.1:0", make_keys(tmp_path, "server"), Admission(tmp_path / "clients")
    )
    router._authenticator.pipe.send(b"TERMINATE")
    router._authenticator.thread.join(10)
    assert not router._authenticator.is_alive()
    closing = threading.Thread(target=router.close, daemon=True)
    closing.start()
    closing.join(10)
    assert not closing.is_alive()
