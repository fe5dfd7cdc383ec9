"""What a device may say of the models that a run offers."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from coordinator.fleet.offered import OWN, Offered, weights_of
from edge_sdk.protocol.messages import Ready
from tests.support.agent import MODEL
from tests.support.costs import welcome

VARIANTS = (replace(MODEL, exit=1), MODEL)
CUTS = Offered(welcome())
OFFER = replace(welcome(), variants=VARIANTS)
CHOICE = Offered(OFFER)
FLAT = replace(OFFER, plan=replace(OFFER.plan, flat=True))
SMALL, LARGE = map(weights_of, VARIANTS)


def test_weights_of_a_model():
    # 3x3 kernels from 1 to 4 and from 4 to 4 channels, each with BatchNorm's two, and the exit
    assert SMALL == (4 * 9 + 8) + (4 * 4 * 9 + 8) + (16 + 1) * 3


@pytest.mark.parametrize(
    ("ready", "said"),
    [
        (Ready(exit=3), ""),
        (Ready(exit=0, reason="too hot"), ""),
        (Ready(exit=1, stages=(2, 3), stage_s=(1.0, 1.0)), ""),
        (Ready(exit=4), "the model has 3 exits"),
        (Ready(exit=1, stages=(4,)), "the model has 3 exits"),
        (Ready(exit=1, stages=(2,), stage_s=(1.0, 1.0)), "2 stage_s for 1 stages"),
        (Ready(exit=3, variant=1), "variant 1 of 0 that are offered"),
        (Ready(exit=3, num_weights=7), "7 weights, none are asked for"),
    ],
)
def test_cuts_of_one_model(ready, said):
    assert CUTS.misfit("a", ready) == said


@pytest.mark.parametrize(
    ("ready", "said"),
    [
        (Ready(exit=1, variant=1), ""),
        (Ready(exit=3, variant=2), ""),
        (Ready(exit=0), ""),
        (Ready(exit=3, variant=3), "variant 3 of 2 that are offered"),
        (Ready(exit=3, variant=1), "exit 3 of variant 1, which has exit 1"),
        (Ready(exit=1, variant=2), "exit 1 of variant 2, which has exit 3"),
        (Ready(exit=0, variant=1), "variant 1 without an exit"),
        (Ready(exit=3), "exit 3 without one of the 2 variants"),
        (Ready(exit=1, variant=1, stages=(2,)), "a variant is trained whole, and not its stages"),
        (Ready(exit=1, variant=1, num_weights=SMALL), f"{SMALL} weights, none are asked for"),
    ],
)
def test_variants(ready, said):
    assert CHOICE.misfit("a", ready).startswith(said)
    assert bool(CHOICE.misfit("a", ready)) == bool(said)


@pytest.mark.parametrize(
    ("ready", "said"),
    [
        (Ready(exit=1, variant=1, num_weights=SMALL), ""),
        (Ready(exit=3, variant=2, num_weights=LARGE), ""),
        (Ready(exit=3, variant=2, num_weights=SMALL), f"{SMALL} weights, variant 2 has {LARGE}"),
        (Ready(exit=3, variant=2), f"0 weights, variant 2 has {LARGE}"),
        (Ready(exit=1, num_weights=1), ""),
        (Ready(exit=1, num_weights=OWN * LARGE), ""),
        (Ready(exit=1), f"a model of its own of 0 weights, expected 1 to {OWN * LARGE}"),
        (Ready(exit=1, num_weights=OWN * LARGE + 1), "a model of its own of"),
    ],
)
def test_flat_weights(ready, said):
    found = Offered(FLAT).misfit("a", ready)
    assert found.startswith(said)
    assert bool(found) == bool(said)


def test_a_clients_own_model_stays_the_same():
    offered = Offered(FLAT)
    assert not offered.misfit("a", Ready(exit=1, num_weights=50))
    assert not offered.misfit("a", Ready(exit=0))
    assert offered.misfit("a", Ready(exit=1, num_weights=51)) == (
        "a model of its own of 51 weights, it had one of 50; start the device with that one, or "
        "under another name"
    )
    assert not offered.misfit("b", Ready(exit=1, num_weights=51))
    assert not offered.misfit("a", Ready(exit=3, variant=2, num_weights=LARGE))  # as all know it
