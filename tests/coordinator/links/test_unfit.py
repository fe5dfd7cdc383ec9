"""Devices that try to take part and cannot: told once with the reason, counted, listed, named to
who waits. The real Router and ZmqCohort against scripted devices."""

from __future__ import annotations

import logging

import msgpack
import msgspec
import pytest

from coordinator.fleet import cohort as cohort_module
from coordinator.links.unfit import MOST, NEWS_S, UnfitDevices
from coordinator.store.status import UnfitDevice
from edge_sdk.errors import QuorumError
from edge_sdk.protocol.keys import make_keys
from edge_sdk.protocol.messages import PROTOCOL, Fault, Ready
from tests.support.devices import WAIT_S, ScriptedDevice
from tests.support.processes import wait_until
from tests.support.real_coordinator import Coordinator

# -- by hand ---------------------------------------------------------------------------------------


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def unfit(clock) -> UnfitDevices:
    return UnfitDevices(clock)


def test_each_reason_is_news_once(unfit, clock):
    assert unfit.note("pi", "capacity", "exit 1 needs 120.5 MiB, 80.0 MiB available")
    assert not unfit.note("pi", "capacity", "exit 1 needs 120.5 MiB, 79.5 MiB available")
    clock.now += NEWS_S
    assert not unfit.note("pi", "capacity", "exit 1 needs 120.5 MiB, 7 MiB available"), "figures"
    assert unfit.note("pi", "capacity", "sitting out: 85 degrees")
    assert not unfit.note("pi", "data", "its examples are (3, 8, 8)"), (
        "a device that changes its mind"
    )
    clock.now += NEWS_S
    assert unfit.note("pi", "data", "its labels are text")
    clock.now += 5
    assert unfit.told() == (
        UnfitDevice(name="pi", code="data", reason="its labels are text", count=6, age_s=5.0),
    )
    unfit.forget("pi")
    assert unfit.told() == ()
    assert unfit.note("pi", "data", "its labels are text"), "it had taken part meanwhile"


def test_a_flood_of_names_is_bounded_and_not_logged(unfit, clock):
    first = [unfit.note(f"n{number}", "data", "wrong") for number in range(MOST)]
    more = [unfit.note(f"more{number}", "data", "wrong") for number in range(1000)]
    assert (all(first), any(more), len(unfit.told())) == (True, False, MOST)
    assert unfit.told()[0].name == "more999"
    clock.now += NEWS_S
    assert unfit.note("later", "data", "wrong")


def test_in_words(unfit):
    assert unfit.in_words() == ""
    for number in range(1, 3):
        unfit.note(f"pi-{number}", "data", f"reason {number}")
    assert unfit.in_words() == "; pi-2: reason 2; pi-1: reason 1"
    for number in range(3, 6):
        unfit.note(f"pi-{number}", "data", "x" * 1000)
    *told, more = unfit.in_words().removeprefix("; ").split("; ")
    assert [text.partition(":")[0] for text in told] == ["pi-5", "pi-4", "pi-3"]
    assert max(map(len, told)) < 200
    assert more == "and 2 more that cannot take part"


# -- devices ---------------------------------------------------------------------------------------


@pytest.fixture
def impatient_waiting(monkeypatch):
    """What is waited for is told ten times a second."""
    monkeypatch.setattr(cohort_module, "TELL_S", 0.1)


def listed(coordinator: Coordinator) -> dict[str, tuple[str, int, str]]:
    """Code, count and reason by name, as `status` tells."""
    unfit = coordinator.ask(lambda cohort: cohort.snapshot()).result(WAIT_S).unfit
    return {device.name: (device.code, device.count, device.reason) for device in unfit}


def lines(caplog: pytest.LogCaptureFixture, *words: str) -> list[str]:
    return [line for line in caplog.messages if all(word in line for word in words)]


def refused(device: ScriptedDevice, **changes: object) -> Fault:
    device.send(device.make_hello(**changes))
    return device.expect(Fault)


def listening(coordinator: Coordinator) -> None:
    """The cohort waits for devices, until the coordinator is closed."""
    coordinator.clients()


def test_wrong_data_is_told_once_and_counted(make_coordinator, caplog):
    caplog.set_level(logging.INFO)
    coordinator = make_coordinator("pi")
    waiting = coordinator.clients()
    device = coordinator.device("pi")
    for _ in range(3):
        fault = refused(device, input_shape=(3, 8, 8))
        assert fault.code == "data"
    (line,) = lines(caplog, "pi is refused, data: ")
    assert fault.detail in line
    device.join()  # with other data
    waiting.result(WAIT_S)
    assert listed(coordinator) == {}


def test_who_waits_hears_why(make_coordinator, impatient_waiting, caplog):
    caplog.set_level(logging.INFO)
    coordinator = make_coordinator("big", "small", "odd", give_up_after_s=WAIT_S)
    waiting = coordinator.clients()
    big, small, odd = map(coordinator.device, ("big", "small", "odd"))
    big.join()
    small.hello()
    for _ in range(2):
        small.send(Ready(exit=0, reason="exit 1 needs 9.0 MiB, 1.0 MiB available"))
    small.ping()  # what comes over two connections comes in any order
    assert refused(odd, num_classes=9).code == "data"
    told = ("waiting for devices: 1 of 3 ready; ", "small: exit 1", "odd: ")
    wait_until(lambda: lines(caplog, *told), "told")
    coordinator._cohort._patience.since -= 2 * WAIT_S  # as if they had long been silent
    with pytest.raises(QuorumError) as caught:
        waiting.result(WAIT_S)
    said = str(caught.value)
    assert "1 of the 3 devices that it needs are there" in said
    assert "; odd: " in said
    assert "; small: exit 1 needs 9.0 MiB, 1.0 MiB available; nothing is lost" in said
    assert len(lines(caplog, "small can train nothing now (exit 1 needs 9.0 MiB")) == 1
    assert {name: entry[:2] for name, entry in listed(coordinator).items()} == {
        "small": ("capacity", 2),
        "odd": ("data", 1),
    }


def test_a_device_that_gives_no_reason_is_told_without(make_coordinator, caplog):
    caplog.set_level(logging.INFO)
    coordinator = make_coordinator("pi", "nano")
    waiting = coordinator.clients()
    for name, reason in (("pi", ""), ("nano", "the model's last exit")):
        device = coordinator.device(name)
        device.hello()
        device.send(Ready(exit=3, reason=reason))
    waiting.result(WAIT_S)
    assert "pi trains up to exit 3" in caplog.messages
    assert "nano trains up to exit 3 (the model's last exit)" in caplog.messages


@pytest.mark.parametrize("is_insecure", [True, False])
def test_another_protocol(make_coordinator, impatient_waiting, caplog, is_insecure):
    """By the name of its key, else the one that it gives."""
    caplog.set_level(logging.INFO)
    coordinator = make_coordinator("pi", is_insecure=is_insecure)
    listening(coordinator)
    device = coordinator.device("pi")
    hello = msgspec.to_builtins(device.make_hello())
    for _ in range(2):
        device.send_frames(msgpack.packb(hello | {"protocol": PROTOCOL - 1}))
        assert device.expect(Fault).code == "version"
    reason = f"'hello' speaks protocol {PROTOCOL - 1}, this side {PROTOCOL}"
    assert len(lines(caplog, "message from pi refused", reason)) == 1
    wait_until(lambda: lines(caplog, "waiting for devices: 0 of 1 ready; pi: ", reason), "told")
    coordinator._stopping.set()
    ((name, (code, count, told)),) = listed(coordinator).items()
    assert (name, code, count) == ("pi", "version", 2)
    assert told.startswith(reason)


def test_strangers_are_counted_to_who_waits(make_coordinator, impatient_waiting, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    coordinator = make_coordinator("pi")
    listening(coordinator)
    stranger = coordinator.device("pi", keys=make_keys(tmp_path / "other", "device"))
    stranger.refusal()
    said = "waiting for devices: 0 of 1 ready; connections refused for an unknown key: 1"
    wait_until(lambda: lines(caplog, said), "told")
