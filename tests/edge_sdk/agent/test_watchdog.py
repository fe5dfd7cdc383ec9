"""sd_notify: the datagrams, what counts as progress, and a trainer that is stuck."""

from __future__ import annotations

import logging
import socket
import threading
from itertools import pairwise
from uuid import uuid4

import pytest

from edge_sdk.agent import trainer_process, watchdog
from edge_sdk.agent.pipe import Inspected
from edge_sdk.agent.state import State
from edge_sdk.agent.watchdog import Notifier, Watchdog
from edge_sdk.hardware import memory_pressure
from edge_sdk.protocol.messages import Fault, Hello, Ready
from tests.support.agent import LONG, MODEL, give, running
from tests.support.coordinator import ScriptedCoordinator
from tests.support.examples import examples
from tests.support.processes import wait_until

ENDPOINT = "tcp://host:5555"


class Manager:
    """Systemd's end: what it was told, in order."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(f"\0{address[1:]}" if address.startswith("@") else address)
        self._socket.settimeout(30)
        self._thread: threading.Thread | None = None

    def told(self) -> list[str]:
        """The lines of one datagram; it waits for it."""
        return self._socket.recv(4096).decode().split("\n")

    def collect(self) -> list[str]:
        """A list that grows by what is told from now on."""
        lines: list[str] = []

        def read() -> None:
            while (heard := self.told()) != [""]:  # until __exit__
                lines.extend(heard)

        self._socket.settimeout(None)
        self._thread = threading.Thread(target=read, daemon=True)
        self._thread.start()
        return lines

    def has_news(self) -> bool:
        self._socket.setblocking(False)
        try:
            return bool(self._socket.recv(4096, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        finally:
            self._socket.settimeout(30)

    def __enter__(self) -> Manager:
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread:
            self._socket.shutdown(socket.SHUT_RDWR)
            self._thread.join(30)
        self._socket.close()


@pytest.fixture
def manager(tmp_path):
    with Manager(str(tmp_path / "notify")) as manager:
        yield manager


def turn(watchdog: Watchdog, now: float, has_job: bool = False, status: str = "waiting") -> None:
    watchdog.notify(now, is_ready=True, has_job=has_job, status=status)


def test_an_abstract_socket_is_reached():
    with Manager(f"@edge-sdk-test-{uuid4().hex}") as manager:
        notifier = Notifier(manager.address)
        notifier.send("READY=1", "STATUS=here")
        notifier.close()
        assert manager.told() == ["READY=1", "STATUS=here"]


def test_without_a_manager_nothing_is_sent():
    notifier = Notifier("")
    notifier.send("READY=1")
    notifier.close()


def test_a_manager_that_is_gone_is_told_of_once(tmp_path, caplog):
    notifier = Notifier(str(tmp_path / "nobody"))
    with caplog.at_level(logging.WARNING):
        notifier.send("READY=1")
        notifier.send("WATCHDOG=1")
    notifier.close()
    assert caplog.text.count("systemd could not be notified") == 1


def test_what_the_manager_did_not_take_is_said_again(tmp_path):
    address = str(tmp_path / "late")
    watchdog = Watchdog(Notifier(address), now=100.0)
    turn(watchdog, 101.0)
    with Manager(address) as manager:
        turn(watchdog, 101.1)
        assert manager.told() == ["READY=1", "STATUS=waiting", "WATCHDOG=1"]
    watchdog.close()


def test_ready_and_status_are_told_when_they_change(manager):
    watchdog = Watchdog(Notifier(manager.address), now=100.0)
    watchdog.notify(100.1, is_ready=False, has_job=False, status="reading the data")
    assert manager.told() == ["STATUS=reading the data"]
    turn(watchdog, 100.2)
    assert manager.told() == ["READY=1", "STATUS=waiting"]
    turn(watchdog, 100.3)
    assert not manager.has_news()
    watchdog.notify_stopping()
    watchdog.close()
    assert manager.told() == ["STOPPING=1", "STATUS=stopping"]


def test_an_idle_loop_feeds_the_watchdog_once_a_second(manager):
    watchdog = Watchdog(Notifier(manager.address), now=100.0)
    turn(watchdog, 100.5)
    assert manager.told() == ["READY=1", "STATUS=waiting"]
    turn(watchdog, 101.0)
    assert manager.told() == ["WATCHDOG=1"]
    turn(watchdog, 101.9)
    assert not manager.has_news()
    turn(watchdog, 102.0)
    assert manager.told() == ["WATCHDOG=1"]
    watchdog.close()


def test_with_a_job_only_the_trainers_messages_feed_it(manager):
    watchdog = Watchdog(Notifier(manager.address), now=100.0)
    turn(watchdog, 101.0)
    assert "WATCHDOG=1" in manager.told()
    for second in range(102, 150):
        turn(watchdog, float(second), has_job=True)
    assert not manager.has_news()
    watchdog.note_alive(150.0)
    turn(watchdog, 150.1, has_job=True)
    assert manager.told() == ["WATCHDOG=1"]
    turn(watchdog, 155.0, has_job=True)
    assert not manager.has_news()
    assert watchdog.silent_s(160.0) == 10.0
    watchdog.close()


def test_the_watchdog_leaves_the_agent_time_to_end_a_silent_trainer():
    assert 2 * watchdog.SILENT_S <= watchdog.WATCHDOG_S


def test_the_status_line_says_what_the_device_does():
    state = State()
    assert state.status_line(ENDPOINT) == "reading the data"
    state.inspected = Inspected(
        num_examples=9, input_shape=(2,), num_classes=2, num_labels=2, runtime_bytes=0, gflops=0.0
    )
    assert state.status_line(ENDPOINT) == f"waiting for the coordinator {ENDPOINT}"
    state.reopen_at = 5.0
    assert "refused by the coordinator" in state.status_line(ENDPOINT)
    assert "starting another" in state.status_line(ENDPOINT, "starting another")


def test_hellos_without_an_answer_are_told_after_a_while_and_then_ever_more_rarely():
    state, now, told = State(), 100.0, []
    while now < 3700.0:
        if silent_s := state.put_off_hello(now, is_said=True):
            told.append((round(now), round(silent_s)))
        now = state.next_hello
    assert 15 <= told[0][1] <= 33
    assert all(moment == silent_s + 100 for moment, silent_s in told)
    waits = [after[1] - before[1] for before, after in pairwise(told)]
    assert 7 <= len(told) <= 12
    assert all(wait >= before[1] or wait >= 600 for wait, before in zip(waits, told, strict=False))
    state.num_unanswered = 0  # something came
    assert state.put_off_hello(now, is_said=True) == 0.0


def test_hellos_lost_with_a_coordinator_that_was_away_for_long_are_not_told():
    state = State()
    assert state.put_off_hello(0.0, is_said=True) == 0.0
    for now in range(5, 900, 5):
        assert state.put_off_hello(float(now), is_said=False) == 0.0
    assert state.put_off_hello(900.0, is_said=True) == 0.0


# -- the real agent and trainer -------------------------------------------------------------------


@pytest.mark.parametrize("is_thrashing", [False, True])
def test_an_agent_tells_what_it_does_and_ends_a_silent_trainer(
    tmp_path, manager, monkeypatch, is_thrashing
):
    """Without a coordinator it is ready all the same. A stopped trainer is as silent as one that
    hangs in a driver: it is ended, the job given up as for lack of memory, and another starts."""
    told = manager.collect()
    coordinator = ScriptedCoordinator()
    coordinator.hang_up()
    data = tmp_path / "shard.npz"
    try:
        with running(
            coordinator.endpoint, data, examples(24), notify_socket=manager.address
        ) as device:
            waiting = f"STATUS=waiting for the coordinator {coordinator.endpoint}"
            wait_told(told, waiting)
            assert told.index("STATUS=reading the data") < told.index("READY=1")
            coordinator.listen_again()
            coordinator.wait_for(Hello)
            coordinator.welcome(MODEL, LONG)
            wait_told(told, f"STATUS=connected to {coordinator.endpoint}, waiting for a job")
            coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
            give(coordinator, 4, LONG)
            wait_told(told, "STATUS=round 4: ")
            device.trainer().suspend()
            if is_thrashing:
                monkeypatch.setattr(memory_pressure, "stalled_share", lambda root: 0.5)
                monkeypatch.setattr(trainer_process, "THRASHING_S", 1.0)
            else:
                monkeypatch.setattr(trainer_process, "SILENT_S", 1.0)
            fault = coordinator.wait_for(Fault)
            monkeypatch.undo()
            assert (fault.round, fault.code) == (4, "trainer")
            assert fault.detail == (
                "the trainer said nothing for 1 s"
                f"{', as memory was too short to get on,' * is_thrashing} and was ended by signal 9"
            )
            wait_told(told, "STATUS=the trainer ended; starting another")
            coordinator.wait_for(Ready, lambda ready: "failed here before" in ready.reason)
        wait_told(told, "STOPPING=1")
    finally:
        coordinator.close()


def wait_told(told: list[str], begin: str) -> None:
    wait_until(lambda: any(line.startswith(begin) for line in told), f"systemd hears {begin!r}")
