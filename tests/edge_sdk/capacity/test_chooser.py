"""The choice of depth, without processes."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_sdk.capacity.chooser import Chooser
from edge_sdk.capacity.costs import Moment, SegmentCost
from edge_sdk.protocol.messages import Segment
from tests.support.agent import WHOLE
from tests.support.costs import COSTS, choose, cost, segments, welcome, with_memory


@pytest.mark.parametrize(
    ("mebibytes", "exit", "stages"),
    [
        (99, 0, ()),
        (100, 1, ()),
        (110, 1, (2,)),
        (120, 1, (2, 3)),
        (200, 2, (3,)),
        (299, 2, (3,)),
        (300, 3, ()),
    ],
)
def test_choice_by_memory(chooser, mebibytes, exit, stages):
    assert choose(chooser, mebibytes) == (exit, stages)


def test_choice_by_deadline(chooser):
    # 10 examples, 2 epochs, 10 GFLOP/s: 2 s to exit 1, 4 s to exit 2, 6 s to exit 3, 2 s a stage
    assert choose(chooser, 1000, deadline_s=6.0, epochs=2) == (3, ())
    assert choose(chooser, 1000, deadline_s=5.9, epochs=2) == (2, (3,))
    assert choose(chooser, 1000, deadline_s=1.9, epochs=2) == (0, ())
    assert "the deadline is 1.9 s" in chooser.choice.reason


def test_seconds_are_told_when_they_change(chooser):
    # as above: exit 1 in 2 s, a stage in 2 s
    assert choose(chooser, 120, deadline_s=4.0, epochs=2) == (1, (2, 3))
    assert (chooser.choice.prefix_s, chooser.choice.stage_s) == (2.0, (2.0, 2.0))
    longer = welcome(deadline_s=40.0, epochs=4)
    assert chooser.choose(with_memory(120), longer, num_examples=10)
    assert (chooser.choice.prefix_s, chooser.choice.stage_s) == (4.0, (4.0, 4.0))
    assert not chooser.choose(with_memory(120), longer, num_examples=10)


def test_features_are_kept_as_predicted(chooser):
    # stage 2 keeps 20 MiB beside the 120 of the model up to stage 3: 140; stage 3 keeps 5: 125
    kept = {2: 20 * 1024**2, 3: 5 * 1024**2}
    chooser.costs = tuple(
        replace(c, cache_bytes=kept[c.first]) if c.first > 1 else c for c in COSTS
    )
    assert chooser.cache_bytes(segments((2, 2))) == 0  # nothing chosen yet
    assert choose(chooser, 140) == (1, (2, 3))
    assert chooser.cache_bytes(segments((1, 1))) == 0
    assert chooser.cache_bytes(segments((1, 1), (2, 2))) == kept[2]
    assert chooser.cache_bytes(segments((3, 3))) == kept[3]
    assert chooser.cache_bytes(segments((2, 2), (3, 3))) == kept[2]
    assert choose(chooser, 139) == (1, (2, 3))
    assert chooser.cache_bytes(segments((1, 1), (2, 2))) == 0
    assert chooser.cache_bytes(segments((1, 1), (3, 3))) == kept[3]
    assert chooser.cache_bytes(segments((2, 2), (3, 3))) == 0  # those of stage 2 must not be kept


def test_choose_tells_whether_the_choice_changed(chooser):
    def told(mebibytes: float) -> bool:
        return bool(chooser.choose(with_memory(mebibytes), welcome(), num_examples=10))

    assert told(200)
    assert not told(250)
    assert told(300)
    assert told(110)
    assert told(120)  # the same exit, another stage


def test_nothing_is_chosen_before_the_costs_are_counted():
    chooser = Chooser()
    assert "has not chosen" in chooser.refusal(segments((1, 1)))
    assert choose(chooser, 1000) == (0, ())
    assert chooser.choice is not None
    assert chooser.choice.reason == "costs are not counted yet"
    assert "costs are not counted yet" in chooser.refusal(segments((1, 1)))


def test_prefix_that_failed_is_not_tried_until_memory_grows(chooser):
    assert choose(chooser, 400) == (3, ())
    line = chooser.note_failure(segments((1, 3)), 400 * 1024**2)
    assert line == (
        "training stages 1-3 failed for memory, predicted 300.0 MiB; at most 270.0 MiB from now on"
    )
    assert choose(chooser, 400) == (2, (3,))  # stage 3 alone takes 120
    assert chooser.choice.reason.endswith("; more than 270.0 MiB failed here before")
    assert choose(chooser, 500) == (2, (3,))  # 1.25 times 400 is not more than that
    assert choose(chooser, 501) == (3, ())
    assert choose(chooser, 400) == (3, ())  # forgotten


def test_every_failure_takes_one_exit_more(chooser):
    # exit 1 first beside the weights of stage 3, 120 in all, then without
    for exit, stages in [(3, ()), (2, (3,)), (1, (2, 3)), (1, ())]:
        assert choose(chooser, 400) == (exit, stages)
        chooser.note_failure(segments((1, exit)), 400 * 1024**2)
    assert choose(chooser, 400) == (0, ())
    assert "needs 100.0 MiB, 90.0 MiB available" in chooser.choice.reason
    assert choose(chooser, 501) == (3, ())


def test_stage_that_failed_leaves_what_takes_less(chooser):
    assert choose(chooser, 120) == (1, (2, 3))
    chooser.note_failure(segments((1, 1), (3, 3)), 120 * 1024**2)  # 120, so 108 from now on
    assert choose(chooser, 120) == (1, ())
    assert chooser.choice.stage_s == ()
    assert choose(chooser, 151) == (1, (2, 3))


def with_levers(first: int, last: int, saved_mebibytes: int) -> SegmentCost:
    """100 MiB of parameters, so many saved for a batch of 32; a fifth of it, and half as many
    operations again, where stages are run again."""
    saved = saved_mebibytes * 1024**2
    return replace(
        cost(first, last, 100),
        batch_size=32,
        recompute_flops_per_example=0.5e9,
        moments=(Moment(example_bytes=saved / 32),),
        recompute_moments=(Moment(example_bytes=saved / 5 / 32),),
    )


@pytest.mark.parametrize(
    ("mebibytes", "micro_batch", "recompute"),
    [
        (390, 0, False),  # 100 + 1.45 * 200
        (389, 16, False),  # 100 + 145
        (244, 8, False),  # 100 + 72.5
        (172, 0, True),  # 100 + 1.45 * 40
        (157, 16, True),  # 100 + 29
        (115, 8, True),  # 100 + 14.5
    ],
)
def test_levers_in_order(chooser, mebibytes, micro_batch, recompute):
    chooser.costs = (with_levers(1, 1, 200),)
    assert choose(chooser, mebibytes) == (1, ())
    plan = replace(WHOLE, segments=(Segment(first=1, last=1),))
    adapted = chooser.adapted(plan)
    assert (adapted.micro_batch, adapted.recompute) == (micro_batch, recompute)
    assert replace(adapted, micro_batch=0, recompute=False) == plan


def test_a_job_takes_the_levers_of_its_neediest_segment(chooser):
    chooser.costs = (with_levers(1, 1, 10), with_levers(2, 2, 200))
    assert choose(chooser, 250) == (1, (2,))
    both = replace(WHOLE, segments=tuple(segments((1, 1), (2, 2))))
    assert chooser.adapted(both).micro_batch == 16
    alone = replace(WHOLE, segments=tuple(segments((1, 1))), micro_batch=12, recompute=True)
    assert chooser.adapted(alone) == alone  # the coordinator's own


def test_a_failure_pulls_the_next_lever_first(chooser):
    chooser.costs = (with_levers(1, 1, 200),)
    plan = replace(WHOLE, segments=(Segment(first=1, last=1),))
    found = []
    while choose(chooser, 400)[0]:
        adapted = chooser.adapted(plan)
        found.append((adapted.micro_batch, adapted.recompute))
        chooser.note_failure(plan.segments, 400 * 1024**2)
    # at most 0.9 of what failed: 390, 245, 172.5, (158 is more than 155) 129, 114.5
    assert found == [(0, False), (16, False), (8, False), (16, True), (8, True)]


def test_levers_cost_time(chooser):
    # 10 examples, 10 GFLOP/s: 1 s, with half as many operations again 1.5 s
    chooser.costs = (with_levers(1, 1, 200),)
    assert choose(chooser, 172, deadline_s=1.5) == (1, ())
    assert choose(chooser, 172, deadline_s=1.4) == (0, ())
    assert "takes 1.5 s (stages run again), the deadline is 1.4 s" in chooser.choice.reason


@pytest.mark.parametrize(
    ("asked", "is_refused"),
    [
        ([(1, 1)], False),
        ([(1, 2)], False),
        ([(2, 2)], False),  # within the prefix, alone
        ([(3, 3)], False),  # one of its stages
        ([(1, 2), (3, 3)], False),
        ([(1, 3)], True),
        ([(2, 3)], True),
        ([(1, 2), (4, 4)], True),
    ],
)
def test_refusal_of_what_is_more_than_chosen(chooser, asked, is_refused):
    assert choose(chooser, 200) == (2, (3,))
    refusal = chooser.refusal(segments(*asked))
    assert bool(refusal) == is_refused
    if is_refused:
        assert "this device trains up to exit 2 and stages [3] alone: exit 3 needs" in refusal


def test_a_job_of_more_than_a_day_is_none(chooser):
    """Prefix 1 takes 10 examples x 1 GFLOP at 10 GFLOPS, a second an epoch."""
    assert choose(chooser, 400, epochs=28_800) == (3, ())
    exit, _ = choose(chooser, 400, epochs=28_801)  # three times that
    assert exit == 2
    assert "takes 86403.0 s, the deadline is 86400.0 s" in chooser.choice.reason
    assert choose(chooser, 400, epochs=86_401)[0] == 0
    assert choose(chooser, 400, epochs=86_401, deadline_s=1e9)[0] == 0
