"""Lines of log for programs: each one JSON object, whatever is in it, and no secret ever."""

from __future__ import annotations

import ast
import json
import logging
import subprocess
import sys
from typing import get_args

import pytest

from edge_sdk.helpers.logs import EventName, JsonFormatter, event
from tests.support.processes import ROOT, environment

HOSTILE = [
    "two\nlines",
    '\r\n{"event": "joined"}',
    "\x1b[2J\x00\x7f",
    "\u2028\u2029\x85",
    "\ud800",
    '"}',
    "é 中",
    "%s %d %",
    "",
]


def kind_of(value: object) -> str:
    return type(value).__name__


def parsed(message: object, *arguments: object, exc_info=None, **fields: object) -> dict:
    """The line of a record, which must be one line of ASCII."""
    record = logging.getLogger("test.logs").makeRecord(
        "test.logs", logging.WARNING, "a.py", 1, message, arguments, exc_info, extra=fields
    )
    text = JsonFormatter().format(record)
    assert text.isascii()
    assert len(text.splitlines()) == 1
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_line_names_time_level_logger_event_message_and_fields():
    line = parsed("%s joined", "pi-1", **event("joined", client="pi-1", round=3, bytes_up=7))
    assert line.pop("ts").endswith("+00:00")
    assert line == {
        "level": "warning",
        "logger": "test.logs",
        "event": "joined",
        "message": "pi-1 joined",
        "client": "pi-1",
        "round": 3,
        "bytes_up": 7,
    }


def test_the_time_is_utc():
    record = logging.makeLogRecord({"msg": "x", "created": 86400.25})
    assert json.loads(JsonFormatter().format(record))["ts"] == "1970-01-02T00:00:00.250+00:00"


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_nothing_breaks_a_line(text):
    """A half of a surrogate pair is no text: it is shown as its escape."""
    shown = "\\ud800" if text == "\ud800" else text
    assert parsed("%s", text, client=text)["message"] == shown
    assert parsed("%s", text, client=text)["client"] == shown
    assert parsed(text)["message"] == shown
    assert parsed(text, event=text)["event"] == shown
    assert len(parsed("x", **{f"field {text}": 1})) == 6


class Silent:
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (True, True),
        (None, None),
        (1.5, 1.5),
        ((1, 2), "(1, 2)"),
        (Silent(), "[Silent that does not print: RuntimeError]"),
    ],
    ids=kind_of,
)
def test_every_value_has_a_form(value, shown):
    assert parsed("x", figure=value)["figure"] == shown


def test_arguments_that_do_not_fit_are_one_line_too():
    assert parsed("%d of %d", 1)["message"] == "%d of %d [its arguments do not fit: TypeError]"
    line = parsed("%s", Silent())
    assert line["message"] == "%s [its arguments do not fit: RuntimeError]"


def test_an_exception_is_one_field():
    try:
        raise OSError("disk\nfull")
    except OSError:
        line = parsed("could not write", exc_info=sys.exc_info())
    assert line["message"] == "could not write"
    assert line["exception"].startswith("Traceback (most recent call last)")
    assert line["exception"].endswith("OSError: disk\nfull")


def test_secrets_are_not_said():
    key = b"s3cret-key-of-forty-characters-in-Z85...."
    text = json.dumps(parsed("key %s", key, public=key, join_token="abc", secret="abc"))
    assert "s3cret" not in text
    assert "abc" not in text
    assert f"key [{len(key)} bytes]" in text


def test_fields_do_not_replace_what_every_line_has():
    line = parsed("x", ts="never", level="calm", logger="other", exception="none")
    assert (line["level"], line["logger"]) == ("warning", "test.logs")
    assert "never" not in line["ts"]
    assert "exception" not in line
    for name in ("ts", "name", "message", "args", "module"):
        with pytest.raises(ValueError, match=name):
            event("joined", **{name: 1})


def test_what_is_not_known_is_left_out():
    assert event("gone") == {"event": "gone"}
    assert event("fault", client="a", code="tensors") == {
        "event": "fault",
        "client": "a",
        "code": "tensors",
    }


PROGRAM = """
import logging, sys, warnings
from edge_sdk.helpers import logs
logs.set_up(is_json=True, is_debug=False, form="")
logging.getLogger("a").info("two\\nlines", extra=logs.event("joined", client="pi-1"))
logging.getLogger("a").debug("not said")
logging.getLogger("a").info("%d", "no number")
warnings.warn("careful\\nnow")
{end}
"""


def lines_of(end: str) -> list[dict]:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(end=end)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment("logs"),
        check=False,
    )
    assert not ended.stdout
    return [json.loads(line) for line in ended.stderr.splitlines()]


def test_a_program_says_only_json_even_as_it_crashes():
    joined, odd, warned, crash = lines_of("raise KeyError('a\\nb')")
    assert (joined["event"], joined["client"], joined["message"]) == (
        "joined",
        "pi-1",
        "two\nlines",
    )
    assert "do not fit" in odd["message"]
    assert (warned["logger"], warned["event"]) == ("py.warnings", "log")
    assert (crash["event"], crash["level"]) == ("failed", "critical")
    assert "KeyError" in crash["exception"]


def test_the_trainer_logs_as_its_agent_does():
    child = (
        "import logging; from edge_sdk.helpers import logs; logs.set_up_trainer(); "
        "logging.getLogger('t').warning('from the trainer')"
    )
    *_, last = lines_of(f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}])")
    assert (last["logger"], last["message"]) == ("t", "from the trainer")


def test_every_event_that_is_logged_is_a_known_one():
    """mypy sees it too; here for calls in code that it does not check."""
    named = {
        call.args[0].value
        for folder in ("edge_sdk", "coordinator")
        for file in (ROOT / folder).rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "event"
        and isinstance(call.args[0], ast.Constant)
    }
    assert named
    assert named <= set(get_args(EventName))


def test_a_device_logs_json_to_its_last_line(tmp_path):
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "edge_sdk.cli",
            "run",
            "--log-json",
            "--insecure",
            "--id",
            "pi-1",
            "--coordinator",
            "tcp://127.0.0.1:1",
            "--data",
            str(tmp_path / "no\nwhere.npz"),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment("logs"),
        check=False,
    )
    lines = [json.loads(line) for line in ended.stderr.splitlines()]
    assert ended.returncode == 1
    assert (lines[0]["level"], lines[0]["event"]) == ("warning", "log")  # insecure
    assert (lines[-1]["event"], lines[-1]["level"]) == ("failed", "error")
    assert "where.npz" in lines[-1]["message"]


def test_the_documents_name_every_event():
    text = (ROOT / "docs" / "coordinator.md").read_text()
    assert [kind for kind in get_args(EventName) if f"`{kind}`" not in text] == []
