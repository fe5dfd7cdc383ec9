"""A coordinator that wants a device to fail, over a real ROUTER socket, and a real `edge-sdk run`,
whose memory and lines are looked at from outside."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psutil

from edge_sdk.data.loading import save_shard
from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.messages import Hello, Message, Plan, Ready
from tests.support.agent import LONG, MODEL
from tests.support.coordinator import ScriptedCoordinator
from tests.support.devices import WAIT_S
from tests.support.examples import examples
from tests.support.processes import HOST_GFLOPS, Running, kill_marked

MIB = 1024**2
LEFT = "next try in"
TOLD = 10_000  # characters of the device's log


class Attack:
    """One device under attack. peak: the most bytes that its agent, and its trainer with all that
    it forks, had resident since forget_peaks()."""

    def __init__(self, coordinator: ScriptedCoordinator, agent: Running) -> None:
        self.coordinator, self.agent = coordinator, agent
        self._process = psutil.Process(agent.process.pid)
        self._is_over = threading.Event()
        self.forget_peaks()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def forget_peaks(self) -> None:
        self.agent_bytes = self.trainer_bytes = 0

    def rest_bytes(self) -> tuple[int, int]:
        """What agent and trainer have resident now."""
        trainer = sum(child.memory_info().rss for child in self._process.children(recursive=True))
        return self._process.memory_info().rss, trainer

    def welcome(self, plan: Plan = LONG) -> Ready:
        """Let the device in, until it can train all of the model."""
        self.coordinator.wait_for(Hello)
        self.coordinator.welcome(MODEL, plan, heartbeat_s=1.0)
        return self.coordinator.wait_for(Ready, lambda ready: ready.exit == 3)

    def flood(self, next_message: Callable[[], tuple[Message, Payload | None]], most: int) -> int:
        """Send as fast as the device takes it, until it has left; how many it took."""
        coordinator, sent, until = self.coordinator, 0, time.monotonic() + WAIT_S
        while sent < most and not self.agent.said(LEFT):
            message, payload = next_message()
            while not coordinator.router.send(coordinator.route, message, payload):
                coordinator.router.socket.poll(5)  # its queue is full, or it has left
                if self.agent.said(LEFT) or time.monotonic() > until:
                    return sent
                coordinator.drain()
            sent += 1
        return sent

    def num_lines(self) -> int:
        return len(self.agent.text().splitlines())

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.01):
            with contextlib.suppress(psutil.Error):
                agent, trainer = self.rest_bytes()
                self.agent_bytes = max(self.agent_bytes, agent)
                self.trainer_bytes = max(self.trainer_bytes, trainer)


@contextlib.contextmanager
def attacked(folder: Path, *flags: str) -> Iterator[Attack]:
    """A device that knows this coordinator only, and has said nothing yet."""
    mark, coordinator = uuid4().hex, ScriptedCoordinator()
    folder.mkdir(parents=True, exist_ok=True)
    save_shard(folder / "data.npz", examples(24))
    command = ["tests.support.fast_device_program", "run", "--insecure", "--id", "device"]
    command += ["--coordinator", coordinator.endpoint, "--data", str(folder / "data.npz")]
    command += ["--board", "raspberry-pi-4", "--host-gflops", HOST_GFLOPS, "--threads", "1"]
    agent = Running("device", [*command, *flags], folder / "log", mark)
    attack = Attack(coordinator, agent)
    try:
        yield attack
    finally:
        print(agent.text()[-TOLD:])  # which pytest shows beside a failure
        attack.close()
        kill_marked(mark)
        agent.process.wait()
        coordinator.close()
