"""`edge_sdk.Client`: in one's own program against real coordinators."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from edge_sdk import Event
from edge_sdk.errors import DataError, EdgeError
from edge_sdk.protocol.messages import Bye, Fault, Hello, Ready
from tests.support import devices
from tests.support.agent import MODEL, WHOLE
from tests.support.client_program import client
from tests.support.coordinator import ScriptedCoordinator
from tests.support.processes import PATIENCE_S, ROOT, World, environment

pytestmark = pytest.mark.usefixtures("shards_folder")
FAMILY = """
import msgspec
from edge_sdk import models
from edge_sdk.protocol.messages import ModelSpec

def build(spec: ModelSpec):
    return models.build(msgspec.structs.replace(spec, family="mlp"))

models.register_family("mine", build)
"""


def kinds(events: list[Event]) -> list[str]:
    """In order; what a device chose depends on the machine's memory, and may change."""
    return [event.kind for event in events if event.kind != "chosen"]


# -- whole runs ---------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    with World(tmp_path, num_devices=1) as world:
        yield world


def home_of(world: World) -> dict[str, object]:
    return {"insecure": False, "id": "a", "keys": world.folder / "a"}


@pytest.mark.slow
def test_arrays_and_an_own_family_train_a_run(world, shards_folder, tmp_path, monkeypatch):
    """The module is found by sys.path alone in the training process."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "family_of_test_client.py").write_text(FAMILY)
    monkeypatch.setenv("PYTHONPATH", f"{modules}{os.pathsep}{ROOT}")
    server = world.serve(
        "--rounds", "2", "--import", "family_of_test_client", "--model", "mine", "--exits", "2"
    )
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.syspath_prepend(modules)
    monkeypatch.syspath_prepend(ROOT)
    shard = world.shards["a"]
    events: list[Event] = []
    modes: set[int] = set()

    def on_event(event: Event) -> None:
        events.append(event)
        modes.update(stat.S_IMODE(path.stat().st_mode) for path in shards_folder.rglob("*"))

    client(
        (shard.x, shard.y),
        world.endpoint,
        **home_of(world),
        imports=["family_of_test_client"],
        on_event=on_event,
    ).run()
    assert server.end() == 0
    assert world.outcomes("a") == {1: "ok", 2: "ok"}
    one_round = ["job", "trained", "accepted"]
    assert kinds(events) == ["connected", *one_round, *one_round, "ended"]
    assert modes == {0o700, 0o600}
    first = {event.kind: event for event in reversed(events)}
    chosen, job, trained = first["chosen"], first["job"], first["trained"]
    assert (chosen.exit, job.round, trained.round) == (2, 1, 1)
    assert [(segment.first, segment.last) for segment in job.segments] == [(1, 2)]
    assert [result.exit for result in trained.exits] == [1, 2]
    assert trained.seconds > 0
    assert events[-1].detail == "coordinator: run finished"


@pytest.mark.slow
def test_a_dataset_trains_though_the_callback_raises(world, caplog):
    server = world.serve("--rounds", "1")
    shard = world.shards["a"]
    dataset = TensorDataset(torch.from_numpy(shard.x), torch.from_numpy(shard.y))
    heard = []

    def on_event(event: Event) -> None:
        heard.append(event)
        raise ValueError("of the program")

    client(dataset, world.endpoint, **home_of(world), on_event=on_event).run()
    assert server.end() == 0
    assert world.outcomes("a") == {1: "ok"}
    assert kinds(heard) == ["connected", "job", "trained", "accepted", "ended"]
    (record,) = [record for record in caplog.records if "on_event raised" in record.message]
    assert "at 'connected'" in record.message
    assert record.exc_info[0] is ValueError


@pytest.mark.slow
def test_the_example_program(world):
    home = world.folder / "program"
    home.mkdir()
    shard = world.shards.pop("a")
    world.admit("pi-1", shard)
    shutil.copytree(world.folder / "pi-1", home / "keys")
    np.save(home / "x.npy", shard.x)
    np.save(home / "y.npy", shard.y)
    program = [sys.executable, str(ROOT / "examples" / "client.py"), world.endpoint]
    server = world.serve("--rounds", "1")
    ended = subprocess.run(
        [*program, "x.npy", "y.npy"],
        capture_output=True,
        text=True,
        cwd=home,
        check=False,
        env=environment(world.mark) | {"PYTHONPATH": str(ROOT)},
        timeout=3 * PATIENCE_S,
    )
    assert ended.returncode == 0, ended.stderr
    assert server.end() == 0
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("connected 0 welcome to run")
    assert "accepted 1 update accepted" in lines
    assert any(
        re.fullmatch(r"  exit 1: loss \d\.\d{3}, accuracy [01]\.\d\d", line) for line in lines
    )
    assert lines[-1] == "ended 0 coordinator: run finished"


@pytest.mark.slow
def test_faults_and_a_lost_coordinator_are_told(monkeypatch):
    monkeypatch.setattr(devices, "WAIT_S", PATIENCE_S)
    coordinator = ScriptedCoordinator()
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if event.kind == "lost":
            device.stop()

    device = client(coordinator=coordinator.endpoint, on_event=on_event)
    thread = threading.Thread(target=device.run)
    thread.start()
    try:
        coordinator.expect(Hello)
        coordinator.welcome(MODEL, WHOLE)
        coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
        coordinator.send(Fault(code="round", detail="too late", round=7))
        coordinator.send(Bye(reason="back soon"))
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    finally:
        device.stop()
        thread.join(PATIENCE_S)
        coordinator.close()
    assert kinds(events) == ["connected", "failed", "lost", "ended"]
    failed, lost = events[-3:-1]
    assert (failed.code, failed.round, failed.detail) == (
        "round",
        7,
        "coordinator: round: too late",
    )
    assert (lost.detail, events[-1].detail) == ("coordinator: back soon", "device stopped")


# -- the end --------------------------------------------------------------------------------------


@pytest.fixture
def when_waiting(caplog):
    """Calls `then` in another thread when the agent waits for its coordinator."""
    caplog.set_level(logging.INFO, "edge_sdk")
    log = logging.getLogger("edge_sdk.agent.agent")

    def call(then) -> None:
        def see(record: logging.LogRecord) -> bool:
            if "waiting for it" in record.getMessage():
                threading.Thread(target=then).start()
            return True

        log.addFilter(see)

    yield call
    log.filters.clear()


@pytest.mark.slow
def test_stop_from_another_thread(when_waiting):
    events: list[Event] = []
    device = client(on_event=events.append)
    again: list[EdgeError] = []

    def stop() -> None:
        try:
            device.run()
        except EdgeError as error:
            again.append(error)
        device.stop()

    when_waiting(stop)
    device.run()
    assert events == [Event("ended", "device stopped")]
    assert "runs already" in str(again[0])
    device.run()  # stopped for good
    assert len(events) == 1


@pytest.mark.slow
def test_ctrl_c_ends_run(when_waiting):
    """As a program gets it that has no handler of its own."""
    import _thread

    events: list[Event] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        when_waiting(_thread.interrupt_main)
        client(on_event=events.append).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [event.kind for event in events] == ["ended"]


def test_no_shard_is_left_after_an_error(tmp_path, monkeypatch):
    """The training process fails: it imports the module, which is there and broken."""
    (tmp_path / "broken_of_test_client.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EdgeError, match="no_such_module_anywhere"):
        client(imports=["broken_of_test_client"]).run()


def test_a_file_is_read_by_the_training_process_only(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        client(tmp_path / "nowhere.npz").run()
