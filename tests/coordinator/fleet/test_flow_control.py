"""Who may have how many parts under way: the budget holds whatever happens, and nobody starves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.fleet import flow_control as flow_control_module
from coordinator.fleet.flow_control import LINK_S, SLOW_WINDOW, WINDOW, Budget, LinkRate
from edge_sdk.protocol.stream import PART_BYTES

NAMES = "abcdef"
SLOW = "abc"  # whose links are
EVENTS = st.one_of(
    st.tuples(st.just("ask"), st.sampled_from(NAMES), st.just(0)),
    st.tuples(st.just("next"), st.just(""), st.integers(1, 12)),  # takes at most so many
    st.tuples(st.just("arrived"), st.sampled_from(NAMES), st.integers(0, 9)),
    st.tuples(st.just("drop"), st.sampled_from(NAMES), st.just(0)),
)


@given(st.integers(0, 20), st.lists(EVENTS, max_size=60))
def test_budget_holds_whatever_happens(budget_parts, events):
    budget = Budget(budget_parts * PART_BYTES)
    most = max(2, budget_parts)
    held: dict[str, int] = {}
    waiting: set[str] = set()
    for event, name, count in events:
        if event == "ask":
            budget.ask(name, name in SLOW)
            waiting.add(name)
        elif event == "drop":
            budget.drop(name)
            held.pop(name, None)
            waiting.discard(name)
        elif event == "arrived":
            budget.release(name, count)
            held[name] = max(0, held.get(name, 0) - count)
        elif turn := budget.next():
            who, may = turn
            waiting.remove(who)  # nobody gets a turn who has not asked, or twice
            taken = min(may, count)
            assert taken >= 1
            budget.take(who, taken, who in SLOW)
            held[who] = held.get(who, 0) + taken
        else:  # nobody waits, or nothing is left for those who do
            slow_only = waiting <= set(SLOW)
            assert not waiting or sum(held.values()) == most or slow_only
        used = sum(held.values())
        assert budget.bytes_under_way == used * PART_BYTES
        assert used <= most
        assert sum(held.get(name, 0) for name in SLOW) <= most // 2
        assert {name: budget.held(name) for name in NAMES} == {n: held.get(n, 0) for n in NAMES}
        assert sorted(budget.holders()) == sorted(name for name in held if held[name])


def test_what_arrived_is_free_and_the_rest_is_not():
    budget = Budget(8 * PART_BYTES)
    budget.take("a", 5, False)
    budget.release("a", 2)
    assert (budget.held("a"), budget.bytes_under_way) == (3, 3 * PART_BYTES)
    budget.release("a", 9)  # more than it had
    assert (budget.held("a"), budget.bytes_under_way) == (0, 0)
    assert budget.holders() == []


def turns(budget: Budget) -> list[tuple[str, int]]:
    found = []
    while turn := budget.next():
        found.append(turn)
    return found


def test_transfers_that_have_begun_go_first():
    budget = Budget(8 * PART_BYTES)
    budget.take("late", 1, False)
    budget.ask("new", False)
    budget.ask("late", False)
    assert budget.next() == ("late", 7)
    assert budget.next() == ("new", 7)
    budget.drop("late")  # its transfer is over, the next one is new
    budget.ask("other", False)
    budget.ask("late", False)
    assert turns(budget) == [("other", 8), ("late", 8)]


def test_turns_come_in_the_order_of_asking():
    budget = Budget(8 * PART_BYTES)
    for name in ("c", "a", "b", "a", "c"):  # asking twice changes nothing
        budget.ask(name, False)
    assert turns(budget) == [("c", 8), ("a", 8), ("b", 8)]


def test_slow_links_get_half_and_leave_the_rest_to_others():
    budget = Budget(8 * PART_BYTES)
    for name in ("slow", "slower"):
        budget.ask(name, True)
    budget.ask("quick", False)
    assert budget.next() == ("slow", 4)
    budget.take("slow", 3, True)
    assert budget.next() == ("slower", 1)
    budget.take("slower", 1, True)
    budget.ask("slow", True)  # waits, though half the budget is free
    assert budget.next() == ("quick", 4)
    budget.take("quick", 4, False)
    assert budget.next() is None
    budget.release("slower", 1)
    assert budget.next() == ("slow", 1)


def test_what_is_dropped_is_free_and_waits_no_more():
    budget = Budget(2 * PART_BYTES)
    budget.ask("a", False)
    assert budget.next() == ("a", 2)
    budget.take("a", 2, False)
    budget.ask("a", False)
    budget.ask("b", False)
    assert budget.next() is None
    budget.drop("a")
    assert budget.bytes_under_way == 0
    assert turns(budget) == [("b", 2)]
    budget.drop("nobody")


def test_all_of_a_clients_parts_are_on_one_side():
    """A link that turns out to be slow moves what it holds to that side."""
    budget = Budget(8 * PART_BYTES)
    budget.take("a", 2, False)
    budget.take("a", 1, True)
    budget.ask("b", True)
    assert budget.next() == ("b", 1)  # 4 of 8 for slow ones, 3 are a's
    assert budget.held("a") == 3


# -- pace --------------------------------------------------------------------------------------


def test_pace_is_the_mean_of_times():
    link_rate = LinkRate()
    link_rate.note_moved(1000, 1.0)
    assert link_rate.rate == pytest.approx(1000.0)
    link_rate.note_moved(1000, 4.0)  # 0.7 * 1 ms + 0.3 * 4 ms = 1.9 ms a byte
    assert link_rate.rate == pytest.approx(1000 / 1.9)
    link_rate.note_moved(1000, 0.0)  # in a burst: 0.7 * 1.9 ms
    assert link_rate.rate == pytest.approx(1000 / 1.33, rel=1e-3)


def test_window_follows_the_pace():
    link_rate = LinkRate()
    assert (link_rate.is_slow, link_rate.window) == (False, SLOW_WINDOW)  # not known yet
    link_rate.note_moved(PART_BYTES, 0.5)
    assert (link_rate.is_slow, link_rate.window) == (False, WINDOW)
    slow = LinkRate()
    slow.note_moved(PART_BYTES, 2.0)
    assert (slow.is_slow, slow.window) == (True, SLOW_WINDOW)


def test_patience_follows_the_pace(monkeypatch):
    link_rate = LinkRate()
    # LINK_S + 4 * 2^19 bytes / 2^14 bytes a second = 128 s more
    assert link_rate.patience_s(PART_BYTES) == LINK_S + 128.0
    link_rate.note_moved(PART_BYTES, 10.0)
    assert link_rate.patience_s(2 * PART_BYTES) == pytest.approx(LINK_S + 80.0)
    link_rate.halve()  # 52 KB/s was its pace: it is taken for one that was not measured
    assert link_rate.patience_s(2 * PART_BYTES) == pytest.approx(LINK_S + 256.0)
    link_rate.halve()
    assert link_rate.patience_s(2 * PART_BYTES) == pytest.approx(LINK_S + 512.0)
    quick = LinkRate()
    quick.note_moved(PART_BYTES, 0.01)
    # 2^19 bytes at 2^13 bytes a second, to which it may fall
    assert quick.patience_s(8 * PART_BYTES) == LINK_S + 64.0
    fresh = LinkRate()
    fresh.halve()  # never measured: half of what it was taken for
    assert fresh.rate == flow_control_module.UNKNOWN_RATE / 2
