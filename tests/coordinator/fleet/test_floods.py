"""One peer that never stops, beside one that works: it is not heard for long, and not logged."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from coordinator.links.rate_limit import MOST_DROPPED, MOST_REFUSED, SAME_LINES, RateLimits
from coordinator.store.status import LinkCounts
from edge_sdk.protocol.keys import KeyPair
from edge_sdk.protocol.messages import Fault, Heartbeat, Join, Message, Probe, Ready
from tests.support.admission import new_key, pair_of
from tests.support.devices import WAIT_S, ScriptedDevice
from tests.support.jobs_and_results import BOTH, work
from tests.support.real_coordinator import Coordinator

NESTED = b"\x91" * 900  # 900 arrays, one in the other


@pytest.fixture
def limits() -> RateLimits:
    """A hundred messages; none come back, so that a slow machine changes nothing."""
    return RateLimits(rate=0.0, burst=100.0)


@pytest.fixture
def coordinator(tmp_path, limits) -> Iterator[Coordinator]:
    coordinator = Coordinator(tmp_path, BOTH, limits=limits)
    yield coordinator
    coordinator.close()
    coordinator.close_devices()


def beside_a_round(coordinator: Coordinator) -> ScriptedDevice:
    """A device that has nothing to do in the round that begins."""
    _, bad = coordinator.gather()
    coordinator.train(work("good"))
    return bad


def links(coordinator: Coordinator) -> LinkCounts:
    return coordinator.router.link_counts()


def flood(device: ScriptedDevice, message: Callable[[int], Message]) -> None:
    """Say more than is heard and borne: until the connection is ended."""
    until, number = time.monotonic() + WAIT_S, 0
    while not device.link.events()[0]:
        assert time.monotonic() < until, f"{number} messages were borne"
        if device.link.send(message(number)):
            number += 1
        else:
            device.link.wait(100, wants_to_send=True)
        while device.link.receive():
            pass


def is_disconnected(device: ScriptedDevice) -> None:
    """It reads what it was sent, up to the end of the connection."""
    until = time.monotonic() + WAIT_S
    while not device.link.events()[0]:
        assert time.monotonic() < until
        device.link.wait(100)
        while device.link.receive():
            pass


FLOODS = {
    "hello": lambda device: lambda _: device.make_hello(),
    "other sessions": lambda device: lambda number: device.make_hello(session=f"s{number}"),
    "ready": lambda _: lambda number: Ready(exit=1 + number % 2),
    "heartbeat": lambda _: lambda _: Heartbeat(),
    "fault": lambda _: lambda _: Fault(code="trainer", detail="d" * 500),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_a_flood_is_ended_and_the_round_goes_on(coordinator, caplog, kind):
    good, bad = coordinator.gather()
    round = coordinator.train(work("good"))
    flood(bad, FLOODS[kind](bad))
    good.finish()
    assert len(round.result(WAIT_S)) == 1
    found = links(coordinator)
    assert found.peers_ended == 1
    assert found.messages_dropped >= MOST_DROPPED
    assert len(caplog.messages) < 3 * SAME_LINES
    assert "does not know this device's key" in bad.refusal(), "kept out for a while"
    state = coordinator.ask(lambda cohort: cohort.snapshot()).result(WAIT_S)
    (of_bad,) = [client for client in state.clients if client.name == "bad"]
    assert (of_bad.phase, of_bad.faults["flood"]) == ("away", 1)


def test_a_participant_that_floods_is_not_waited_for(coordinator):
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH))
    flood(bad, FLOODS["heartbeat"](bad))
    good.finish()
    results = {result.client.id: result for result in round.result(WAIT_S)}
    assert results["bad"].code == "gone"
    assert "said too much" in results["bad"].detail


def test_who_says_only_what_is_refused_is_ended(coordinator, caplog):
    bad = beside_a_round(coordinator)
    for _ in range(MOST_REFUSED + 1):
        bad.send_frames(NESTED)
    is_disconnected(bad)
    assert links(coordinator) == LinkCounts(frames_refused=MOST_REFUSED + 1, peers_ended=1)
    assert sum("message from" in line for line in caplog.messages) == SAME_LINES


def test_large_frames_are_paid_by_size(coordinator):
    """Each of 50 kB costs 49, and 98 are left: the third of them is not even looked at."""
    bad = beside_a_round(coordinator)
    for _ in range(3):
        bad.send_frames(bytes(50_000))
    assert [bad.expect(Fault).code for _ in range(3)] == ["protocol", "protocol", "flood"]
    found = links(coordinator)
    assert (found.frames_refused, found.messages_dropped) == (2, 1)


def test_a_join_after_hello_changes_nothing(coordinator):
    bad = beside_a_round(coordinator)
    bad.send(Join(client_id="bad", public_key=new_key()))
    fault = bad.expect(Fault)
    assert (fault.code, fault.round) == ("protocol", 0)
    assert "a connection of its own" in fault.detail
    bad.ping()


def test_a_third_newcomer_hears_that_two_are_there(coordinator):
    bad = beside_a_round(coordinator)
    second, third = (coordinator.device("bad") for _ in range(2))
    second.send(second.make_hello(session="second"))
    bad.expect(Probe)
    third.send(third.make_hello(session="third"))
    assert third.expect(Fault).code == "duplicate"
    bad.ping()  # the one that was there lives
    assert second.expect(Fault).code == "duplicate"


def test_an_invitation_that_is_used_or_expired_is_refused_in_the_handshake(gate, caplog):
    used, expired = gate.invite(), gate.invite(valid_s=-1.0)
    with_used = gate.device(pair_of(used))
    with_used.send(Join(client_id="pi", public_key=new_key()))
    with_used.receive()
    for line in (used, expired):
        assert "does not know this device's key" in gate.device(pair_of(line)).refusal()
    said = "\n".join(caplog.messages)
    assert "refused a device with the invitation that pi used, key" in said
    assert "refused a device with an invitation that has expired, key" in said


def test_strangers_are_counted_and_not_all_logged(gate, caplog):
    gate.router._credentials._repeats._most = 3
    strangers = [gate.device(KeyPair(*zmq.curve_keypair())) for _ in range(6)]
    for stranger in strangers:
        stranger.refusal()
    assert gate.router.num_refused >= 6
    assert sum("unknown public key" in line for line in caplog.messages) == 3
