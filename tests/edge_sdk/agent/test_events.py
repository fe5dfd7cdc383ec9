"""The device's log: one line for each event, and few for what is said again and again."""

from __future__ import annotations

import logging

from edge_sdk.agent.events import Event, EventLog, failed, lost

log = logging.getLogger(__name__)


def test_what_a_coordinator_says_again_and_again_is_one_line_and_a_count(caplog):
    caplog.set_level(logging.INFO)
    now, heard = [5.0], list[Event]()
    tell = EventLog(log, heard.append, clock=lambda: now[0])
    bye = lost("coordinator: bye", logging.INFO)
    duplicate = failed("coordinator: duplicate: a key of its own", "duplicate")
    for _ in range(100):  # by turns
        tell(bye)
        tell(duplicate)
    assert caplog.messages == [bye.detail, duplicate.detail]
    assert len(heard) == 200  # the program hears all
    now[0] += 9.9
    tell(bye)
    assert len(caplog.messages) == 2
    now[0] += 0.2
    tell(bye)
    assert caplog.messages[2:] == ["coordinator: bye (100 more like it since)"]
    now[0] += 11.0
    tell(bye)
    assert caplog.messages[3:] == ["coordinator: bye"]


def test_other_lines_are_all_written(caplog):
    caplog.set_level(logging.INFO)
    tell = EventLog(log, None, clock=lambda: 0.0)
    for round in (1, 2):
        tell(failed("training failed: no memory", "capacity", round))
        for _ in range(2):
            tell(Event("accepted", "update accepted", round))
    assert len(caplog.messages) == 6
