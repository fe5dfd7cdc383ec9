"""How much a peer may say: by hand, with a clock that is set."""

from __future__ import annotations

from types import SimpleNamespace

from coordinator.links.rate_limit import (
    LEAST_KEPT,
    MOST_DROPPED,
    MOST_REFUSED,
    OUT_S,
    RateLimits,
    Repeats,
    cost_of,
    earned_by,
)
from edge_sdk.protocol.messages import (
    MAX_TENSORS,
    Fetch,
    Heartbeat,
    Job,
    ModelSpec,
    Part,
    Plan,
    Segment,
    TensorSpec,
)

MODEL = ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=3, exit=1)
SPEC = TensorSpec(name="w", shape=(1,), dtype="float32")


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def frames(*sizes: int) -> list:
    """A route, and frames of so many bytes."""
    return [SimpleNamespace(buffer=bytes(size)) for size in (5, *sizes)]


def test_a_bucket_is_emptied_and_fills_again():
    clock = Clock()
    limits = RateLimits(rate=2.0, burst=10.0, clock=clock)
    assert [limits.take("a", 4) for _ in range(3)] == ["hear", "hear", "warn"]  # 10 - 4 - 4 = 2
    assert limits.take("a", 3) == "drop"
    clock.now_s += 0.5  # one more: 3
    assert limits.take("a", 3) == "hear"
    clock.now_s += 60.0  # not more than 10
    assert [limits.take("a", 6) for _ in range(2)] == ["hear", "warn"]


def test_buckets_are_apart():
    limits = RateLimits(rate=1.0, burst=5.0, clock=Clock())
    assert limits.take("a", 5) == "hear"
    assert limits.take("a", 1) == "warn"
    assert limits.take("b", 5) == "hear"


def test_who_goes_on_is_out_for_a_while():
    clock = Clock()
    limits = RateLimits(rate=1.0, burst=1.0, clock=clock)
    verdicts = [limits.take("a", 1) for _ in range(MOST_DROPPED + 3)]
    assert verdicts == ["hear", "warn", *["drop"] * (MOST_DROPPED - 1), "end", "out"]
    assert limits.is_out("a")
    assert not limits.is_out("b")
    clock.now_s += OUT_S
    assert not limits.is_out("a")
    assert limits.take("a", 1) == "hear"


def test_one_good_frame_ends_a_row_of_bad_ones():
    limits = RateLimits(clock=Clock())
    for _ in range(3):
        assert {limits.note_frame("a", is_refused=True) for _ in range(MOST_REFUSED)} == {"hear"}
        limits.note_frame("a", is_refused=False)
    verdicts = [limits.note_frame("a", is_refused=True) for _ in range(MOST_REFUSED + 1)]
    assert verdicts[-1] == "end"
    assert limits.is_out("a")


def test_a_message_costs_its_size():
    assert cost_of(frames(10)) == 1
    assert cost_of(frames(10 * 1024)) == 11
    assert cost_of(frames(20, 512 * 1024)) == 1  # a part's bytes are asked for
    assert cost_of(frames(20, 5, 5, 5)) == 3  # nothing has so many frames
    assert cost_of(frames()) == 1


def test_what_is_asked_for_is_paid_for():
    job = Job(
        id="0" * 32,
        round=1,
        model=MODEL,
        plan=Plan(segments=(Segment(first=1, last=1),)),
        tensors=(SPEC,) * 100,
        deadline_s=0.0,
    )
    assert earned_by(job) == 8 + 25
    assert earned_by(Fetch(round=1, have=0, first=0, count=8)) == 9
    assert earned_by(Part(round=1, index=0)) == 2
    assert earned_by(Heartbeat()) == 0  # an answer to a flood is none


def test_a_quick_link_is_not_held_up():
    """A gigabyte in no time, down and up: 2048 parts, and a fetch after each."""
    limits = RateLimits(clock=Clock())
    for index in range(2048):
        limits.earn("a", Part(round=1, index=index))
        assert limits.take("a", 1) == "hear"
    for index in range(0, 2048, 8):
        limits.earn("a", Fetch(round=1, have=index, first=index, count=8))
        assert {limits.take("a", 1) for _ in range(8)} == {"hear"}


def test_what_is_saved_up_has_an_end():
    limits = RateLimits(rate=1.0, burst=10.0, clock=Clock())
    for _ in range(50):
        limits.earn("a", Part(round=1, index=0))
    assert [limits.take("a", 10) for _ in range(3)] == ["hear", "hear", "warn"]


def test_the_largest_update_is_heard_from_a_new_peer():
    """As after a restart of the coordinator: nothing was earned yet."""
    assert RateLimits(clock=Clock()).take("a", cost_of(frames(1024**2))) == "hear"
    assert MAX_TENSORS == 10_000


def test_a_fleet_that_comes_back_at_once_is_heard():
    """1,000 devices after an hour in which the coordinator did not listen: 720 heartbeats each,
    then hello and ready."""
    limits = RateLimits(clock=Clock())
    for device in range(1000):
        assert {limits.take(device, 1) for _ in range(722)} == {"hear"}


def test_those_who_left_are_forgotten_but_not_those_who_are_out():
    clock = Clock()
    limits = RateLimits(rate=1.0, burst=1.0, clock=clock)
    for _ in range(MOST_DROPPED + 2):
        limits.take("bad", 1)
    for device in range(LEAST_KEPT - 1):
        limits.take(device, 1)
    clock.now_s += 2.0
    limits.take("new", 1)
    assert set(limits._peers) == {"bad", "new"}
    assert limits.is_out("bad")


def test_like_lines_are_counted():
    clock = Clock()
    repeats = Repeats(most=2, seconds=60.0, clock=clock)
    assert [repeats.note("fault", "a") for _ in range(5)] == ["", "", None, None, None]
    assert repeats.note("fault", "b") == ""
    assert repeats.note("ready", "a") == ""
    clock.now_s += 61.0
    assert repeats.note("fault", "a") == " (3 more like it in 61 s)"
    assert repeats.note("fault", "a") == ""
    clock.now_s += 61.0
    assert repeats.note("fault", "a") == ""
