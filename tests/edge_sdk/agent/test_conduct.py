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
