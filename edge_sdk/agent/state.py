"""What changes while an agent runs, and the line that says what it does now."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from msgspec.structs import replace

from edge_sdk.agent.job_watch import JobWatch
from edge_sdk.agent.pipe import Inspected, Keep, Train
from edge_sdk.agent.transfer import Transfer
from edge_sdk.protocol.messages import PROTOCOL, DeviceProfile, Hello, Job, Phase, Update, Welcome
from edge_sdk.version import __version__

HELLO_S = 2.0  # between attempts to be welcomed, grows to HELLO_MAX_S
REFUSED_S = 10.0  # pause after a refused handshake, doubles to REFUSED_MAX_S
HELLO_MAX_S = 15.0
UNANSWERED_S = 15.0  # until unanswered hellos are logged, then when that has doubled
LEAST_UNANSWERED = 3  # one or two may have been lost with a coordinator that was restarted
UNANSWERED = (
    "coordinator %s: connected, but no answer to hello for %.0f s; it may be busy; is it an "
    "edge-coordinator?"
)
ABSENCE_S = 600.0  # between two lines that say the same of an absent coordinator
LEAST_HEARTBEAT_S = 0.1
OF_DATA = (  # in a hello
    *("num_examples", "input_shape", "num_classes", "task", "vocabulary", "scaling", "class_names"),
)
REFUSED_MAX_S = 120.0


def hello(
    client_id: str, session: str, profile: DeviceProfile, inspected: Inspected, job: Job | None
) -> Hello:
    """The first message of a connection. job: the one in hand."""
    return Hello(
        protocol=PROTOCOL,
        client_id=client_id,
        session=session,
        profile=profile,
        num_examples=inspected.num_examples,
        input_shape=inspected.input_shape,
        num_classes=inspected.num_classes,
        task=inspected.task,
        vocabulary=inspected.vocabulary,
        scaling=inspected.scaling,
        class_names=inspected.class_names,
        round=job.round if job else 0,
        job=job.id if job else None,
        software=f"edge-sdk {__version__}",
    )


@dataclass
class State:
    """What the agent knows of trainer, coordinator and job. Times are those of time.monotonic()."""

    inspected: Inspected | None = None  # None: the trainer has not read its data yet
    welcome: Welcome | None = None  # None: not connected, or not welcomed yet
    last_welcome: Welcome | None = None  # stays when the connection is lost
    job: Job | None = None
    watch: JobWatch = field(default_factory=JobWatch)
    transfer: Transfer = field(default_factory=Transfer)
    is_trained: bool = False  # the job has a saved update, maybe from before this start
    is_result_logged: bool = False  # by this process, that the job is trained
    retries: int = 0  # how often the job went on after a lost connection
    idle_since: float = field(default_factory=time.monotonic)
    waited_s: float = 0.0
    next_hello: float = 0.0
    hello_pause_s: float = HELLO_S
    num_unanswered: int = 0  # hellos that left this device since it last heard anything
    unanswered_s: float = 0.0  # waited for an answer to them, while there was a connection
    tell_unanswered_s: float = UNANSWERED_S
    said_hello_at: float = 0.0
    next_heartbeat: float = 0.0
    reopen_at: float | None = None  # the link is closed until then
    refused_pause_s: float = REFUSED_S
    accepted: Keep | None = None  # the last update that was
    is_resting: bool = False  # too hot or the battery too low for any job
    absence: str = ""  # why the coordinator is not reached, as it was logged last
    tell_absence_at: float = 0.0  # again

    def note_inspected(self, inspected: Inspected) -> bool:
        """Remember what a trainer found; whether its data are not those that hello told of. Only
        the first one measures speed: that is carried on."""
        known, self.inspected = self.inspected, inspected
        if known and not inspected.gflops:
            self.inspected = replace(inspected, gflops=known.gflops, layer_s=known.layer_s)
        return known is not None and any(
            getattr(known, name) != getattr(inspected, name) for name in OF_DATA
        )

    def mark_welcomed(self, welcome: Welcome) -> None:
        self.welcome = self.last_welcome = welcome
        self.hello_pause_s, self.absence = HELLO_S, ""
        self.put_off_heartbeat(time.monotonic())

    def put_off_heartbeat(self, now: float) -> None:
        assert self.welcome is not None
        self.next_heartbeat = now + max(LEAST_HEARTBEAT_S, self.welcome.heartbeat_s)

    def mark_lost(self) -> None:
        """The connection is gone, so a hello is due at once."""
        self.welcome, self.next_hello = None, 0.0

    def begin_job(self, job: Job, adapted: Job, predicted_s: float, cache_bytes: int) -> Train:
        """What the trainer is asked for. adapted: the job as it is trained here."""
        assert self.welcome is not None
        self.job, self.retries = job, 0
        self.watch, self.transfer = JobWatch(predicted_s, job.deadline_s), Transfer(job.tensors)
        self.is_trained = self.is_result_logged = False
        self.waited_s = time.monotonic() - self.idle_since
        run = self.welcome.run
        return Train(job=adapted, run=run, cache_bytes=cache_bytes, accepted=self.accepted)

    def mark_accepted(self) -> Keep:
        """The update of the job in hand counts, so its coordinator is a good one. Returns what the
        trainer is told of it."""
        assert self.job is not None
        assert self.last_welcome is not None
        run, self.refused_pause_s = self.last_welcome.run, REFUSED_S
        self.accepted = Keep(run=run, round=self.job.round, job=self.job.id)
        return self.accepted

    def complete(self, update: Update) -> Update:
        """The trainer's update with what only the agent knows of the job: how long the device had
        waited for it, and how often the connection was lost meanwhile."""
        self.is_trained = self.is_result_logged = True
        self.transfer.announce(update)
        waited = {"wait": Phase(wall_s=self.waited_s)}
        return replace(update, phases={**waited, **update.phases}, retries=self.retries)

    def is_news(self, absence: str, now: float) -> bool:
        """Whether this reason, why the coordinator is not reached, is to be logged now."""
        if not absence or (absence == self.absence and now < self.tell_absence_at):
            return False
        self.absence, self.tell_absence_at = absence, now + ABSENCE_S
        return True

    def put_off_hello(self, now: float, is_said: bool) -> float:
        """Set when the next hello is due. The pause grows only if this one left the device
        (is_said): waiting longer for a connection that is not there spares nobody. Returns the
        seconds that those before it have had no answer, where that is to be logged, else 0."""
        self.next_hello = now + self.hello_pause_s * random.uniform(0.8, 1.2)
        if not is_said:
            return 0.0
        self.hello_pause_s = min(HELLO_MAX_S, self.hello_pause_s * 1.3)
        if not self.num_unanswered:
            self.unanswered_s, self.tell_unanswered_s = 0.0, UNANSWERED_S
        else:  # no longer than between two on one connection
            self.unanswered_s += min(now - self.said_hello_at, 1.2 * HELLO_MAX_S)
        self.num_unanswered, self.said_hello_at = self.num_unanswered + 1, now
        is_long = self.unanswered_s >= self.tell_unanswered_s
        if not is_long or self.num_unanswered <= LEAST_UNANSWERED:
            return 0.0
        self.tell_unanswered_s = self.unanswered_s + min(ABSENCE_S, self.unanswered_s)
        return self.unanswered_s

    def put_off_reopening(self) -> float:
        """Set when the link is opened again; the seconds until then, twice as many every time."""
        pause_s = self.refused_pause_s
        self.reopen_at = time.monotonic() + pause_s
        self.refused_pause_s = min(REFUSED_MAX_S, 2 * pause_s)
        return pause_s

    def status_line(self, endpoint: str, pause: str = "") -> str:
        """One line for a person, the same as long as nothing changes. pause: what is done as there
        is no trainer now."""
        if self.inspected is None:
            return "reading the data"
        if pause:
            return f"the trainer ended; {pause}"
        if self.reopen_at is not None:
            return f"refused by the coordinator {endpoint}; trying again (see the log)"
        if self.job is not None:
            return f"round {self.job.round}: {self.watch.in_words()}"
        if self.welcome is None:
            return f"waiting for the coordinator {endpoint}"
        what = "waiting for a job"
        if self.is_resting:
            what = "too hot or the battery too low for a job (see the log)"
        return f"connected to {endpoint}, {what}"
