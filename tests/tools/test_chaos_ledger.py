"""The books of the chaos suite: each thing that may not happen is seen."""

from __future__ import annotations

import pytest

from tests.chaos.faults import KINDS, drawn
from tests.chaos.ledger import Row, judged

LOGS = {
    "a": "12:00 INFO round 1: trained, sending the update\n12:01 INFO round 1: update accepted\n",
    "b": "12:00 INFO round 1: trained, sending the update\n",
}
A = Row(1, "a", "ok", "", "aa", "1-2")
B_LATE = Row(1, "b", "failed", "gone", "", "1-1")


def problems(logs=LOGS, rows=(A, B_LATE), last_round=2, owners=(1, 1)):
    return judged(logs, rows, last_round, owners).problems


def test_good_books():
    assert problems() == []


@pytest.mark.parametrize("first", ["trained, sending the update", "a line of nothing"])
def test_what_a_device_trained_before_its_start_is_one_training(first):
    """Whether it had told so or was killed before."""
    after = "12:01 INFO round 1: trained before this start, sending the update\n"
    logs = LOGS | {"b": f"12:00 INFO round 1: {first}\n{after}{after}"}
    ledger = judged(logs, (A, B_LATE), 2, (1, 1))
    assert ledger.problems == []
    assert ledger.trained == {(1, "a"): 1, (1, "b"): 1}


def test_a_late_update_is_named_in_its_round_and_counted_in_another():
    again = Row(1, "b", "ok", "", "bb", "1-1")  # of round 2, staleness 1: its job was round 1's
    assert problems(rows=(A, B_LATE, again), owners=(2, 1)) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"rows": (B_LATE,), "owners": (0, 0)}, "a was told 'accepted', the database has nothing"),
        ({"rows": (A,)}, "b trained, and nothing says what became of it"),
        ({"rows": (A, A, B_LATE), "owners": (2, 2)}, "a is counted 2 times"),
        ({"rows": (A, A, B_LATE), "owners": (2, 2)}, "digest aa is counted 2 times"),
        ({"logs": {"b": LOGS["b"]}}, "a is counted, but never said that it had trained"),
        ({"owners": (2, 1)}, "the model holds [2, 1] updates by stage, the database [1, 1]"),
        ({"owners": (0, 0)}, "the model holds [0, 0] updates by stage, the database [1, 1]"),
    ],
)
def test_bad_books(changed, words):
    assert any(words in line for line in problems(**changed)), problems(**changed)


def test_a_round_that_is_not_committed_is_not_judged():
    assert problems(rows=(), last_round=0, owners=(0, 0)) == []


def test_faults_follow_from_the_seed():
    assert drawn(50, 1, 6.0) == drawn(50, 1, 6.0)
    assert drawn(50, 1, 6.0) != drawn(50, 2, 6.0)
    assert {fault.kind for fault in drawn(200, 1, 6.0)} == set(KINDS)
