"""The stopwatch of a job's or round's phases."""

from __future__ import annotations

import pytest

from edge_sdk.protocol import timing
from edge_sdk.protocol.timing import Stopwatch


def test_times_of_a_phase_add_up(monkeypatch):
    # entered at 1 and 5 for 2 and 3 s, CPU 0.5 and 1 s; the other for 1 s in between
    moments = iter([(1, 0), (3, 0.5), (3, 0.5), (4, 0.6), (5, 1), (8, 2)])
    monkeypatch.setattr(timing, "clock", lambda: next(moments))
    watch = Stopwatch()
    for phase in ("fold", "fit", "fold"):
        with watch(phase):
            pass
    found = {name: (time.wall_s, time.cpu_s) for name, time in watch.phases.items()}
    assert found == {"fold": (5.0, 1.5), "fit": (1.0, pytest.approx(0.1))}


def test_what_was_not_entered_is_no_phase():
    assert Stopwatch().phases == {}
