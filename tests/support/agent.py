"""The real agent in a thread, with its real training process, and what a scripted coordinator gives
it to do."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from msgspec.structs import replace

from edge_sdk.agent.agent import Agent
from edge_sdk.agent.options import AgentOptions
from edge_sdk.agent.own_model import OwnModel
from edge_sdk.agent.pipe import TrainerOptions
from edge_sdk.data.loading import Examples, save_shard
from edge_sdk.errors import EdgeError
from edge_sdk.hardware.conditions import Conditions
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.link import Link
from edge_sdk.protocol.messages import (
    Accepted,
    DeviceProfile,
    Fault,
    Heartbeat,
    Hello,
    ModelSpec,
    Plan,
    Ready,
    Segment,
    Update,
)
from edge_sdk.protocol.tensor_lists import needed_names
from edge_sdk.protocol.tensors import Tensors
from tests.support.coordinator import ScriptedCoordinator
from tests.support.devices import PROFILE, WAIT_S
from tests.support.examples import cnn

GIB = 1024**3
MODEL = cnn()  # three exits
WHOLE = Plan(segments=(Segment(first=1, last=3),), batch_size=8)
LONG = replace(WHOLE, epochs=100_000)  # hours


class Device:
    """An agent that runs in a thread. A test may change its `memory_bytes` and `conditions`."""

    def __init__(
        self,
        link: Link,
        data: Path,
        *,
        is_once: bool = False,
        notify_socket: str = "",
        imports: tuple[str, ...] = (),
        search_path: tuple[str, ...] = (),
        own_model: OwnModel | None = None,
    ) -> None:
        self.data = data
        self.memory_bytes = 64 * GIB
        self.conditions = Conditions()
        self.error: EdgeError | None = None
        self.agent = Agent(
            link,
            AgentOptions(
                client_id="device",
                trainer=TrainerOptions(
                    data=str(data), threads=1, measure_compute=False, imports=imports
                ),
                measure=self.measure,
                conditions=lambda: self.conditions,
                is_once=is_once,
                notify_socket=notify_socket,
                search_path=search_path,
                own_model=own_model,
            ),
        )
        # Pauses that are seconds on a board, like those in quick_retries.
        self.agent._state.hello_pause_s = self.agent._state.refused_pause_s = 0.1
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def measure(self, own_bytes: int) -> DeviceProfile:
        return replace(PROFILE, memory_available_bytes=self.memory_bytes, memory_bound="cap")

    def trainer(self) -> psutil.Process:
        """Its training process."""
        process = self.agent._trainer.process
        assert process is not None
        return psutil.Process(process.pid)

    def ends(self) -> EdgeError | None:
        """Wait for the end of run(); what it raised."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self.error

    def stop(self) -> None:
        self.agent.stop()
        self.ends()

    def _run(self) -> None:
        try:
            self.agent.run()
        except EdgeError as error:
            self.error = error


class Lines(logging.Handler):
    """The agent's lines of log with this text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.count = 0
        self.events: list[str] = []
        self._text = text
        self._is_there = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            self.count += 1
            self.events.append(getattr(record, "event", "log"))
            self._is_there.set()

    def wait_for_one(self) -> None:
        assert self._is_there.wait(WAIT_S), f"no line says {self._text!r}"


@contextmanager
def listening(text: str) -> Iterator[Lines]:
    lines = Lines(text)
    logger = logging.getLogger("edge_sdk.agent.agent")
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)


@contextmanager
def running(
    endpoint: str, data: Path, examples_there: Examples | None = None, **options: Any
) -> Iterator[Device]:
    """A device of its own for one test."""
    if examples_there is not None:
        save_shard(data, examples_there)
    device = Device(Link(endpoint, None, None), data, **options)
    try:
        yield device
    finally:
        device.stop()


def settle(coordinator: ScriptedCoordinator, device: Device) -> None:
    device.memory_bytes = 64 * GIB
    coordinator.drain()
    # says hello anyway if its link was lost
    coordinator.router.send(coordinator.route, Fault(code="hello", detail="say it again"))
    coordinator.wait_for(Hello)
    coordinator.run += 1
    coordinator.welcome(MODEL, LONG)  # of another run: a job in hand is dropped
    coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
    coordinator.wait_for(Heartbeat, lambda heartbeat: heartbeat.round == 0)


def job_tensors(plan: Plan, spec: ModelSpec = MODEL) -> Tensors:
    initial = initial_tensors(spec, 0)
    return {name: initial[name] for name in needed_names(initial, plan.segments)}


def give(coordinator: ScriptedCoordinator, round: int, plan: Plan) -> None:
    """A job with all its parts."""
    sender = coordinator.give(round, MODEL, plan, job_tensors(plan))
    coordinator.serve_parts(round, sender)


def finish(coordinator: ScriptedCoordinator, round: int, plan: Plan = WHOLE) -> Update:
    """A whole job; the device is ready afterwards."""
    give(coordinator, round, plan)
    update = coordinator.expect(Update)
    assert update.round == round
    coordinator.fetch_update(update)
    coordinator.send(Accepted(round=round))
    coordinator.expect(Ready)
    return update
