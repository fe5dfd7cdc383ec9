"""Which variants emulated clients train: by the memory of their group."""

from __future__ import annotations

import logging

import pytest
from msgspec.structs import replace

from coordinator.cohorts.base import Offer
from coordinator.cohorts.budget import check_numbers, chosen_variants
from edge_sdk.capacity.costs import peak_bytes
from edge_sdk.capacity.counting import segment_costs
from edge_sdk.errors import ConfigError
from edge_sdk.models import build
from tests.support.agent import MODEL, WHOLE

EXITS = {"a": 1, "b": 1, "c": 2, "d": 3}
WIDTHS = tuple(replace(MODEL, width=width) for width in (0.25, 0.5, 1.0))
PEAKS = {
    cost.last: peak_bytes(cost)
    for cost in segment_costs(MODEL, WHOLE, WHOLE.batch_size, 0)
    if cost.first == 1
}


def numbers(offer: Offer, asked: tuple[int, ...] = ()) -> dict[str, int]:
    found = chosen_variants(offer, MODEL, WHOLE, EXITS, asked)
    return {name: variant.number for name, variant in found.items()}


def test_a_client_has_the_memory_of_its_prefix():
    """Cuts of the model itself: each group takes its own, to the byte."""
    cuts = tuple(replace(MODEL, exit=exit) for exit in (1, 2, 3))
    found = chosen_variants(Offer(MODEL, WHOLE, cuts), MODEL, WHOLE, EXITS)
    assert found == {"a": (1, 1, 0), "b": (1, 1, 0), "c": (2, 2, 0), "d": (3, 3, 0)}


def test_the_largest_width_that_fits():
    costs = [segment_costs(spec, WHOLE, WHOLE.batch_size, 0) for spec in WIDTHS]
    peaks = [max(peak_bytes(c) for c in found if (c.first, c.last) == (1, 3)) for found in costs]
    want = {n: sum(peak <= PEAKS[exit] for peak in peaks) for n, exit in EXITS.items()}
    assert numbers(Offer(MODEL, WHOLE, WIDTHS)) == want
    assert want["d"] == 3
    assert want["a"] < 3


def test_the_methods_plan_takes_memory_too():
    """A proximal term keeps the received weights: the whole model then fits nowhere."""
    held = replace(WHOLE, prox_mu=0.1)
    assert numbers(Offer(MODEL, held, (MODEL,)), (1, 1, 1)) == dict.fromkeys(EXITS, 1)
    with pytest.raises(ConfigError, match="no group has the memory for any of the method's 1 var"):
        numbers(Offer(MODEL, held, (MODEL,)))


def test_a_group_that_is_too_small_takes_no_part(caplog):
    caplog.set_level(logging.INFO, logger="coordinator.cohorts.budget")
    assert numbers(Offer(MODEL, WHOLE, (MODEL,))) == {"d": 1}
    lines = [r.message for r in caplog.records if r.levelname == "WARNING"]
    assert len(lines) == 2
    assert lines[0] == (
        f"group 1 has {PEAKS[1] / 1024:.0f} KiB, as training exit 1 takes, and takes no part: "
        f"variant 1 takes {PEAKS[3] / 1024:.0f} KiB"
    )


def test_numbers_that_were_asked_for():
    offer = Offer(MODEL, WHOLE, WIDTHS)
    assert numbers(offer, (3, 0, 1)) == {"a": 3, "b": 3, "d": 1}


def test_weights_are_counted_where_they_travel_as_one_vector():
    found = chosen_variants(
        Offer(MODEL, replace(WHOLE, flat=True), WIDTHS), MODEL, WHOLE, {"a": 1}, (2,)
    )
    assert found["a"].num_weights == sum(p.numel() for p in build(WIDTHS[1]).parameters())


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((1, 2), "--variants 1,2, expected one for each of the 3 --groups, from 1 to 3"),
        ((1, 2, 4), "--variants 1,2,4, expected"),
        ((0, 0, 0), "--variants 0,0,0, expected"),
    ],
)
def test_numbers_that_cannot_be(asked, said):
    with pytest.raises(ConfigError) as found:
        check_numbers(asked, Offer(MODEL, WHOLE, WIDTHS), 3)
    assert str(found.value).startswith(said)


def test_numbers_for_a_method_without_variants():
    with pytest.raises(ConfigError, match="--variants is for a method that offers variants"):
        check_numbers((1, 1, 1), Offer(MODEL, WHOLE), 3)
