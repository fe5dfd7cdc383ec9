"""The credit of a coordinator: what uses it up, and what never does. Times are the test's own."""

from __future__ import annotations

from edge_sdk.agent.conduct import CREDIT, MOST_AWAITED, Conduct


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_was_asked_for_costs_nothing(caplog):
    conduct = Conduct("tcp://there:1", Clock())
    for _ in range(1000):
        conduct.expect("heartbeat")
        conduct.note("heartbeat")
    assert not conduct.is_exhausted
    assert (conduct.in_words(), caplog.messages) == ("", [])


def test_a_coordinator_that_falls_silent_is_told_and_one_that_is_back(caplog):
    clock = Clock()
    conduct = Conduct("there", clock)

    def beat(until_s: float, heard_at: float | None = None) -> None:
        """A heartbeat every 5 s, each answered at once, or nothing heard since heard_at."""
        while clock.now < until_s:
            clock.now += 5
            conduct.await_heartbeat(True, clock.now if heard_at is None else heard_at)

    beat(100)
    assert not caplog.messages
    beat(125, heard_at=100)
    assert not caplog.messages
    beat(155, heard_at=100)
    assert len(caplog.messages) == 1
    assert "coordinator there has said nothing for 30 s" in caplog.messages[0]
    beat(195, heard_at=100)
    assert "for 60 s" in caplog.messages[1]
    beat(300)
    assert caplog.messages[2:] == ["coordinator there answers again"]


def test_heartbeats_that_are_wanted_seldom_are_no_silence(caplog):
    clock = Clock()
    conduct = Conduct("there", clock)
    for _ in range(5):
        clock.now += 60
        conduct.await_heartbeat(True, clock.now - 60)
    assert not caplog.messages


def test_a_flood_is_told_once_and_ends(caplog):
    conduct = Conduct("tcp://there:1", Clock())
    for _ in range(int(CREDIT)):
        conduct.note("part")
    assert not conduct.is_exhausted
    conduct.note("bye", "of nothing")
    assert conduct.is_exhausted
    assert conduct.in_words() == "200 x part, 1 x bye"
    assert caplog.messages == [
        f"coordinator tcp://there:1: a {kind} that nobody asked for{detail}; more of them are only "
        "counted"
        for kind, detail in (("part", ""), ("bye", ": of nothing"))
    ]
    conduct.begin_anew()
    assert not conduct.is_exhausted
    assert conduct.in_words() == ""


def test_credit_comes_back_with_time_and_is_bounded():
    clock = Clock()
    conduct = Conduct("there", clock)
    for _ in range(1000):  # two a second, for ever
        conduct.charge("fault")
        clock.now += 0.5
    assert not conduct.is_exhausted
    clock.now += 1e6
    conduct.charge("fault", int(CREDIT))
    assert not conduct.is_exhausted
    conduct.charge("fault")
    assert conduct.is_exhausted


def test_jobs_that_are_trained_cost_nothing():
    conduct = Conduct("there", Clock())
    for _ in range(1000):
        conduct.charge("job")
        conduct.repay("job")
    conduct.repay("job")  # of a start before
    conduct.charge("job", int(CREDIT))
    assert not conduct.is_exhausted
    conduct.charge("job")
    assert conduct.is_exhausted


def test_answers_that_never_came_buy_no_flood():
    conduct = Conduct("there", Clock())
    conduct.expect("heartbeat", 10**9)
    for _ in range(MOST_AWAITED + int(CREDIT)):
        conduct.note("heartbeat")
    assert not conduct.is_exhausted
    conduct.note("heartbeat")
    assert conduct.is_exhausted
