"""Jobs for scripted devices, and what must hold of a round's results."""

from __future__ import annotations

import time
from concurrent.futures import Future

import numpy as np

from coordinator.aggregation.mean import OwnersMean
from coordinator.cohorts.base import Absence, Assignment, ClientUpdate
from edge_sdk.protocol.messages import Fault, Heartbeat, Message, Plan, Segment
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import specs_of
from tests.support.devices import WAIT_S, ScriptedDevice, floats
from tests.support.examples import cnn
from tests.support.real_coordinator import Coordinator, Result

FLOATS_PER_PART = PART_BYTES // 4
STAGE_2 = Plan(segments=(Segment(first=2, last=2),))
BOTH = ("good", "bad")


def assignment(num_floats: int = 3) -> Assignment:
    """Train stage 2 over a frozen stage 1; stage 2 has num_floats weights."""
    tensors = {
        "stages.0.0.weight": floats(2, 2),
        "stages.1.0.weight": floats(num_floats, start=10.0),
        "stages.1.1.bias": floats(4, start=20.0),
        "exits.1.2.bias": floats(3, start=30.0),
    }
    returns = {name: t for name, t in tensors.items() if name != "stages.0.0.weight"}
    return Assignment(cnn(2), STAGE_2, tensors, specs_of(returns))


def work(*names: str, num_floats: int = 3) -> dict[str, Assignment]:
    return {name: assignment(num_floats) for name in names}


def absence_of(results: list[Result], name: str, outcome: str, code: str) -> Absence:
    absences = [r for r in results if isinstance(r, Absence) and r.client.id == name]
    assert [(a.outcome, a.code) for a in absences] == [(outcome, code)]
    assert "\n" not in absences[0].detail
    assert absences[0].segments == STAGE_2.segments
    return absences[0]


def update_of(results: list[Result], name: str) -> ClientUpdate:
    (update,) = (r for r in results if isinstance(r, ClientUpdate) and r.client.id == name)
    return update


def assert_only_these_count(results: list[Result], *devices: ScriptedDevice) -> None:
    """The mean of all that came is the mean of what these devices sent, with equal weights."""
    mean = OwnersMean()
    for result in results:
        if isinstance(result, ClientUpdate):
            mean.add_(result.tensors, result.num_examples)
    for name, tensor in mean.result(assignment().tensors).items():
        if name in devices[0].trained:
            want = np.mean([device.trained[name].numpy() for device in devices], axis=0)
            assert np.array_equal(tensor.numpy(), want), name
    counted = sorted(r.client.id for r in results if isinstance(r, ClientUpdate))
    assert counted == sorted(device.name for device in devices)


def assert_about_round(fault: Fault, code: str, round: int = 1) -> None:
    assert (fault.code, fault.round) == (code, round)
    assert "\n" not in fault.detail


def expect_fault(device: ScriptedDevice, code: str, round: int = 1) -> str:
    """The next message, which must be this Fault about this round; its detail."""
    fault = device.expect(Fault)
    assert_about_round(fault, code, round)
    return fault.detail


def give_jobs(
    coordinator: Coordinator,
    *devices: ScriptedDevice,
    round: int = 1,
    deadline_s: float = 0.0,
    num_floats: int = 3,
) -> Future[list[Result]]:
    """A round of these devices, of which each has its job in hand."""
    tasks = work(*(device.name for device in devices), num_floats=num_floats)
    results = coordinator.train(tasks, round, deadline_s)
    for device in devices:
        device.take_job()
    return results


def end_well(round: Future[list[Result]], *devices: ScriptedDevice) -> list[Result]:
    """All these devices return their updates, and the round ends with nothing else."""
    for device in devices:
        device.return_update()
    results = round.result(WAIT_S)
    assert len(results) == len(devices)
    assert_only_these_count(results, *devices)
    return results


def end(
    round: Future[list[Result]], good: ScriptedDevice, outcome: str, code: str, bad: str = "bad"
) -> Absence:
    """The good device finishes, the round ends, the bad one is absent for this reason."""
    good.return_update()
    return ended(round, good, outcome, code, bad)


def ended(
    round: Future[list[Result]], good: ScriptedDevice, outcome: str, code: str, bad: str = "bad"
) -> Absence:
    """The round ends; the good device counts, the bad one is absent for this reason."""
    results = round.result(WAIT_S)
    assert len(results) == 2
    assert_only_these_count(results, good)
    return absence_of(results, bad, outcome, code)


def talk_until_a_result(coordinator: Coordinator, device: ScriptedDevice) -> None:
    """This device is there, while the round waits for another."""
    until = time.monotonic() + WAIT_S / 3
    while coordinator.arrived.empty() and time.monotonic() < until:
        device.ping(1)


def heard_until_now(device: ScriptedDevice, round: int = 1) -> list[Message]:
    """All that the coordinator says until it has handled everything sent before."""
    device.send(Heartbeat(round=round))
    heard = []
    while not isinstance(message := device.receive()[0], Heartbeat):
        heard.append(message)
    return heard
