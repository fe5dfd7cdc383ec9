"""What a hostile coordinator can do to a device: nothing that lasts. Real processes; memory is that
of the agent (34 MB at rest) and of its trainer with all that it forks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import pytest
from msgspec.structs import replace

from edge_sdk.protocol.messages import (
    PROTOCOL,
    Accepted,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Message,
    ModelSpec,
    Part,
    Probe,
    Ready,
    TensorSpec,
    Update,
    Welcome,
)
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import Sender
from tests.support.agent import LONG, MODEL, WHOLE, give, job_tensors
from tests.support.hostile import LEFT, MIB, Attack, attacked
from tests.support.processes import wait_until

MOST = 20_000  # messages of a flood; the device leaves long before
AGENT_BYTES = 60 * MIB  # it has 34 to 45 at rest
GROWTH_BYTES = 60 * MIB  # of a trainer that is given nothing


@pytest.fixture
def attack(tmp_path):
    with attacked(tmp_path) as attack:
        attack.welcome()
        yield attack


# -- jobs ------------------------------------------------------------------------------------------


HUGE = tuple(TensorSpec(name=f"t{n}", shape=(2**27,), dtype="float32") for n in range(8))  # 4 GiB


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"model": replace(MODEL, options={"channels": (4000, 4000, 4000)})}, "config"),
        ({"model": replace(MODEL, family="mlp", options={"widths": (30_000,) * 3})}, "config"),
        ({"model": replace(MODEL, input_shape=(512, 512, 512))}, "config"),
        ({"tensors": HUGE}, "tensors"),
        ({"plan": replace(WHOLE, epochs=100_000)}, "config"),
        ({"plan": replace(WHOLE, batch_size=1_000_000)}, "config"),
        ({"plan": replace(WHOLE, segments=WHOLE.segments * 100)}, "config"),
    ],
    ids=["wide", "family", "input", "tensors", "epochs", "batch", "segments"],
)
def test_jobs_beyond_the_welcome_cost_nothing(jobs_refused, changes, code):
    attack, rest = jobs_refused
    coordinator = attack.coordinator
    attack.forget_peaks()
    sender = Sender(job_tensors(WHOLE))
    coordinator.give(1, MODEL, WHOLE, job_tensors(WHOLE))  # makes coordinator.job
    good = coordinator.job
    coordinator.wait_for(Fetch)
    coordinator.send(replace(good, id="e" * 32, round=2, **changes))
    fault = coordinator.wait_for(Fault)
    assert (fault.code, fault.round) == (code, 2)
    assert "\n" not in fault.detail
    coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
    assert attack.agent_bytes < AGENT_BYTES
    assert attack.trainer_bytes < rest + GROWTH_BYTES
    assert sender.total_bytes < MIB


@pytest.fixture(scope="module")
def jobs_refused(tmp_path_factory):
    """A device that was promised a single epoch, and what its trainer has at rest."""
    with attacked(tmp_path_factory.mktemp("refused")) as attack:
        attack.welcome(WHOLE)
        yield attack, attack.rest_bytes()[1]


# -- floods ----------------------------------------------------------------------------------------


def numbered(make: Callable[[int], Message], payload: bytes | None = None) -> Callable[[], Any]:
    number = 0

    def next_message() -> tuple[Message, bytes | None]:
        nonlocal number
        number += 1
        return make(number), payload

    return next_message


def a_welcome(model: ModelSpec) -> Welcome:
    return Welcome(
        protocol=PROTOCOL, run="r", model=model, plan=LONG, deadline_s=0.0, heartbeat_s=1.0
    )


@pytest.mark.parametrize(
    ("make", "payload", "named"),
    [
        (lambda n: Probe(), None, "probe"),
        (lambda n: Heartbeat(round=n), None, "heartbeat"),
        (lambda n: Fault(code="late", detail="x" * 1900, round=n), None, "fault"),
        (lambda n: Fault(code="hello", detail="again"), None, "fault"),
        (lambda n: Bye(reason="x" * 1900), None, "bye"),
        (lambda n: Accepted(round=n), None, "accepted"),
        (lambda n: Fetch(round=n, have=0, first=0, count=1024), None, "fetch"),
        (lambda n: Part(round=n, index=0), bytes(PART_BYTES), "part"),
        (lambda n: Part(round=n, index=0), None, "frame that breaks the protocol"),
        (lambda n: a_welcome(replace(MODEL, options={"channels": (n, 2, 2)})), None, "welcome"),
    ],
    ids=[
        "probe",
        "heartbeat",
        "fault",
        "hello",
        "bye",
        "accepted",
        "fetch",
        "part",
        "frame",
        "welcome",
    ],
)
def test_a_flood_is_left_and_survived(flooded, make, payload, named):
    attack = flooded
    attack.agent.forget()
    attack.forget_peaks()
    rest, cpu_s = attack.rest_bytes()[1], cpu_seconds(attack)
    assert attack.flood(numbered(make, payload), MOST) < MOST
    wait_until(lambda: attack.agent.said(LEFT), "it leaves", 60, attack.agent)
    line = next(line for line in attack.agent.text().splitlines() if LEFT in line)
    assert f"x {named}" in line
    assert attack.agent_bytes < AGENT_BYTES
    assert attack.trainer_bytes < rest + 300 * MIB  # one count of costs at a time
    assert attack.num_lines() < 450  # of the coordinator's own words at most one each
    assert cpu_seconds(attack) - cpu_s < 20
    comes_back(attack)


@pytest.fixture(scope="module")
def flooded(tmp_path_factory):
    with attacked(tmp_path_factory.mktemp("flooded")) as attack:
        attack.welcome()
        yield attack


def cpu_seconds(attack: Attack) -> float:
    times = psutil.Process(attack.agent.process.pid).cpu_times()
    return times.user + times.system


def comes_back(attack: Attack) -> None:
    """And trains. What it had said before it left, and was sent then, may come still."""
    coordinator, welcomed, is_ready = attack.coordinator, b"", False
    coordinator.run += 1
    while not is_ready:
        received = coordinator.receive()
        if isinstance(received.message, Hello):
            welcomed = received.route
            with suppress(AssertionError):  # said on a connection that it has left since
                coordinator.welcome(MODEL, LONG, heartbeat_s=1.0)
        is_ready = (
            isinstance(received.message, Ready)
            and received.message.exit == 3
            and received.route == welcomed
        )
    sender = coordinator.give(77, MODEL, WHOLE, job_tensors(WHOLE))
    while not isinstance(message := coordinator.receive().message, Update):
        if isinstance(message, Fetch):
            coordinator.send_parts(77, sender, range(message.first, message.first + message.count))
    coordinator.fetch_update(message)
    coordinator.send(Accepted(round=77))
    coordinator.wait_for(Ready)


def test_a_part_that_is_repeated_while_it_trains(attack):
    """It made the agent grow from 34 to 987 MB."""
    coordinator = attack.coordinator
    give(coordinator, 1, LONG)
    sender = Sender(job_tensors(LONG))
    attack.forget_peaks()
    part = Part(round=1, index=0)
    assert attack.flood(lambda: (part, sender.part(0)), MOST) < MOST
    wait_until(lambda: attack.agent.said(LEFT), "it leaves", 60, attack.agent)
    assert attack.agent_bytes < AGENT_BYTES
    assert attack.agent.text().count("a part that nobody asked for") == 1


def test_fetches_of_a_trained_update_again_and_again(attack):
    coordinator = attack.coordinator
    give(coordinator, 1, WHOLE)
    coordinator.wait_for(Update)
    attack.forget_peaks()
    fetch = Fetch(round=1, have=0, first=0, count=1024)
    assert attack.flood(lambda: (fetch, None), MOST) < MOST
    wait_until(lambda: attack.agent.said(LEFT), "it leaves", 60, attack.agent)
    assert attack.agent_bytes < AGENT_BYTES


def test_jobs_that_take_each_others_place(attack):
    coordinator = attack.coordinator
    coordinator.give(1, MODEL, WHOLE, job_tensors(WHOLE))
    good, rest = coordinator.job, attack.rest_bytes()[1]
    attack.forget_peaks()
    jobs = numbered(lambda n: replace(good, id=f"{n:032x}", round=n))
    assert attack.flood(jobs, MOST) < MOST
    wait_until(lambda: attack.agent.said(LEFT), "it leaves", 60, attack.agent)
    assert attack.agent_bytes < AGENT_BYTES
    assert attack.trainer_bytes < rest + GROWTH_BYTES
    comes_back(attack)


# -- welcomes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        replace(MODEL, family="mlp", exit=3, options={"widths": (1_000_000,) * 3}),  # 2 * 10^12
        replace(MODEL, family="mlp", exit=60, options={"widths": (10_000,) * 60}),  # 24 GB
        replace(MODEL, options={"channels": (100_000, 100_000, 100_000)}),
        replace(MODEL, num_classes=1_000_000, options={"channels": (4000, 4000, 4000)}),
    ],
    ids=["at once", "by and by", "convolutions", "classes"],
)
def test_a_model_beyond_the_memory_is_counted_within_it(tmp_path, model):
    with attacked(tmp_path, "--memory-cap", "700M") as attack:
        coordinator = attack.coordinator
        coordinator.wait_for(Hello)
        rest = attack.rest_bytes()[1]
        coordinator.welcome(model, WHOLE, heartbeat_s=1.0)
        ready = coordinator.wait_for(Ready)
        assert ready.exit < model.exit
        assert ready.reason
        assert attack.agent_bytes < AGENT_BYTES
        assert attack.trainer_bytes < 2 * rest + 700 * MIB  # the fork shares what was there
        coordinator.send(Bye(reason="stopped"))
        comes_back(attack)


@pytest.mark.parametrize(
    "changes", [{"input_shape": (1, 30_000, 30_000)}, {"num_classes": 2}], ids=["input", "classes"]
)
def test_a_welcome_that_does_not_fit_the_data_is_not_counted(attack, changes):
    coordinator = attack.coordinator
    coordinator.welcome(replace(MODEL, **changes), WHOLE)
    ready = coordinator.wait_for(Ready, lambda ready: ready.exit == 0)
    assert "its examples are (1, 8, 8) with 3" in ready.reason
