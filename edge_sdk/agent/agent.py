"""The resident process of a device: link, identity, choice of depth, and a trainer that may die.

It never imports torch or numpy and never holds a tensor: it passes parts between the link and the
trainer. One loop; nothing in it waits for training, so heartbeats never do."""

from __future__ import annotations

import contextlib
import logging
import time
from secrets import token_hex

from edge_sdk.agent import events
from edge_sdk.agent.choosing import Choosing
from edge_sdk.agent.conduct import Conduct
from edge_sdk.agent.events import Event, EventLog
from edge_sdk.agent.options import AgentOptions, Senses
from edge_sdk.agent.pipe import (
    Cancel,
    Estimated,
    Inspected,
    PipeMessage,
    Progress,
    Resume,
)
from edge_sdk.agent.state import UNANSWERED, State, hello
from edge_sdk.agent.trainer_process import Supervisor
from edge_sdk.agent.watchdog import Notifier, Watchdog
from edge_sdk.data.contract import unlike_run
from edge_sdk.errors import DataError, EdgeError, LinkError, ProtocolError, TrainerError
from edge_sdk.protocol.link import Link, Payload
from edge_sdk.protocol.messages import (
    Accepted,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Job,
    Message,
    Part,
    Probe,
    Update,
    Welcome,
)

log = logging.getLogger(__name__)
FATAL = {"version": LinkError, "admission": LinkError, "data": DataError}


class Agent:
    """The agent of one device. run() returns on stop() and, with is_once, when the coordinator's
    run is over; else it raises an EdgeError."""

    def __init__(self, link: Link, options: AgentOptions) -> None:
        self._link = link
        self._options = options
        self._session = token_hex(8)
        self._watchdog = Watchdog(Notifier(options.notify_socket), time.monotonic())
        self._trainer = Supervisor(options.trainer, options.search_path)
        self._conduct = Conduct(link.endpoint)
        self._state = State()
        self._tell = EventLog(log, options.on_event)
        senses, trainer = Senses(options), self._trainer
        own = options.own_model
        self._choosing = Choosing(self._state, senses, trainer, link, self._tell, own)
        self._is_stopping = False
        self._last_words = "device stopped"

    def stop(self) -> None:
        """Ask run() to end; may be called by a signal handler."""
        self._is_stopping = True

    def run(self) -> None:
        try:
            with contextlib.suppress(KeyboardInterrupt):  # a program without a handler
                while not self._is_stopping:
                    self._link.wait(500, self._trainer.process)
                    self._read_trainer()
                    self._read_link()
                    self._on_time(time.monotonic())
                    self._tell_systemd(time.monotonic())
            if self._state.welcome:
                self._link.send(Bye(reason="device stopped"))
            self._watchdog.notify_stopping()
            self._tell(Event("ended", self._last_words))
        finally:
            self._watchdog.close()
            self._trainer.end()
            self._link.close(is_final=True)

    # -- events ------------------------------------------------------------------------------

    def _read_trainer(self) -> None:
        try:
            received = self._trainer.receive()
        except (EOFError, OSError):
            self._on_trainer_death()
            return
        if received:
            self._watchdog.note_alive(time.monotonic())
            self._on_trainer_message(*received)

    def _read_link(self) -> None:
        is_lost, refusal = self._link.events()
        if refusal:
            self._leave(refusal, LinkError.code)
            return
        if is_lost and self._state.welcome:
            self._state.mark_lost()
            self._tell(events.lost(f"connection to {self._link.endpoint} lost; reconnecting"))
        for message, payload in self._link.messages():
            self._on_coordinator_message(message, payload)
            if self._conduct.is_exhausted:
                said = f"it sent {self._conduct.in_words()} that nobody had asked for"
                self._leave(said, ProtocolError.code)
                self._conduct.begin_anew()
                return

    def _on_time(self, now: float) -> None:
        """Say hello until welcomed, then heartbeats; do what is due; end a stuck trainer."""
        state = self._state
        if self._trainer.end_if_stuck(self._watchdog.silent_s(now)):
            self._on_trainer_death()
        if self._trainer.is_due(now):
            self._restart_trainer(now)
        if state.reopen_at is not None:
            if now >= state.reopen_at:
                state.reopen_at = None
                self._link.open()
        elif state.welcome is None:
            if state.inspected and now >= state.next_hello:
                self._say_hello(state.inspected, now)
            if state.is_news(absence := self._link.absence(), now):
                said = "coordinator %s not reached yet: %s; waiting for it"
                log.warning(said, self._link.endpoint, absence)
        elif now >= state.next_heartbeat:
            state.put_off_heartbeat(now)
            if not self._send_heartbeat():
                state.mark_lost()
                self._link.open()
                self._tell(events.lost(f"{self._link.endpoint} takes nothing; connecting anew"))
            elif state.job is None:
                self._choosing.tell()  # memory or conditions may have changed
            elif not state.is_trained:
                self._choosing.look_at_conditions()
        if state.job and not state.is_trained and (ended := state.watch.why_ended(now)):
            self._tell(events.failed(ended[1], ended[0], state.job.round))
            self._fail_job(*ended, is_memory=False)

    def _tell_systemd(self, now: float) -> None:
        state = self._state
        self._watchdog.notify(
            now,
            is_ready=state.inspected is not None,
            has_job=state.job is not None,
            status=state.status_line(self._link.endpoint, self._trainer.pause),
        )

    # -- coordinator -------------------------------------------------------------------------

    def _say_hello(self, inspected: Inspected, now: float) -> None:
        state = self._state
        profile, client_id = self._choosing.profile(), self._options.client_id
        is_said = self._link.send(hello(client_id, self._session, profile, inspected, state.job))
        self._conduct.expect("welcome", int(is_said))
        if silent_s := state.put_off_hello(now, is_said):
            log.warning(UNANSWERED, self._link.endpoint, silent_s)

    def _send_heartbeat(self) -> bool:
        job = self._state.job
        is_sent = self._link.send(Heartbeat(round=job.round if job else 0))
        self._conduct.await_heartbeat(is_sent, self._link.heard_at)
        return is_sent

    def _on_coordinator_message(
        self, message: Message | ProtocolError, payload: Payload | None
    ) -> None:
        job, self._state.num_unanswered = self._state.job, 0
        is_mine = job is not None and getattr(message, "round", 0) == job.round
        match message:
            case Welcome():
                self._conduct.note("welcome")
                self._on_welcome(message)
            case Job():
                self._on_job(message)
            case Part() if is_mine:
                self._on_part(message, payload or b"")
            case Fetch() if is_mine and self._state.is_trained:
                again = self._state.transfer.num_asked_again(message)
                self._conduct.charge("fetch", again)
                self._trainer.send(message)
            case Accepted() if is_mine and self._state.is_trained:
                self._tell(Event("accepted", "update accepted", message.round))
                self._trainer.mark_well()
                self._trainer.send(self._state.mark_accepted())
                self._end_job()
            case Fault():
                self._on_fault(message, is_mine)
            case Probe():
                self._conduct.charge("probe")
                self._send_heartbeat()
            case Bye():
                self._conduct.charge("bye")
                self._on_bye(message)
            case ProtocolError():
                self._conduct.note("frame that breaks the protocol", str(message))
            case _:
                self._conduct.note(type(message).__name__.lower())

    def _on_bye(self, bye: Bye) -> None:
        """Only a run that is over ends the job in hand: a coordinator that will be back goes on."""
        said = f"coordinator: {bye.reason or 'bye'}"
        if bye.is_final:
            self._end_job()
        self._link.send(Bye(reason="bye"))
        self._state.welcome = None
        if self._options.is_once and bye.is_final:
            self._is_stopping, self._last_words = True, said
        elif bye.is_final:
            self._tell(Event("finished", f"{said}; waiting for the next run"))
        else:
            self._tell(events.lost(said, logging.INFO))

    def _on_welcome(self, welcome: Welcome) -> None:
        state, before = self._state, self._state.last_welcome
        is_first = state.welcome is None
        self._tell(events.connected(welcome))
        state.mark_welcomed(welcome)
        assert state.inspected is not None  # else no hello was said
        is_new = before is None or before.run != welcome.run
        if is_new and (unlike := unlike_run(state.inspected, welcome, "this device")):
            log.warning("%s", unlike.text)
        stands = self._choosing.begin(welcome, before)
        is_other = before is not None and (before.run, before.model) != (welcome.run, welcome.model)
        if is_other and state.job:
            said = "round %d belongs to another run or model than %s; dropped"
            log.warning(said, state.job.round, welcome.run)
            self._end_job()
        if stands:
            self._choosing.tell(is_repeated=True)
        else:
            self._choosing.count(welcome)
        if state.job and is_first:  # several hellos may have been said, and are all answered
            state.retries += 1
            self._trainer.send(Resume())

    def _on_job(self, job: Job) -> None:
        state = self._state
        self._conduct.charge("job")
        if state.job and state.job.id == job.id:  # given again, by a coordinator that was restarted
            self._trainer.send(Resume())
            return
        if state.job:
            self._end_job()
        if state.welcome is None:  # it was there for another job
            return
        try:
            adapted = self._choosing.checked(job, state.welcome)
        except EdgeError as error:
            self._tell(events.failed(f"job refused, {error}", error.code, job.round))
            self._link.send(Fault(code=error.code, detail=str(error), round=job.round))
            self._choosing.tell(is_repeated=True)
            return
        self._tell(events.job_given(job))
        cache_bytes = self._choosing.chooser.cache_bytes(job.plan.segments)
        predicted_s = self._choosing.predicted_s(job)
        self._trainer.send(state.begin_job(job, adapted, predicted_s, cache_bytes))

    def _on_part(self, part: Part, payload: Payload) -> None:
        try:
            is_awaited = self._state.transfer.take(part, len(payload))
        except ProtocolError as error:
            self._tell(events.failed(str(error), error.code, part.round))
            self._fail_job(error.code, str(error), is_memory=False)
            return
        if is_awaited:
            self._trainer.send(part, payload)
        else:
            self._conduct.note("part")

    def _on_fault(self, fault: Fault, is_mine: bool) -> None:
        if not is_mine:
            self._conduct.charge("fault")
        if fault.code == "hello":
            self._state.mark_lost()
            return
        if fault.code in FATAL and not fault.round:
            raise FATAL[fault.code](f"coordinator refused this device: {fault.detail}")
        said = f"coordinator: {fault.code}: {fault.detail}"
        self._tell(events.failed(said, fault.code, fault.round, logging.WARNING))
        if self._state.job and (is_mine or fault.code == ProtocolError.code):
            self._end_job()
        elif fault.round and not self._state.job:  # one that never reached this device
            self._choosing.tell(is_repeated=True)

    def _leave(self, why: str, code: str) -> None:
        """Nothing good comes from this coordinator as things are, so it is tried again after a
        pause that grows; every try is logged once."""
        state = self._state
        pause = f"next try in {state.put_off_reopening():.0f} s"
        self._tell(events.failed(f"{self._link.endpoint}: {why}; {pause}", code))
        self._link.close()
        state.welcome = None

    def _end_job(self) -> None:
        """The job is accepted, refused or dropped: trainer and device are free for another."""
        state = self._state
        if state.job:
            self._trainer.send(Cancel())
            self._conduct.expect("part", state.transfer.num_awaited)  # may be under way
        state.job, state.idle_since = None, time.monotonic()
        self._choosing.tell(is_repeated=True)

    # -- trainer -----------------------------------------------------------------------------

    def _on_trainer_message(self, message: PipeMessage, payload: memoryview) -> None:
        state = self._state
        match message:
            case Inspected():
                self._on_inspected(message)
            case Estimated():
                self._choosing.on_estimated(message)
            case Fault():
                self._on_trainer_fault(message)
            case _ if state.job is None or getattr(message, "round", 0) != state.job.round:
                log.debug("trainer: %s without a job or of another", type(message).__name__)
            case Progress():
                state.watch.last = message
            case Update():
                if not state.is_result_logged:  # else it is announced again, on a new connection
                    task, before = state.job.model.task, state.is_trained
                    self._tell(events.trained(message, task, was_before_start=before))
                    self._conduct.repay("job")
                self._link.send(state.complete(message))
            case Part():
                self._link.send(message, payload)
            case Fetch():
                if state.transfer.expect(message):
                    state.watch.began = time.monotonic()
                self._link.send(message)

    def _on_inspected(self, inspected: Inspected) -> None:
        """A trainer has read its data: the first one, or one that replaces a dead one."""
        state, is_first = self._state, self._state.inspected is None
        if is_first and inspected.num_labels == 1:
            log.warning("all %d local examples have one label", inspected.num_examples)
        if state.note_inspected(inspected):
            state.mark_lost()
            self._link.open()  # a coordinator heeds one hello of a connection
        if is_first and inspected.finished:
            state.job, state.is_trained = inspected.finished, True
        elif state.job:  # the trainer died when it had trained
            if inspected.finished and inspected.finished.id == state.job.id:
                self._trainer.send(Resume())
            else:
                self._fail_job("trainer", "the trained update was lost", is_memory=False)
        if not is_first and state.last_welcome:
            self._choosing.count(state.last_welcome)

    def _on_trainer_fault(self, fault: Fault) -> None:
        state = self._state
        if fault.code == "cancelled":
            return
        self._tell(events.failed(f"training failed: {fault.detail}", fault.code, fault.round))
        if state.job and fault.round == state.job.round:
            self._fail_job(fault.code, fault.detail, is_memory=fault.code == "capacity")
        elif not fault.round:  # costs could not be counted
            self._choosing.on_not_counted(fault.detail)

    def _on_trainer_death(self) -> None:
        """Report how the trainer ended; if it was killed at work, choose less from now on."""
        state, trainer = self._state, self._trainer
        ending, pause_s = trainer.reap(had_job=state.job is not None)
        if state.inspected is None:
            raise ending.before_data()
        detail, rest = f"the trainer {ending.how}", ""
        if trainer.is_resting:
            rest = f"{detail}, the last {trainer.num_alike} times alike before any job"
        again = "when the data changes or this program is started anew, else " * bool(rest)
        said = f"{rest or detail}; another {again}in {pause_s:.0f} s"
        self._tell(events.failed(said, "trainer", state.job.round if state.job else 0))
        self._choosing.on_trainer_death(said if rest else "")
        if state.job and not state.is_trained:
            self._fail_job("trainer", detail, is_memory=ending.is_for_memory)
        self._choosing.tell(is_repeated=bool(rest))

    def _restart_trainer(self, now: float) -> None:
        self._watchdog.note_alive(now)
        try:
            self._trainer.restart()
        except TrainerError as error:
            self._tell(events.failed(str(error), error.code))

    def _fail_job(self, code: str, detail: str, *, is_memory: bool) -> None:
        job = self._state.job
        assert job is not None
        self._link.send(Fault(code=code, detail=detail, round=job.round))
        if is_memory:
            log.warning("%s", self._choosing.note_failure(job))
        self._end_job()
