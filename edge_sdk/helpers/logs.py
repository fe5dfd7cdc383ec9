"""Logs for people, or with --log-json for programs: one JSON object per line on stderr.

A line says `event`, one of Kind or "log" where a program has no more to know than the message, and
its fields: log.info("pi-1 joined", extra=event("joined", client="pi-1")). What a peer sent cannot
break a line: JSON is written in ASCII, so every line break in it is an escape. Secrets stay out:
keys are bytes in this code, and bytes are shown by their number only, as are fields that are named
like one. Imports nothing heavy: the agent logs too."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
from datetime import datetime, timezone
from types import TracebackType
from typing import Any, Literal, TypeAlias

log = logging.getLogger(__name__)
OfLink: TypeAlias = Literal[  # a device's, to the coordinator
    "joined", "back", "gone", "ready", "duplicate", "refused", "stranger", "fault"
]
OfRound: TypeAlias = Literal[
    "round_opened", "round_closed", "update_accepted", "update_late", "update_failed"
]
OfRun: TypeAlias = Literal["started", "waiting", "finished", "stopped", "failed", "status_lost"]
# Of a device's own log, besides ready, finished and failed: events.py.
OfDevice: TypeAlias = Literal["connected", "chosen", "job", "trained", "accepted", "lost", "ended"]
EventName: TypeAlias = Literal[OfLink, OfRound, OfRun, OfDevice]
Field: TypeAlias = str | float | None
JSON_VARIABLE = "EDGE_SDK_LOG_JSON"  # set for the trainer, which writes to the agent's stderr
FIXED = ("ts", "level", "logger", "event", "message", "exception")
_SECRET = re.compile("secret|token|password|private", re.IGNORECASE)
_BYTES = (bytes, bytearray, memoryview)
_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
_CLASHING = _OF_EVERY_RECORD.union(FIXED)


def event(
    kind: EventName,
    *,
    client: str | None = None,
    round: int | None = None,
    code: str | None = None,
    **figures: Field,
) -> dict[str, Field]:
    """For `extra=` of a line of log, without None. Raises ValueError for a field of every line."""
    if clashing := _CLASHING.intersection(figures):
        raise ValueError(f"a line of log has {sorted(clashing)} already; name these otherwise")
    given = {"event": kind, "client": client, "round": round, "code": code, **figures}
    return {name: value for name, value in given.items() if value is not None}


class JsonFormatter(logging.Formatter):
    """One line per record: ts (UTC, ISO 8601), level, logger, event, message, then its fields."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc)
        line: dict[str, Any] = {
            "ts": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": _plain(getattr(record, "event", "log")),
            "message": _plain(_message(record)),
        }
        for name, value in vars(record).items():
            if name not in _CLASHING:
                line[_plain(name)] = "[secret]" if _SECRET.search(name) else _plain(value)
        if record.exc_info:
            line["exception"] = _plain(self.formatException(record.exc_info))
        return json.dumps(line, allow_nan=False)


def set_up(*, is_json: bool, is_debug: bool, form: str) -> None:
    """Begin to log on stderr. form: of a line for people, in logging's %-style. With is_json what
    ends the program, and Python's own warnings, become lines of log as well."""
    level = logging.DEBUG if is_debug else logging.INFO
    if not is_json:
        logging.basicConfig(level=level, format=form)
        return
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(True)
    sys.excepthook = _log_crash
    os.environ[JSON_VARIABLE] = "1"


def set_up_trainer() -> None:
    """Begin to log in a trainer as the agent that started it does; lines for people stay bare."""
    if os.environ.get(JSON_VARIABLE):
        set_up(is_json=True, is_debug=False, form="")


def last_words(program: str, error: Exception) -> None:
    """Write why the program ends, as its last line."""
    if os.environ.get(JSON_VARIABLE):
        log.error("%s", error, extra=event("failed", code=getattr(error, "code", None)))
    else:
        print(f"{program}: {error}", file=sys.stderr)


def _log_crash(
    kind: type[BaseException], error: BaseException, where: TracebackType | None
) -> None:
    info = (kind, error, where)
    log.critical("ended by %s: %s", kind.__name__, error, exc_info=info, extra=event("failed"))


def _message(record: logging.LogRecord) -> str:
    """The record's message. Arguments that do not fit it are said so in one line; logging itself
    would write a traceback."""
    arguments = record.args
    if isinstance(arguments, tuple):
        record.args = tuple(f"[{len(a)} bytes]" if isinstance(a, _BYTES) else a for a in arguments)
    try:
        return record.getMessage()
    except Exception as error:
        return f"{record.msg} [its arguments do not fit: {type(error).__name__}]"
    finally:
        record.args = arguments


def _plain(value: object) -> Any:
    """The value as JSON can say it; numbers that are not finite and all else become text."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, _BYTES):
        return f"[{len(value)} bytes]"
    try:
        text = str(value)
    except Exception as error:
        text = f"[{type(value).__name__} that does not print: {type(error).__name__}]"
    return text.encode("utf-8", "backslashreplace").decode()  # halves of a pair are no text
