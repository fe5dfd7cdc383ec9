"""The resident process of a device: link, identity, choice of depth, and a trainer that may die.

It never imports torch or numpy and never holds a tensor: it passes parts between the link and the
training process. One loop; nothing in it waits for training, so heartbeats never do.
"""

from __future__ import annotations

import logging
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from secrets import token_hex

import zmq
from msgspec.structs import replace

from edge_sdk import __version__
from edge_sdk.capacity import Choice, SegmentCost, choose_exit
from edge_sdk.errors import DataError, EdgeError, LinkError, ProtocolError, TrainerError
from edge_sdk.pipe import Cancel, Estimate, Estimated, Inspected, Pipe, PipeMessage, Resume
from edge_sdk.profile import DeviceProfile
from edge_sdk.transport import Link, Payload
from edge_sdk.wire import (
    PROTOCOL,
    Accepted,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Job,
    Message,
    Part,
    Phase,
    Ready,
    Update,
    Welcome,
)

log = logging.getLogger(__name__)
HELLO_S = 2.0  # between attempts to be welcomed, grows to HELLO_MAX_S
HELLO_MAX_S = 15.0
REFUSED_S = 10.0  # pause after a refused handshake, grows to REFUSED_MAX_S
REFUSED_MAX_S = 120.0
SILENT_HEARTBEATS = 12  # unanswered ones before the connection is made anew
GROWN = 1.25  # memory must have grown so much before a failed exit is tried again
FATAL = {"version", "admission", "data"}


@dataclass(frozen=True)
class AgentOptions:
    """What `edge-sdk run` was told. measure(own_bytes): the profile now, own_bytes being what the
    trainer holds already; it is called every heartbeat and must be cheap."""

    client_id: str
    data: str
    measure: Callable[[int], DeviceProfile]
    threads: int = 0  # 0: torch's default
    device: str = "cpu"
    measure_compute: bool = True
    imports: tuple[str, ...] = ()
    is_once: bool = False  # end when the coordinator's run ends


class Trainer:
    """The training process and its pipe."""

    def __init__(self, options: AgentOptions) -> None:
        ours, theirs = socket.socketpair()
        command = [
            sys.executable, "-m", "edge_sdk.worker", "--fd", str(theirs.fileno()),
            "--data", options.data, "--threads", str(options.threads), "--device", options.device,
        ]  # fmt: skip
        command += ["--measure-compute"] if options.measure_compute else []
        command += [part for module in options.imports for part in ("--import", module)]
        self.process = subprocess.Popen(
            command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self.pipe = Pipe(ours)

    def send(self, message: PipeMessage, payload: Payload = b"") -> None:
        """A message to a dead trainer is dropped; its end shows when the pipe is read."""
        try:
            self.pipe.send(message, payload)
        except OSError as error:
            log.debug("trainer is gone: %s", error)

    def resident_bytes(self) -> int:
        import psutil

        try:
            return int(psutil.Process(self.process.pid).memory_info().rss)
        except psutil.Error:
            return 0

    def end(self) -> int:
        """Stop it now; its exit status (negative: a signal)."""
        self.pipe.close()
        self.process.kill()
        return self.process.wait()

    def cause_of_death(self) -> str:
        status = self.process.wait()
        self.pipe.close()
        if status == -signal.SIGKILL:
            return "killed by signal 9, most likely for memory"
        return f"ended by signal {-status}" if status < 0 else f"ended with status {status}"


@dataclass
class _State:
    """What changes while the agent runs."""

    inspected: Inspected | None = None
    welcome: Welcome | None = None
    costs: tuple[SegmentCost, ...] = ()
    choice: Choice | None = None
    ceiling: int = 0  # exits from here on failed for memory; 0: none did
    ceiling_bytes: int = 0  # memory that was available then
    round: int = 0  # job in hand
    retries: int = 0
    wait: float = field(default_factory=time.monotonic)  # idle since
    waited_s: float = 0.0
    next_hello: float = 0.0
    hello_pause_s: float = HELLO_S
    refused_pause_s: float = REFUSED_S
    next_heartbeat: float = 0.0
    unanswered: int = 0
    reopen_at: float | None = None
    is_told: bool = False  # "not reached yet" has been said


class Agent:
    """run() returns when the run is over (is_once), on stop(), or raises an EdgeError."""

    def __init__(self, link: Link, options: AgentOptions) -> None:
        self._link = link
        self._options = options
        self._session = token_hex(8)
        self._trainer = Trainer(options)
        self._state = _State()
        self._is_stopping = False

    def stop(self) -> None:
        """Ask run() to end; for signal handlers."""
        self._is_stopping = True

    def run(self) -> None:
        try:
            while not self._is_stopping:
                self._wait_for_events()
                self._read_trainer()
                self._read_link()
                self._on_time()
            self._link.send(Bye(reason="device stopped"))
        finally:
            self._trainer.end()
            self._link.close()

    # -- events ------------------------------------------------------------------------------

    def _wait_for_events(self) -> None:
        """Sleep until a socket has something or half a second passed."""
        poller = zmq.Poller()
        poller.register(self._trainer.pipe, zmq.POLLIN)
        if self._link.socket is not None and self._link.monitor is not None:
            poller.register(self._link.socket, zmq.POLLIN)
            poller.register(self._link.monitor, zmq.POLLIN)
        self._ready = {key for key, _ in poller.poll(500)}

    def _read_trainer(self) -> None:
        if self._trainer.pipe.fileno() not in self._ready and self._trainer.pipe not in self._ready:
            return
        try:
            message, payload = self._trainer.pipe.receive()
        except (EOFError, ConnectionResetError):
            self._on_trainer_death()
            return
        self._from_trainer(message, payload)

    def _read_link(self) -> None:
        is_lost, refusal = self._link.events()
        if refusal:
            self._on_refusal(refusal)
            return
        if is_lost and self._state.welcome:
            log.warning("connection to %s lost; reconnecting", self._link.endpoint)
            self._state.welcome = None
        for _ in range(64):  # then look at the trainer and the clock again
            try:
                received = self._link.receive()
            except ProtocolError as error:
                log.error("message from the coordinator refused: %s", error)
                self._link.send(Fault(code=error.code, detail=str(error)[:2000]))
                continue
            if received is None:
                return
            self._state.unanswered = 0
            self._from_coordinator(*received)

    def _on_time(self) -> None:
        """Hello until welcomed, heartbeats afterwards; notice a silent coordinator."""
        state, now = self._state, time.monotonic()
        if state.reopen_at is not None:
            if now >= state.reopen_at:
                state.reopen_at = None
                self._link.open()
            return
        if state.welcome is None:
            if state.inspected and now >= state.next_hello:
                self._say_hello(now)
            return
        if now < state.next_heartbeat:
            return
        state.next_heartbeat = now + state.welcome.heartbeat_s
        state.unanswered += 1
        is_sent = self._link.send(Heartbeat(round=state.round))
        if not is_sent or state.unanswered > SILENT_HEARTBEATS:
            log.warning("no answer from %s; connecting anew", self._link.endpoint)
            state.welcome, state.unanswered, state.next_hello = None, 0, now
            self._link.open()
        elif state.round == 0:
            self._choose()  # memory may have changed

    # -- coordinator -------------------------------------------------------------------------

    def _say_hello(self, now: float) -> None:
        state, inspected = self._state, self._state.inspected
        assert inspected is not None
        is_sent = self._link.send(
            Hello(
                protocol=PROTOCOL,
                client_id=self._options.client_id,
                session=self._session,
                profile=self._profile(),
                num_examples=inspected.num_examples,
                input_shape=inspected.input_shape,
                num_classes=inspected.num_classes,
                round=state.round,
                software=f"edge-sdk {__version__}",
            )
        )
        if not is_sent and not state.is_told:
            log.info("coordinator %s not reached yet; waiting for it", self._link.endpoint)
            state.is_told = True
        state.next_hello = now + state.hello_pause_s * random.uniform(0.8, 1.2)
        state.hello_pause_s = min(HELLO_MAX_S, state.hello_pause_s * 1.3)

    def _from_coordinator(self, message: Message, payload: Payload | None) -> None:
        state = self._state
        if isinstance(message, Welcome):
            self._on_welcome(message)
        elif isinstance(message, Job):
            self._on_job(message)
        elif isinstance(message, Part) and message.round == state.round:
            self._trainer.send(message, payload or b"")
        elif isinstance(message, Fetch) and message.round == state.round:
            self._trainer.send(message)
        elif isinstance(message, Accepted) and message.round == state.round:
            log.info("round %d: update accepted", message.round)
            self._end_job()
        elif isinstance(message, Fault):
            self._on_fault(message)
        elif isinstance(message, Bye):
            log.info("coordinator: %s", message.reason or "bye")
            state.welcome = None
            self._end_job()
            self._is_stopping = self._options.is_once

    def _on_welcome(self, welcome: Welcome) -> None:
        state = self._state
        if welcome.protocol != PROTOCOL:
            raise LinkError(f"coordinator speaks protocol {welcome.protocol}, this is {PROTOCOL}")
        log.info(
            "welcome to run %s: %s, %d exits", welcome.run, welcome.model.family, welcome.model.exit
        )
        state.welcome = welcome
        state.hello_pause_s, state.refused_pause_s, state.is_told = HELLO_S, REFUSED_S, False
        state.next_heartbeat = time.monotonic() + welcome.heartbeat_s
        state.choice = None
        self._trainer.send(Estimate(model=welcome.model, plan=welcome.plan))
        if state.round:
            state.retries += 1
            self._trainer.send(Resume())

    def _on_job(self, job: Job) -> None:
        state = self._state
        if state.round:
            self._trainer.send(Cancel())
        refused = self._refusal(job)
        if refused:
            log.warning("round %d: job refused, %s", job.round, refused)
            self._link.send(Fault(code="capacity", detail=refused, round=job.round))
            return
        stages = ", ".join(f"{g.first}-{g.last}" for g in job.plan.segments)
        log.info("round %d: job for stages %s", job.round, stages)
        state.round, state.retries = job.round, 0
        state.waited_s = time.monotonic() - state.wait
        self._trainer.send(job)

    def _refusal(self, job: Job) -> str:
        """Why the job is more than this device said it can do; "" when it is not."""
        choice = self._state.choice
        if choice is None:
            return "this device has not chosen an exit yet"
        for segment in job.plan.segments:
            is_prefix = segment.first == 1 and segment.last <= choice.exit
            is_stage = segment.first == segment.last and (
                segment.first in choice.stages or 1 < segment.first <= choice.exit
            )
            if not (is_prefix or is_stage):
                return (
                    f"stages {segment.first}-{segment.last} asked for, this device can train up to "
                    f"exit {choice.exit} and stages {list(choice.stages)} alone: {choice.reason}"
                )
        return ""

    def _on_fault(self, fault: Fault) -> None:
        state = self._state
        if fault.code == "hello":
            state.welcome, state.next_hello = None, 0.0
            return
        if fault.code in FATAL:
            error = DataError if fault.code == "data" else LinkError
            raise error(f"coordinator refused this device: {fault.detail}")
        log.warning("coordinator: %s: %s", fault.code, fault.detail)
        if fault.round and fault.round == state.round:
            self._trainer.send(Cancel())
            self._end_job()

    def _on_refusal(self, refusal: str) -> None:
        """A handshake that cannot succeed as things are: say so once a try, and back off."""
        state = self._state
        log.error("%s: %s; next try in %.0f s", self._link.endpoint, refusal, state.refused_pause_s)
        self._link.close()
        state.welcome = None
        state.reopen_at = time.monotonic() + state.refused_pause_s
        state.refused_pause_s = min(REFUSED_MAX_S, state.refused_pause_s * 2)

    def _end_job(self) -> None:
        state = self._state
        if state.round and state.welcome is None:
            self._trainer.send(Cancel())
        state.round, state.wait = 0, time.monotonic()
        if state.welcome:
            self._choose(is_repeated=True)

    # -- trainer -----------------------------------------------------------------------------

    def _from_trainer(self, message: PipeMessage, payload: memoryview) -> None:
        state = self._state
        if isinstance(message, Inspected):
            is_first = state.inspected is None
            state.inspected = message
            if is_first and message.num_labels == 1:
                log.warning("all %d local examples have one label", message.num_examples)
            if not is_first and state.welcome:  # a trainer that replaced a dead one
                self._trainer.send(Estimate(model=state.welcome.model, plan=state.welcome.plan))
        elif isinstance(message, Estimated):
            state.costs = message.costs
            self._choose(is_repeated=True)
        elif isinstance(message, Update):
            waited = {"wait": Phase(wall_s=state.waited_s)}
            full = replace(message, phases={**waited, **message.phases}, retries=state.retries)
            log.info("round %d: trained, sending the update", message.round)
            self._link.send(full)
        elif isinstance(message, Part):
            self._link.send(message, payload)
        elif isinstance(message, Fetch):
            self._link.send(message)
        elif isinstance(message, Fault):
            self._on_trainer_fault(message)

    def _on_trainer_fault(self, fault: Fault) -> None:
        if self._state.inspected is None:
            raise DataError(fault.detail) if fault.code == "data" else TrainerError(fault.detail)
        if fault.code == "cancelled":
            return
        log.error("training failed: %s", fault.detail)
        if fault.round and fault.round == self._state.round:
            self._link.send(fault)
            if fault.code == "capacity":
                self._step_down()
            self._end_job()

    def _on_trainer_death(self) -> None:
        """Report it, choose a shallower exit if it was killed at work, start another."""
        state = self._state
        cause = self._trainer.cause_of_death()
        if state.inspected is None:
            raise TrainerError(f"the training process {cause} before it had read its data")
        log.error("the training process %s", cause)
        self._trainer = Trainer(replace_measuring(self._options))
        if state.round:
            detail = f"the training process {cause}"
            self._link.send(Fault(code="trainer", detail=detail, round=state.round))
            if "signal 9" in cause:
                self._step_down()
            state.round, state.wait, state.choice = 0, time.monotonic(), None

    def _step_down(self) -> None:
        """The exit that failed is not tried again while memory stays what it is."""
        choice = self._state.choice
        if choice and choice.exit > 1:
            self._state.ceiling = choice.exit
            self._state.ceiling_bytes = self._profile().memory_available_bytes
            log.warning("training exit %d failed here; one exit less from now on", choice.exit)

    # -- choice ------------------------------------------------------------------------------

    def _profile(self) -> DeviceProfile:
        profile = self._options.measure(self._trainer.resident_bytes())
        inspected = self._state.inspected
        if inspected and inspected.gflops:
            profile = replace(profile, gflops=inspected.gflops)
        return profile

    def _choose(self, is_repeated: bool = False) -> None:
        """Choose the exit for the memory there is now; tell the coordinator when it changed."""
        state = self._state
        if not (state.welcome and state.costs and state.inspected):
            return
        profile = self._profile()
        if profile.memory_available_bytes > GROWN * state.ceiling_bytes:
            state.ceiling = 0
        costs = [c for c in state.costs if not state.ceiling or c.last < state.ceiling]
        try:
            choice = choose_exit(
                costs,
                profile,
                deadline_s=state.welcome.deadline_s or None,
                num_examples=state.inspected.num_examples,
                epochs=state.welcome.plan.epochs,
            )
        except EdgeError as error:
            log.error("no exit can be chosen: %s", error)
            return
        old, state.choice = state.choice, choice
        is_same = old is not None and (old.exit, old.stages) == (choice.exit, choice.stages)
        if is_same and not is_repeated:
            return
        if not is_same:
            if choice.exit:
                log.info("training up to exit %d; %s", choice.exit, choice.reason)
            else:
                log.error("this device is too small for exit 1: %s", choice.reason)
        self._link.send(Ready(exit=choice.exit, stages=choice.stages, reason=choice.reason))


def replace_measuring(options: AgentOptions) -> AgentOptions:
    """Options of a trainer that replaces a dead one: compute is known already."""
    return AgentOptions(**{**options.__dict__, "measure_compute": False})
