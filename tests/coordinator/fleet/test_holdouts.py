"""What a device tells of the examples that it set aside, over its link: taken, bounded, refused."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from coordinator.cohorts.base import Absence, ClientUpdate
from coordinator.fleet.declared import MOST_LOSS
from edge_sdk.protocol.messages import Fault, Holdout
from tests.support.jobs import PARTS, PLAN, JobsBed

ASKED = replace(PLAN, holdout=0.25)


def told(bed, plan, **held):
    """What becomes of an update, of a device of 10 examples, with this hold-out."""
    bed.give(plan=plan)
    update = replace(bed.update(bed.job()), num_examples=7, holdout=Holdout(**held))
    bed.jobs.on_message("a", update, None)
    if not bed.to("a", Fault):
        bed.parts(range(PARTS))
    return bed.jobs.finished[-1]


@pytest.mark.parametrize(("loss", "taken"), [(0.5, 0.5), (1e308, MOST_LOSS), (-1.0, 0.0)])
def test_a_holdout_comes_with_the_update(tmp_path, loss, taken):
    result = told(JobsBed(tmp_path), ASKED, num_examples=3, metric=2 / 3, loss=loss)
    assert isinstance(result, ClientUpdate)
    assert result.message.holdout == Holdout(num_examples=3, metric=2 / 3, loss=taken)


@pytest.mark.parametrize(
    ("plan", "held", "said"),
    [
        (PLAN, {"num_examples": 3, "metric": 0.5}, "tells of a hold-out, the job asked for non"),
        (ASKED, {"num_examples": 3, "metric": 1.5}, "a hold-out of accuracy 1.5, loss 0.5"),
        (ASKED, {"num_examples": 3, "metric": 0.5, "loss": math.nan}, "accuracy 0.5, loss nan"),
        (ASKED, {"num_examples": 10, "metric": 0.9}, "10 examples of 10, which leaves none to"),
    ],
)
def test_a_holdout_that_cannot_be_is_refused(tmp_path, plan, held, said):
    bed = JobsBed(tmp_path)
    result = told(bed, plan, **{"loss": 0.5} | held)
    assert isinstance(result, Absence)
    assert said in result.detail
    assert said in bed.to("a", Fault)[0].detail
