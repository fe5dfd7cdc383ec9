"""The real agent and its trainer where a run offers several models, or none for a device that has
its own; the coordinator is scripted."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from edge_sdk.agent.own_model import OwnModel, check_own_model, models_to_choose
from edge_sdk.capacity.costs import least_bytes
from edge_sdk.errors import ConfigError
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.flat import flatten, num_weights, parameter_shapes
from edge_sdk.protocol.messages import (
    Accepted,
    Fault,
    Hello,
    ModelSpec,
    Plan,
    Ready,
    Segment,
    Update,
)
from edge_sdk.protocol.tensors import specs_of
from tests.support.agent import GIB, MODEL, WHOLE, running
from tests.support.coordinator import ScriptedCoordinator
from tests.support.costs import welcome
from tests.support.examples import examples

VARIANTS = tuple(replace(MODEL, width=width) for width in (0.25, 0.5, 1.0))
FLAT = replace(WHOLE, flat=True)
OWN = OwnModel(family="mlp", exits=1, options={"widths": (5,)})


@pytest.fixture
def coordinator():
    made = ScriptedCoordinator()
    yield made
    made.close()


def welcomed(
    coordinator: ScriptedCoordinator, plan: Plan, variants: tuple[ModelSpec, ...]
) -> Ready:
    coordinator.wait_for(Hello)
    coordinator.welcome(MODEL, plan, variants=variants)
    return coordinator.wait_for(Ready, lambda ready: ready.reason != "costs are not counted yet")


def trained(coordinator: ScriptedCoordinator, round: int, sender: object) -> Update:
    coordinator.serve_parts(round, sender)
    update = coordinator.expect(Update)
    coordinator.fetch_update(update)
    coordinator.send(Accepted(round=round))
    coordinator.expect(Ready)
    return update


def test_variants_are_chosen_by_memory_and_trained(coordinator, tmp_path):
    """They are counted from the smallest on, up to one that does not fit, and when memory has
    grown, anew."""
    with running(coordinator.endpoint, tmp_path / "data.npz", examples()) as device:
        device.memory_bytes = 1024**2  # the trainer alone takes more
        assert welcomed(coordinator, WHOLE, VARIANTS).exit == 0
        assert len(device.agent._choosing.chooser.costs) <= 1
        device.memory_bytes = 64 * GIB
        ready = coordinator.wait_for(Ready, lambda ready: ready.exit)
        assert (ready.exit, ready.variant, ready.stages, ready.num_weights) == (3, 3, (), 0)
        costs = device.agent._choosing.chooser.costs
        smaller = VARIANTS[0]
        sent = initial_tensors(smaller, 0)
        update = trained(coordinator, 1, coordinator.give(1, smaller, WHOLE, sent))
        assert update.tensors == specs_of(sent)
        assert [result.exit for result in update.exits] == [1, 2, 3]
        device.memory_bytes = least_bytes(costs[2]) - 1
        coordinator.wait_for(Ready, lambda ready: ready.variant == 2)
        device.memory_bytes = 1
        rests = coordinator.wait_for(Ready, lambda ready: not ready.exit)
        assert (rests.variant, rests.stages) == (0, ())
        assert rests.reason.startswith("variant 1 of 3 needs")
        coordinator.give(2, smaller, WHOLE, sent)
        fault = coordinator.expect(Fault)
        assert fault.code == "capacity"
        assert "variant 1 asked for, this device trains up to variant 0" in fault.detail
        device.memory_bytes = 64 * GIB
        coordinator.wait_for(Ready, lambda ready: ready.variant == 3)
        other = replace(MODEL, width=0.75)
        coordinator.give(3, other, WHOLE, initial_tensors(other, 0))
        assert "none of the 3 variants" in coordinator.wait_for(Fault).detail


def test_a_model_of_the_devices_own_is_trained_whatever_the_job_names(coordinator, tmp_path):
    """The coordinator knows how many weights it has: 64 x 5, BatchNorm's 2 x 5, 5 x 3 and 3."""
    shapes = parameter_shapes(build(own_spec()))
    with running(coordinator.endpoint, tmp_path / "data.npz", examples(), own_model=OWN):
        ready = welcomed(coordinator, FLAT, VARIANTS)
        assert (ready.exit, ready.variant) == (1, 0)
        assert ready.num_weights == num_weights(shapes) == 64 * 5 + 2 * 5 + 5 * 3 + 3
        plan = replace(FLAT, segments=(Segment(first=1, last=1),))
        vector = flatten(initial_tensors(own_spec(), 0), shapes)
        job = coordinator.give(1, replace(MODEL, exit=1), plan, {"flat/all": vector})
        update = trained(coordinator, 1, job)
        assert [spec.shape for spec in update.tensors] == [(348,)]
        coordinator.give(2, replace(MODEL, exit=1), plan, {"flat/all": vector[:-1].clone()})
        assert (
            "flat/all is (347,) float32 flat, expected (348,)" in coordinator.wait_for(Fault).detail
        )


@pytest.mark.parametrize(
    ("plan", "own", "said"),
    [
        (WHOLE, OWN, "trains models of its coordinator, this device was started with one of its"),
        (FLAT, replace(OWN, exits=4), "has 3 exits, this device's own model 4"),
        (FLAT, None, "trains devices' own models and offers none; give --model"),
    ],
)
def test_an_own_model_that_has_no_place_in_a_run(plan, own, said):
    with pytest.raises(ConfigError, match=said):
        check_own_model(replace(welcome(), plan=plan), own)


def test_the_devices_own_log_says_so(coordinator, tmp_path, caplog):
    with running(coordinator.endpoint, tmp_path / "data.npz", examples(), own_model=OWN):
        assert welcomed(coordinator, WHOLE, ()).exit == 0
    said = [line for line in caplog.messages if "nothing to train for this device" in line]
    assert len(said) == 1
    assert "(--model mlp); start it without" in said[0]


def test_an_own_model_takes_the_runs_inputs_and_classes():
    check_own_model(replace(welcome(), plan=FLAT), OWN)
    assert models_to_choose(welcome(), OWN) == (own_spec(),)
    assert models_to_choose(replace(welcome(), variants=VARIANTS), None) == VARIANTS


def own_spec() -> ModelSpec:
    return replace(MODEL, family="mlp", exit=1, options={"widths": (5,)})
