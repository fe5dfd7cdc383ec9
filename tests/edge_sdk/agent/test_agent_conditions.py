"""A hot or drained device: the real agent against a scripted coordinator, the coordinator against
such a device, and the choice itself."""

from __future__ import annotations

import re

import pytest

from edge_sdk.agent import events
from edge_sdk.agent.options import AgentOptions, Senses
from edge_sdk.agent.pipe import Inspected, TrainerOptions
from edge_sdk.agent.state import State
from edge_sdk.capacity.chooser import Chooser
from edge_sdk.capacity.costs import in_model, peak_bytes
from edge_sdk.hardware.conditions import FULL, Allowance, Conditions, Zone
from edge_sdk.protocol.messages import Fault, Heartbeat, Hello, Ready
from tests.support.agent import (
    GIB,
    LONG,
    MODEL,
    WHOLE,
    finish,
    give,
    job_tensors,
    listening,
    running,
)
from tests.support.coordinator import ScriptedCoordinator
from tests.support.costs import segments, welcome, with_memory
from tests.support.devices import PROFILE, WAIT_S
from tests.support.examples import examples
from tests.support.processes import wait_until
from tests.support.real_coordinator import Coordinator

DRAINED = Conditions(battery_percent=9, is_discharging=True)
LOW = Conditions(battery_percent=20, is_discharging=True)
CHARGED = Conditions(battery_percent=90, is_discharging=True)
SHORT = Allowance("short", "it is hot")
NONE = Allowance("none", "it is very hot")


def test_a_drained_device_sits_out_and_comes_back(tmp_path):
    """It says exit 0 with the reason, refuses a job all the same, ends the one in hand after an
    epoch, and takes part again once it is charged."""
    coordinator = ScriptedCoordinator()
    try:
        with running(coordinator.endpoint, tmp_path / "shard.npz", examples(24)) as device:
            coordinator.expect(Hello)
            coordinator.welcome(MODEL, LONG)
            coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
            with listening("sitting out: the battery is at 9 %") as lines:
                device.conditions = DRAINED
                ready = coordinator.expect(Ready)
                assert (ready.exit, ready.stages, ready.prefix_s) == (0, (), 0.0)
                assert ready.reason == "sitting out: the battery is at 9 % and discharging"
                coordinator.expect(Heartbeat)
                coordinator.expect(Heartbeat)
            assert lines.count == 1
            status = device.agent._state.status_line("there")
            assert "too hot or the battery too low for a job" in status
            coordinator.give(1, MODEL, WHOLE, job_tensors(WHOLE))
            fault = coordinator.wait_for(Fault)
            assert (fault.code, fault.round) == ("capacity", 1)
            assert "sitting out: the battery is at 9 %" in fault.detail
            assert coordinator.expect(Ready).exit == 0
            device.conditions = CHARGED
            assert coordinator.expect(Ready).exit == 3

            give(coordinator, 2, LONG)
            assert coordinator.expect(Heartbeat).round == 2
            device.conditions = DRAINED
            fault = coordinator.wait_for(Fault)
            assert (fault.code, fault.round) == ("conditions", 2)
            said = r"ended after [0-9]+ epochs: the battery is at 9 % and discharging"
            assert re.fullmatch(said, fault.detail)
            assert coordinator.expect(Ready).exit == 0  # and now it rests
            device.conditions = CHARGED
            assert coordinator.expect(Ready).exit == 3
            finish(coordinator, 3)
    finally:
        coordinator.close()


def test_a_low_battery_leaves_the_deeper_stages_out(tmp_path):
    coordinator = ScriptedCoordinator()
    try:
        with running(coordinator.endpoint, tmp_path / "shard.npz", examples(24)) as device:
            coordinator.expect(Hello)
            coordinator.welcome(MODEL, LONG)
            coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
            costs = device.agent._choosing.chooser.costs
            single = [cost for cost in costs if cost.first == cost.last]
            deepest = max(single, key=lambda cost: cost.last)
            device.memory_bytes = max(peak_bytes(in_model(cost, deepest)) for cost in single)
            all_stages = coordinator.expect(Ready)
            assert all_stages.exit < 3
            assert all_stages.stages
            device.conditions = LOW
            ready = coordinator.expect(Ready)
            assert (ready.exit, ready.stages, ready.stage_s) == (all_stages.exit, (), ())
            assert ready.reason.endswith(
                "; no deeper stages: the battery is at 20 % and discharging"
            )
            device.conditions, device.memory_bytes = CHARGED, 64 * GIB
            assert coordinator.expect(Ready).exit == 3
    finally:
        coordinator.close()


def test_the_coordinator_gives_a_resting_device_nothing_until_it_is_ready(tmp_path):
    coordinator = Coordinator(None, ("a", "b"), min_clients=1)
    try:
        a, b = (coordinator.device(name) for name in ("a", "b"))
        waiting = coordinator.clients()
        b.hello()
        b.ready(exit=0)
        b.ping()
        assert not waiting.done()
        a.join()
        assert [client.id for client in waiting.result(WAIT_S)] == ["a"]

        def ready() -> list[str]:
            return [client.id for client in coordinator.clients().result(WAIT_S)]

        b.ready(exit=2)
        wait_until(lambda: ready() == ["a", "b"], "b takes part")
        b.ready(exit=0)
        wait_until(lambda: ready() == ["a"], "b rests")
    finally:
        coordinator.close()
        coordinator.close_devices()


# -- without processes -------------------------------------------------------------------------


def choose(chooser: Chooser, allowance: Allowance, mebibytes: float = 120) -> bool:
    return chooser.choose(with_memory(mebibytes), welcome(), 10, allowance)


def test_choice_under_conditions(chooser):
    assert choose(chooser, FULL)
    assert (chooser.choice.exit, chooser.choice.stages) == (1, (2, 3))
    assert choose(chooser, SHORT)
    assert (chooser.choice.exit, chooser.choice.stages, chooser.choice.stage_s) == (1, (), ())
    assert chooser.choice.prefix_s > 0
    assert chooser.refusal(segments((2, 2)))
    assert not chooser.refusal(segments((1, 1)))
    assert choose(chooser, NONE)
    assert (chooser.choice.exit, chooser.choice.prefix_s) == (0, 0.0)
    assert chooser.choice.reason == "sitting out: it is very hot"
    assert chooser.refusal(segments((1, 1)))
    assert not choose(chooser, Allowance("none", "the battery, too"))  # nothing new to tell
    assert choose(chooser, FULL)


def test_short_changes_nothing_where_there_are_no_deeper_stages(chooser):
    assert choose(chooser, FULL, 300)
    assert not choose(chooser, SHORT, 300)
    assert chooser.choice.reason == "exit 3 is the deepest of the model"


def test_a_job_that_fails_for_memory_while_the_device_rests_is_judged_by_its_own_peak(chooser):
    choose(chooser, FULL, 400)
    choose(chooser, NONE, 400)
    assert "predicted 300.0 MiB" in chooser.note_failure(segments((1, 3)), 400 * 1024**2)
    choose(chooser, FULL, 400)
    assert chooser.choice.exit == 2


def test_resting_is_a_warning_and_too_small_an_error(chooser):
    choose(chooser, NONE)
    event = events.chosen(chooser.choice, is_resting=True)
    assert (event.kind, event.exit, event.level) == ("chosen", 0, 30)
    assert event.detail == "sitting out: it is very hot"
    choose(chooser, FULL, 10)
    event = events.chosen(chooser.choice)
    assert event.level == 40
    assert event.detail.startswith("this device is too small for exit 1")


THROTTLED = Conditions(is_throttled=True, clock_share=0.6)
INSPECTED = Inspected(
    num_examples=24,
    num_labels=3,
    input_shape=(1, 8, 8),
    num_classes=3,
    runtime_bytes=0,
    gflops=20.0,
    layer_s=1e-5,
)


def senses(**options: object) -> Senses:
    trainer = TrainerOptions(data="", device=options.pop("device", "cpu"))
    return Senses(
        AgentOptions(client_id="a", trainer=trainer, measure=lambda own_bytes: PROFILE, **options)
    )


@pytest.mark.parametrize(
    ("options", "gflops", "work"),
    [
        ({"conditions": lambda: THROTTLED}, 12.0, "short"),  # of the trainer's own 20
        ({"conditions": lambda: THROTTLED, "device": "cuda"}, 20.0, "short"),  # another clock
        ({"conditions": Conditions}, 20.0, "full"),
        ({}, 20.0, "full"),  # --ignore-conditions, or an emulated board
    ],
)
def test_what_the_device_senses(options, gflops, work):
    made = senses(**options)
    profile, allowance = made.look(made.profile(0, INSPECTED))
    assert profile.gflops == pytest.approx(gflops)
    assert profile.layer_s == pytest.approx(1e-5 * 20.0 / gflops)
    assert allowance.work == work


def test_senses_remember_what_was_allowed():
    celsius = iter((97.0, 93.0, 91.0, 73.0, 71.0))
    made = senses(conditions=lambda: Conditions(zones=(Zone("CPU", next(celsius), 80.0, 100.0),)))
    works = [made.look(PROFILE)[1].work for _ in range(5)]
    assert works == ["none", "none", "short", "short", "full"]


def test_the_status_line_of_a_resting_device():
    state = State(inspected=INSPECTED, welcome=welcome())
    assert state.status_line("there") == "connected to there, waiting for a job"
    state.is_resting = True
    assert state.status_line("there").endswith(
        "too hot or the battery too low for a job (see the log)"
    )
