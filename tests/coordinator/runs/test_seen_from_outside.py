"""Real coordinators as who looks sees them: a cohort's snapshot, a killed process."""

from __future__ import annotations

import json
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.cli.main import main
from coordinator.fleet import cohort as cohort_module
from coordinator.fleet.cohort import ZmqCohort
from coordinator.fleet.counters import OTHER
from coordinator.store.status import (
    CohortState,
    read_status,
)
from edge_sdk.protocol.keys import make_keys
from edge_sdk.protocol.messages import Accepted, Bye, Fault, Fetch, Job, Probe
from edge_sdk.protocol.stream import PART_BYTES, layout
from edge_sdk.protocol.tensors import Receiver, specs_of
from tests.support.devices import WAIT_S, ScriptedDevice, asked_for
from tests.support.jobs_and_results import work
from tests.support.processes import World, free_port, wait_until
from tests.support.real_coordinator import Coordinator
from tests.support.scraping import scrape

# -- a cohort ---------------------------------------------------------------------------------


@pytest.fixture
def make_coordinator(tmp_path, monkeypatch) -> Iterator[Callable[..., Coordinator]]:
    monkeypatch.setattr(cohort_module, "FAREWELL_S", 0.0)  # the devices here do not answer a bye
    made: list[Coordinator] = []

    def make(**settings: Any) -> Coordinator:
        made.append(Coordinator(tmp_path / str(len(made)), ("a", "b"), **settings))
        return made[-1]

    yield make
    for coordinator in made:
        coordinator.close()
        coordinator.close_devices()


class Looker:
    """Snapshots from the cohort's thread, which asks between messages whether to stop: as serve."""

    def __init__(self, coordinator: Coordinator) -> None:
        self._asked = threading.Event()
        self._found: queue.Queue[CohortState] = queue.Queue()
        coordinator.ask(self._join).result(WAIT_S)

    def _join(self, cohort: ZmqCohort) -> None:
        should_stop = cohort._should_stop

        def look() -> bool:
            if self._asked.is_set():
                self._asked.clear()
                self._found.put(cohort.snapshot())
            return should_stop()

        cohort._should_stop = look

    def __call__(self) -> CohortState:
        self._asked.set()
        return self._found.get(timeout=WAIT_S)

    def phases(self) -> dict[str, str]:
        return {client.name: client.phase for client in self().clients}


def test_a_client_is_seen_in_each_of_its_phases(make_coordinator):
    """a does a whole job; b rests, and then its update waits, as a's fills the budget."""
    coordinator = make_coordinator(budget_bytes=2 * PART_BYTES)
    look = Looker(coordinator)
    clients = coordinator.clients()
    assert look.phases() == {}
    a, b = coordinator.device("a"), coordinator.device("b")
    a.hello()
    b.hello()
    assert look.phases() == {"a": "connected", "b": "connected"}
    a.ready()
    b.ready(exit=0)
    a.ping()
    b.ping()
    assert look.phases() == {"a": "ready", "b": "resting"}
    b.ready()
    clients.result(WAIT_S)
    training = coordinator.train(work("a", "b", num_floats=3 * PART_BYTES // 4), round=7)
    take_by_twos(b)
    b.ping(7)
    assert look.phases() == {"a": "download", "b": "train"}
    job = take_by_twos(a)
    a.send(a.make_update())
    fetch = a.expect(Fetch)
    b.send(b.make_update())
    b.ping(7)
    found = look()
    assert {client.name: client.phase for client in found.clients} == {"a": "upload", "b": "queued"}
    assert (found.chosen, found.needed, found.returned) == (2, 2, 0)
    assert found.bytes_in_flight == found.budget_bytes == 2 * PART_BYTES
    assert found.bytes_down == 2 * layout(job.tensors)[1]
    assert [client.round for client in found.clients] == [7, 7]
    a.send_parts(asked_for(fetch))
    assert isinstance(a.upload(), Accepted)
    b.expect(Fetch)
    assert look.phases() == {"a": "ready", "b": "upload"}
    b.send(Fault(code="made up", detail="out of luck", round=7))
    training.result(WAIT_S)
    asked = coordinator.clients()  # waits for b, which failed
    found = look()
    size = layout(specs_of(a.trained))[1]
    assert found.spool_bytes > size, "it is kept until its round is final"
    assert (found.returned, found.bytes_in_flight, found.faults) == (1, 0, {OTHER: 1})
    assert (found.updates_accepted, found.updates_failed, found.updates_late) == (1, 1, 0)
    assert found.bytes_down == 2 * layout(job.tensors)[1]
    assert (found.bytes_up, found.clients[0].bytes_up, found.clients[0].updates) == (size, size, 1)
    assert [(client.phase, client.round) for client in found.clients] == [
        ("ready", 0),
        ("connected", 0),
    ]
    assert found.clients[1].faults == {OTHER: 1}
    assert [client.address for client in found.clients] == ["127.0.0.1", "127.0.0.1"]
    a.send(Bye())
    wait_until(lambda: look.phases()["a"] == "away", "a is away")
    assert not asked.done()


def take_by_twos(device: ScriptedDevice) -> Job:
    """As take_job, but never with more parts under way than the budget allows."""
    job = device.expect_job()
    receiver = Receiver(job.tensors)
    while request := receiver.next_request(2):
        device.fetch(receiver, *request)
    have = receiver.num_received
    device.send(Fetch(round=job.round, have=have, first=have, count=0))
    device.train(receiver)
    return job


def test_a_late_update_is_counted_as_late_and_then_as_stale(make_coordinator):
    coordinator = make_coordinator(grace_s=0.0, quorum=0.5, oldest=2)
    look = Looker(coordinator)
    a, b = coordinator.gather()
    training = coordinator.train(work("a", "b"))
    b.take_job()
    a.finish()
    training.result(WAIT_S)
    training = coordinator.train(work("a"), round=2)
    a.take_job()
    a.ping(2)
    found = look()
    assert {client.name: client.phase for client in found.clients} == {"a": "train", "b": "late"}
    assert (found.updates_accepted, found.updates_late, found.updates_stale) == (1, 1, 0)
    b.return_update()
    wait_until(lambda: look().updates_stale == 1, "b's update counts")
    assert (look().returned, look().chosen) == (0, 1), "it does not stand for one of this round"
    a.return_update()
    training.result(WAIT_S)
    found = coordinator.ask(ZmqCohort.snapshot).result(WAIT_S)
    assert (found.updates_accepted, found.updates_late, found.updates_stale) == (2, 1, 1)
    assert found.faults == {"late": 1}
    assert found.bytes_up == sum(client.bytes_up for client in found.clients)
    assert [client.updates for client in found.clients] == [2, 1]


def test_strangers_and_duplicates_are_counted(tmp_path, make_coordinator):
    coordinator = make_coordinator()
    look = Looker(coordinator)
    coordinator.clients()
    a = coordinator.device("a")
    a.join()
    pending_key = coordinator.device("c", keys=make_keys(tmp_path / "other", "device"))
    assert pending_key.refusal()
    rival = coordinator.device("a")
    rival.session = "another program"
    rival.send(rival.make_hello())
    a.expect(Probe)
    assert look.phases() == {"a": "duplicate"}
    a.ping()
    assert rival.expect(Fault).code == "duplicate"
    found = look()
    assert found.strangers >= 1
    assert found.faults == {"duplicate": 1}
    assert [(c.name, c.phase, c.duplicates) for c in found.clients] == [("a", "ready", 1)]


# -- a coordinator ----------------------------------------------------------------------------


@pytest.mark.slow
def test_serve_is_seen_working_and_dead(tmp_path, capsys):
    """By its file, by the command and by HTTP; then it is killed, and resumed to its end."""
    with World(tmp_path, num_devices=1) as world:
        address = f"127.0.0.1:{free_port()}"
        flags = ("--rounds", "4", "--epochs", "20", "--metrics", address, "--log-json")
        server = world.serve(*flags)
        server.wait_said("waiting for devices")
        assert server.said(f"metrics at http://{address}/metrics")
        assert main(["status", "--run-dir", str(world.run_dir), "--json"]) == 0
        seen = json.loads(capsys.readouterr().out)
        assert (seen["health"], seen["status"]["phase"]) == ("running", "waiting for devices")
        assert seen["status"]["pid"] == server.process.pid
        assert seen["status"]["cohort"]["clients"] == []
        assert scrape(int(address.rpartition(":")[2]))["phase", "waiting for devices"] == 1
        device = world.device("a", "--log-json")
        device.wait_said("round 1: job")
        with device.held_in_training() as held:
            wait_until(lambda: client_phase(world.run_dir) in AT_WORK, "a is seen at work")
            server.signal(signal.SIGKILL)
            server.end()
        assert main(["status", "--run-dir", str(world.run_dir)]) == 3
        assert "is gone; go on with --resume" in capsys.readouterr().out
        lines = json_lines(server.text())
        assert {"started", "joined"} <= {line["event"] for line in lines}
        server = world.serve(*flags, "--resume")
        assert server.end() == 0
        assert main(["status", "--run-dir", str(world.run_dir), "--json"]) == 0
        seen = json.loads(capsys.readouterr().out)
        assert (seen["health"], seen["status"]["rounds_done"]) == ("finished", 5 - held)
        assert [row["round"] for row in seen["rounds"]] == [1, 2, 3, 4]
        closed = [line for line in json_lines(server.text()) if line["event"] == "round_closed"]
        assert [(line["round"], line["returned"]) for line in closed] == [
            (round, 1) for round in range(held, 5)
        ]
        assert {line["event"] for line in json_lines(device.text())} >= {"job", "lost", "trained"}
        secret = (world.keys / "server.secret").read_text().split()[-1]
        assert secret not in server.text()


AT_WORK = ("download", "train")  # its trainer may be stopped before it has told of the last part


def client_phase(run_dir: Path) -> str:
    state = read_status(run_dir)
    assert state is not None
    return "".join(client.phase for client in state.cohort.clients)


def json_lines(text: str) -> list[dict[str, object]]:
    """Of stdout and stderr together: the progress of each round is for people."""
    return [json.loads(line) for line in text.splitlines() if not line.startswith("round ")]


def test_a_bad_metrics_address_begins_no_run(tmp_path):
    with World(tmp_path, num_devices=1) as world:
        server = world.serve("--metrics", "here")
        assert server.end() == 2
        assert "--metrics 'here' is not HOST:PORT" in server.text()
        assert not world.run_dir.exists()
