"""An invitation as one line of text."""

from __future__ import annotations

import pytest

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.invitation import InvitationLine, decode_line, encode_line
from tests.support.admission import LINE


@pytest.mark.parametrize("name", ["", "pi-1", "a" * 64])
@pytest.mark.parametrize("endpoint", ["tcp://192.0.2.1:5555", "tcp://[2001:db8::1]:1"])
def test_a_line_is_read_back(name, endpoint):
    line = InvitationLine(endpoint, name, LINE.server_key, LINE.secret)
    text = encode_line(line)
    assert decode_line(text) == line
    assert decode_line(f"  {text[:30]} \r\n {text[30:]}\n") == line  # as a mail program wraps it
    assert text.split("-", 2)[:2] == ["edge", "join"]
    assert text.replace("-", "").replace("_", "").isalnum(), "nothing that a shell would take"


def test_a_line_does_not_show_its_secret():
    assert LINE.secret.decode() not in repr(LINE) + str(LINE) + f"{[LINE]}"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: "", "this is no invitation: .*got 0 other characters"),
        (lambda text: text.removeprefix("edge-"), "this is no invitation"),
        (lambda text: text + "!", "this is no invitation"),
        (lambda text: text + "é", "this is no invitation"),
        (lambda text: text + "A" * 1000, "this is no invitation"),
        (lambda text: text[:-1], "the invitation is damaged"),
        (lambda text: text[:40], "the invitation is damaged"),
        (lambda text: text[:12], "the invitation is damaged"),
        (lambda text: text[:50] + "AAAA" + text[54:], "the invitation is damaged"),
        (
            lambda text: text.replace("-1-", "-2-", 1),
            "an invitation of version 2, this .* version 1",
        ),
        (lambda text: text.replace("-1-", "-999999999999-", 1), "this is no invitation"),
    ],
)
def test_a_line_that_is_none_is_one_clear_error(spoil, said):
    text = spoil(encode_line(LINE))
    with pytest.raises(ConfigError, match=said) as caught:
        decode_line(text)
    assert encode_line(LINE)[60:80] not in str(caught.value), "a part of the secret"


@pytest.mark.parametrize(
    ("endpoint", "name", "said"),
    [
        ("ipc:///tmp/x", "", "endpoint 'ipc:///tmp/x' is not tcp://HOST:PORT"),
        ("tcp://h:0", "", "port outside"),
        ("tcp://h:1", "../etc", "no device's name"),
        ("tcp://h:1", "a b", "no device's name"),
    ],
)
def test_a_whole_line_may_still_say_nonsense(endpoint, name, said):
    with pytest.raises(ConfigError, match=said):
        decode_line(encode_line(InvitationLine(endpoint, name, LINE.server_key, LINE.secret)))
