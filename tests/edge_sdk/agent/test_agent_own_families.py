"""A real device under a coordinator whose model family has a mistake here: it can train nothing,
says why, and its trainer lives on."""

from __future__ import annotations

import pytest

from edge_sdk.protocol.messages import Fault, Hello, ModelSpec, Plan, Ready, Segment
from tests.support.agent import running
from tests.support.coordinator import ScriptedCoordinator
from tests.support.examples import examples
from tests.support.mistakes import LINES

MODULE = "tests.support.mistaken_families"
PLAN = Plan(segments=(Segment(first=1, last=3),), batch_size=4)


@pytest.fixture(scope="module")
def mistaken_pair(quick_retries, tmp_path_factory):
    """A device that has said hello."""
    coordinator = ScriptedCoordinator()
    data = tmp_path_factory.mktemp("shard") / "shard.npz"
    try:
        with running(coordinator.endpoint, data, examples(24), imports=(MODULE,)) as device:
            coordinator.wait_for(Hello)
            yield coordinator, device
    finally:
        coordinator.close()


def welcome(coordinator, device, family):
    coordinator.drain()
    coordinator.router.send(coordinator.route, Fault(code="hello", detail="say it again"))
    coordinator.wait_for(Hello)
    coordinator.run += 1
    model = ModelSpec(family=family, input_shape=(1, 8, 8), num_classes=3, exit=3)
    coordinator.welcome(model, PLAN)


@pytest.mark.parametrize("mistake", [*LINES, "dies"])
def test_a_device_that_cannot_train_a_family_says_why(mistaken_pair, mistake):
    coordinator, device = mistaken_pair
    process = device.trainer()
    welcome(coordinator, device, mistake)
    said = LINES.get(mistake, "counting the model's costs ended with status 7")
    ready = coordinator.wait_for(Ready, lambda ready: said.partition(" (1, ")[0] in ready.reason)
    assert (ready.exit, ready.stages) == (0, ())
    assert device.trainer() == process, "the same trainer, which did not die"


def test_afterwards_it_trains_a_sound_one(mistaken_pair):
    coordinator, device = mistaken_pair
    welcome(coordinator, device, "plain")
    assert coordinator.wait_for(Ready, lambda ready: ready.exit > 0).exit == 3
