"""When a job is given up. Times are the test's own."""

from __future__ import annotations

import pytest

from edge_sdk.agent.job_watch import UNPREDICTED_S, JobWatch, limit_s
from edge_sdk.agent.pipe import Progress
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.training.segment import num_batches
from edge_sdk.training.trainer import train
from tests.support.examples import cnn, examples


@pytest.mark.parametrize(
    ("predicted_s", "deadline_s", "limit"),
    [
        (100.0, 0.0, 1000.0),
        (100.0, 300.0, 1000.0),
        (300.0, 100.0, 1000.0),
        (0.0, 90.0, 900.0),
        (1.0, 0.0, 600.0),  # a minute is the least that counts as predicted
        (1.0, 1e-300, 600.0),
        (0.0, 0.0, UNPREDICTED_S),
    ],
)
def test_limits(predicted_s, deadline_s, limit):
    assert limit_s(predicted_s, deadline_s) == limit


def progress(batches: int, epochs: int = 0) -> Progress:
    return Progress(round=1, batches=batches, total=100, epochs=epochs)


@pytest.mark.parametrize(
    ("batches", "most_s"),
    [(0, 1000.0), (50, 1500.0), (100, 2000.0), (150, 2000.0)],  # a cache's chunks count, too
)
def test_steps_done_stretch_the_time(batches, most_s):
    watch = JobWatch(predicted_s=100.0, began=5.0, last=progress(batches))
    assert watch.why_ended(5.0 + most_s) is None
    ended = watch.why_ended(5.1 + most_s)
    assert ended is not None
    assert ended[0] == "trainer"
    assert f"{batches} of 100 batches done: predicted were 100 s" in ended[1]


def test_a_board_at_a_third_of_its_clock_and_a_prediction_off_by_two_ends_in_time():
    watch = JobWatch(predicted_s=100.0, began=0.0)
    for batch in range(101):  # 600 s instead of 100, and six times more towards the end
        watch.last = progress(batch)
        now = 6.0 * batch if batch < 90 else 540 + 36.0 * (batch - 90)
        assert watch.why_ended(now) is None


def test_parts_on_a_slow_link_take_as_long_as_they_take():
    assert JobWatch(predicted_s=100.0).why_ended(1e9) is None


def test_conditions_end_a_job_at_its_epochs_end():
    watch = JobWatch(began=0.0, last=progress(30, epochs=3))
    watch.note_conditions("CPU is at 99 °C")
    assert watch.why_ended(1.0) is None
    watch.last = progress(39, epochs=3)
    watch.note_conditions("CPU is at 98 °C")
    assert watch.why_ended(1.0) is None
    watch.last = progress(41, epochs=4)
    assert watch.why_ended(1.0) == ("conditions", "ended after 4 epochs: CPU is at 98 °C")


def test_conditions_that_pass_end_nothing_and_before_training_at_once():
    watch = JobWatch(began=0.0, last=progress(30, epochs=3))
    watch.note_conditions("CPU is at 99 °C")
    watch.note_conditions("")
    watch.last = progress(41, epochs=4)
    assert watch.why_ended(1.0) is None
    waiting = JobWatch()
    waiting.note_conditions("CPU is at 99 °C")
    assert waiting.why_ended(1.0) == ("conditions", "ended after 0 epochs: CPU is at 99 °C")


@pytest.mark.parametrize(
    ("examples", "batch_size", "micro_batch", "epochs", "segments", "batches"),
    [
        (24, 8, 0, 1, 1, 3),
        (25, 8, 0, 1, 1, 3),  # a rest of one is left out
        (27, 8, 0, 2, 1, 8),
        (27, 8, 4, 1, 1, 7),  # 2 + 2 + 2 parts, and a rest of three
        (27, 8, 5, 10, 2, 140),
        (5, 8, 0, 1, 3, 3),
    ],
)
def test_batches_of_a_job(examples, batch_size, micro_batch, epochs, segments, batches):
    parts = tuple(Segment(first=n, last=n) for n in range(1, segments + 1))
    plan = Plan(segments=parts, epochs=epochs, batch_size=batch_size, micro_batch=micro_batch)
    assert num_batches(plan, examples) == batches


@pytest.mark.parametrize(("micro_batch", "batches"), [(0, 16), (4, 28)])
def test_what_a_job_counts_of_itself(micro_batch, batches):
    """27 examples in batches of 8: 3 and a rest of 3 make 4 batches, or 7 parts, an epoch."""
    parts = (Segment(first=1, last=1), Segment(first=1 + 1, last=3))
    plan = Plan(segments=parts, epochs=2, batch_size=8, micro_batch=micro_batch)
    asked, epochs = [], []
    train(
        cnn(),
        plan,
        initial_tensors(cnn(), 0),
        examples(27),
        cache_bytes=0,  # whose chunks would be asked about, too
        should_stop=lambda: bool(asked.append(1)),
        note_epoch=lambda: epochs.append(len(asked)),
    )
    assert len(asked) == batches == num_batches(plan, 27)
    assert epochs == [batches // 4 * n for n in (1, 2, 3, 4)]
