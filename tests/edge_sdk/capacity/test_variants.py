"""Several models to choose among: what they cost, and the largest that fits."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_sdk.capacity.choice import choose_variant
from edge_sdk.capacity.chooser import Chooser
from edge_sdk.capacity.costs import least_bytes, peak_bytes
from edge_sdk.capacity.counting import each_variant_cost, segment_costs
from edge_sdk.capacity.counting_apart import segment_costs_apart
from edge_sdk.errors import CapacityError, ConfigError
from edge_sdk.models import build
from edge_sdk.protocol.messages import Ready, Segment
from edge_sdk.protocol.tensors import specs_of
from tests.support.agent import MODEL, WHOLE
from tests.support.costs import cost, segments, welcome, with_memory
from tests.support.devices import PROFILE

VARIANTS = tuple(replace(MODEL, width=width) for width in (0.25, 0.5, 1.0))
OFFER = replace(welcome(), variants=VARIANTS)
# 100, 200 and 300 MiB, 1, 2 and 3 s for an epoch of 10 examples
COSTS = tuple(replace(cost(1, 3, 100 * n, n * 1e9), num_weights=10 * n) for n in (1, 2, 3))


@pytest.fixture
def chooser() -> Chooser:
    made = Chooser(VARIANTS)
    made.set_costs(COSTS, 3, 2**33)
    return made


def choose(chooser: Chooser, mebibytes: float, **changes: object) -> int:
    chooser.choose(with_memory(mebibytes), replace(OFFER, **changes), num_examples=10)
    assert chooser.choice is not None
    return chooser.choice.variant


# -- counting --------------------------------------------------------------------------------------


def test_a_variant_costs_what_its_whole_prefix_costs():
    """The whole model is also counted as a cut of itself."""
    (found,) = each_variant_cost([MODEL], WHOLE, 24, 1000)
    (same,) = [c for c in segment_costs(MODEL, WHOLE, 24, 1000) if (c.first, c.last) == (1, 3)]
    model = build(MODEL)
    assert found.tensors == specs_of(model.tensors())
    assert set(found.buffers) == {name for name, _ in model.named_buffers()}
    assert found.num_weights == sum(p.numel() for p in model.parameters())
    assert replace(found, tensors=(), buffers=()) == same


def test_counting_ends_behind_the_first_that_does_not_fit():
    every = list(each_variant_cost(VARIANTS, WHOLE, 24, 0))
    peaks = [peak_bytes(found) for found in every]
    assert peaks == sorted(set(peaks))
    least = least_bytes(every[1])
    assert least < peak_bytes(every[1])  # batches of 8 have nothing to cut, stages have
    assert len(list(each_variant_cost(VARIANTS, WHOLE, 24, 0, least))) == 3
    assert len(list(each_variant_cost(VARIANTS, WHOLE, 24, 0, least - 1))) == 2
    assert len(list(each_variant_cost(VARIANTS, WHOLE, 24, 0, 1))) == 1


def test_variants_are_counted_apart_in_their_order():
    """A shallow variant may take more than a deep one, and then stands behind it."""
    variants = (replace(MODEL, width=0.25), replace(MODEL, exit=1))
    found = segment_costs_apart(MODEL, WHOLE, 24, 0, 1.3, 0.2, variants=variants)
    want = each_variant_cost(variants, WHOLE, 24, 0)
    assert found == tuple(replace(c, allowance=1.3, error=0.2) for c in want)
    assert [c.last for c in found] == [3, 1]


# -- choosing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mebibytes", "variant"), [(99, 0), (100, 1), (199, 1), (200, 2), (299, 2), (300, 3)]
)
def test_choice_by_memory(chooser, mebibytes, variant):
    assert choose(chooser, mebibytes) == variant
    said = Ready(exit=3 if variant else 0, variant=variant)
    assert replace(chooser.ready(), reason="", prefix_s=0.0) == said


@pytest.mark.parametrize(("deadline_s", "variant"), [(0.9, 0), (1.0, 1), (2.9, 2), (3.0, 3)])
def test_choice_by_deadline(chooser, deadline_s, variant):
    assert choose(chooser, 1000, deadline_s=deadline_s) == variant
    assert chooser.ready().prefix_s == variant  # seconds


def test_reasons(chooser):
    choose(chooser, 250)
    assert chooser.choice.reason == "variant 3 of 3 needs 300.0 MiB, 250.0 MiB available (host)"
    choose(chooser, 300)
    assert chooser.choice.reason == "variant 3 is the largest of 3"
    chooser.set_costs(COSTS[:2], 3, 2**33)
    choose(chooser, 250)
    assert chooser.choice.reason == "memory did not do for counting what variant 3 takes"


def test_what_was_not_counted_is_counted_when_memory_grows(chooser):
    chooser.set_costs(COSTS, 3, 1000)
    assert not chooser.begin_recount(10**6)
    chooser.set_costs(COSTS[:2], 3, 1000)
    assert not chooser.begin_recount(1250)
    assert chooser.begin_recount(1251)


def test_weights_are_told_for_a_flat_plan_only(chooser):
    choose(chooser, 250)
    assert chooser.ready().num_weights == 0
    choose(chooser, 250, plan=replace(OFFER.plan, flat=True))
    assert chooser.ready().num_weights == 20


def test_a_model_of_the_devices_own_is_no_variant_of_the_run(chooser):
    chooser.is_own = True
    choose(chooser, 300, plan=replace(OFFER.plan, flat=True))
    ready = chooser.ready()
    assert (ready.exit, ready.variant, ready.num_weights) == (3, 0, 30)


def test_a_variant_that_failed_for_memory_is_followed_by_the_next_smaller_one(chooser):
    assert choose(chooser, 400) == 3
    line = chooser.note_failure(segments((1, 3)), 400 * 1024**2, 3)
    assert line.startswith("training variant 3 failed for memory, predicted 300.0 MiB; at most 270")
    assert choose(chooser, 400) == 2
    chooser.note_failure(segments((1, 3)), 400 * 1024**2, 2)
    assert choose(chooser, 400) == 1
    assert choose(chooser, 501) == 3


def test_nothing_to_choose_from():
    with pytest.raises(CapacityError, match="no variant was costed"):
        choose_variant((), 3, PROFILE, deadline_s=None, num_examples=1, epochs=1)


def test_levers_are_those_of_the_jobs_own_variant():
    """100 examples of 1 MiB each at once, or 200: in 172 MiB the larger one goes by halves."""
    heavy = [replace(cost(1, 3, 0), batch_size=100, moments=()) for _ in range(2)]
    made = Chooser(VARIANTS[:2])
    moments = [replace(COSTS[0].moments[0], example_bytes=n * 2**20) for n in (1, 2)]
    costs = [replace(c, moments=(m,)) for c, m in zip(heavy, moments, strict=True)]
    made.set_costs(tuple(costs), 3, 2**33)
    assert choose(made, 172) == 2
    plan = replace(WHOLE, batch_size=100)
    assert made.adapted(plan, 1).micro_batch == 0
    assert made.adapted(plan, 2).micro_batch == 50
    assert made.predicted_s(plan.segments, 2) == 1.0


# -- what a job may ask ----------------------------------------------------------------------------


def test_a_job_has_the_chosen_variant_or_a_smaller_one(chooser):
    choose(chooser, 200)
    whole = (Segment(first=1, last=3),)
    assert chooser.variant_of(VARIANTS[1]) == 2
    assert not chooser.refusal(whole, 2)
    assert not chooser.refusal(whole, 1)
    assert chooser.refusal(whole, 3).startswith(
        "variant 3 asked for, this device trains up to variant 2: variant 3 of 3 needs 300.0 MiB"
    )
    assert chooser.refusal(segments((1, 2)), 2) == (
        "stages 1-2 asked for, a variant is trained as one segment, 1-3"
    )
    with pytest.raises(ConfigError, match="none of the 3 variants of the welcome: ModelSpec"):
        chooser.variant_of(replace(MODEL, width=0.75))


def test_a_smaller_variant_that_does_not_fit_by_itself_is_refused(chooser):
    """A method may have listed them in another order than that of their memory."""
    chooser.set_costs((COSTS[2], COSTS[0]), 3, 2**33)
    assert choose(chooser, 200) == 2
    assert "variant 1 asked for" in chooser.refusal(segments((1, 3)), 1)
