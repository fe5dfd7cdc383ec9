"""What changes while an agent runs, and the line that says what it does now."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from msgspec.structs import replace

from edge_sdk.agent.pipe import Inspected
from edge_sdk.protocol.messages import PROTOCOL, DeviceProfile, Hello, Job, Phase, Update, Welcome
from edge_sdk.version import __version__

HELLO_S = 2.0  # between attempts to be welcomed, grows to HELLO_MAX_S
REFUSED_S = 10.0  # pause after a refused handshake, doubles to REFUSED_MAX_S
HELLO_MAX_S = 15.0
REFUSED_MAX_S = 120.0


def hello(
    client_id: str, session: str, profile: DeviceProfile, inspected: Inspected, job: Job | None
) -> Hello:
    """job: the one in hand."""
    return Hello(
        protocol=PROTOCOL,
        client_id=client_id,
        session=session,
        profile=profile,
        num_examples=inspected.num_examples,
        input_shape=inspected.input_shape,
        num_classes=inspected.num_classes,
        round=job.round if job else 0,
        job=job.id if job else None,
        software=f"edge-sdk {__version__}",
    )


@dataclass
class State:
    """Times are of time.monotonic()."""

    inspected: Inspected | None = None
    welcome: Welcome | None = None  # None: not connected, or not welcomed yet
    terms: Welcome | None = None  # the last welcome there was
    job: Job | None = None
    batches: int = (
        0  # of the job, trained or run through its frozen stages, that the trainer has told of
    )
    is_trained: bool = False  # the job: its update is kept, maybe from before this start
    has_told: bool = False  # that it is trained
    granted: int = 0  # parts of the job asked for so far
    retries: int = 0
    idle_since: float = field(default_factory=time.monotonic)
    waited_s: float = 0.0
    next_hello: float = 0.0
    hello_pause_s: float = HELLO_S
    next_heartbeat: float = 0.0
    reopen_at: float | None = None  # the link is closed until then
    refused_pause_s: float = REFUSED_S
    is_resting: bool = False  # too hot or the battery too low for any job
    is_told: bool = False  # "not reached yet" has been said

    def read_data(self, inspected: Inspected) -> None:
        """Of a trainer that is up; speed is measured by the first one only."""
        if self.inspected and not inspected.gflops:
            known = self.inspected
            inspected = replace(inspected, gflops=known.gflops, layer_s=known.layer_s)
        self.inspected = inspected

    def welcomed(self, welcome: Welcome) -> None:
        self.welcome = self.terms = welcome
        self.hello_pause_s, self.refused_pause_s, self.is_told = HELLO_S, REFUSED_S, False
        self.next_heartbeat = time.monotonic() + welcome.heartbeat_s

    def lost(self) -> None:
        """Not welcome any more: hello is due at once."""
        self.welcome, self.next_hello = None, 0.0

    def begin(self, job: Job) -> None:
        self.job, self.granted, self.retries, self.batches = job, 0, 0, 0
        self.is_trained = self.has_told = False
        self.waited_s = time.monotonic() - self.idle_since

    def finish(self, update: Update) -> Update:
        """The trainer's, with what only the agent knows of the job."""
        self.is_trained = self.has_told = True
        waited = {"wait": Phase(wall_s=self.waited_s)}
        return replace(update, phases={**waited, **update.phases}, retries=self.retries)

    def put_off_hello(self, now: float, is_said: bool) -> None:
        """The next hello is due after a pause that grows where this one left the device: otherwise
        nothing is spared by waiting longer."""
        self.next_hello = now + self.hello_pause_s * random.uniform(0.8, 1.2)
        if is_said:
            self.hello_pause_s = min(HELLO_MAX_S, self.hello_pause_s * 1.3)

    def put_off_reopening(self) -> float:
        """Seconds until the link is opened again, more every time."""
        pause_s = self.refused_pause_s
        self.reopen_at = time.monotonic() + pause_s
        self.refused_pause_s = min(REFUSED_MAX_S, 2 * pause_s)
        return pause_s

    def doing(self, endpoint: str, *, is_restarting: bool = False) -> str:
        """One line for a person, the same as long as nothing changes. is_restarting: there is no
        trainer now."""
        if self.inspected is None:
            return "reading the data"
        if is_restarting:
            return "the training process ended; starting another"
        if self.reopen_at is not None:
            return f"refused by the coordinator {endpoint}; trying again (see the log)"
        if self.job is not None:
            return f"round {self.job.round}: {self.batches} batches done"
        if self.welcome is None:
            return f"waiting for the coordinator {endpoint}"
        if self.is_resting:
            return (
                f"connected to {endpoint}, too hot or the battery too low for a job (see the log)"
            )
        return f"connected to {endpoint}, waiting for a job"
