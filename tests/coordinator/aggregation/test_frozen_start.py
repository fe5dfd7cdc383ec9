from __future__ import annotations

import dataclasses

import pytest
import torch
from msgspec.structs import replace

from coordinator.aggregation.frozen_start import FrozenStart, Verdict
from edge_sdk.errors import ShapeError
from edge_sdk.protocol.messages import Holdout
from tests.support.examples import client, client_update, scalars


def told(guard: FrozenStart, staleness: int = 0, **losses: float) -> None:
    """Each client has as many held-out examples as its name has letters."""
    for name, loss in losses.items():
        held = Holdout(num_examples=len(name), loss=loss, metric=0.5)
        update = client_update(client(name, 1), {}, (), holdout=held)
        guard.hear_(dataclasses.replace(update, staleness=staleness))


def begun(**losses: float) -> FrozenStart:
    guard = FrozenStart(scalars(w=0.0))
    told(guard, **losses)
    assert guard.judge_(scalars(w=0.0)) == (Verdict.OPEN, 0.0)
    guard.note_step_()
    return guard


def test_each_client_is_compared_with_itself():
    """a saves 1, of one example; bb loses 0.25, of two: (1 - 0.5) / 3. c was not there before, and
    its loss, however good, says nothing."""
    guard = begun(a=2.0, bb=1.0)
    told(guard, a=1.0, bb=1.25, c=0.0)
    verdict, saved = guard.judge_(scalars(w=5.0))
    assert (verdict, saved) == (Verdict.BETTER, pytest.approx(0.5 / 3))
    assert guard.served["w"] == 5.0


def test_a_worse_model_is_not_served():
    guard = begun(a=2.0)
    told(guard, a=1.5)
    guard.judge_(scalars(w=1.0))
    told(guard, a=2.5)
    assert guard.judge_(scalars(w=2.0)) == (Verdict.WORSE, pytest.approx(-0.5))
    assert guard.served["w"] == 1.0, "the one before stays"


def test_nobody_who_knows_the_start_leaves_it_open():
    guard = begun(a=2.0)
    told(guard, b=0.1)
    told(guard, staleness=1, a=0.1)
    assert guard.judge_(scalars(w=1.0)) == (Verdict.OPEN, 0.0)
    assert guard.served["w"] == 0.0


def test_what_it_knows_goes_on():
    guard = begun(a=2.0, b=1.0)
    other = FrozenStart(scalars(w=9.0))
    other.load_state_dict(guard.state_dict())
    assert other.served == guard.served
    for each in (guard, other):
        told(each, a=3.0)
        assert each.judge_(scalars(w=1.0)) == (Verdict.WORSE, -1.0)
    with pytest.raises(ShapeError, match="served"):
        other.load_state_dict({"served/v": torch.zeros(1), "has_moved": torch.tensor(True)})
    lacking = {name: t for name, t in guard.state_dict().items() if name != "has_moved"}
    with pytest.raises(ShapeError, match="has_moved"):
        other.load_state_dict(lacking)


def test_a_message_without_a_holdout_is_no_news():
    guard = FrozenStart(scalars(w=0.0))
    update = client_update(client("a", 1), {}, ())
    guard.hear_(dataclasses.replace(update, arrived=replace(update.arrived)))
    assert guard.judge_(scalars(w=0.0)) == (Verdict.OPEN, 0.0)
