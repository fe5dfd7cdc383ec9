"""Jobs that devices have in hand: out, updates in, each update whole or not at all, counted once.

A job is open from when it is given until its update is accepted or nobody waits for it any more; a
late one stays open over the end of its round. Parts move as the budget allows; updates go to the
spool part by part, and so does, at the end of its round, a job that goes on. What grows: the small
state of a job per client, and for late ones one model for every round they began in.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable

from coordinator.cohorts.base import Absence, ArrivedUpdate, Assignment, Check, Client, ClientUpdate
from coordinator.fleet.counters import Counters
from coordinator.fleet.digests import Digests
from coordinator.fleet.endings import Endings
from coordinator.fleet.flow_control import Budget, LinkRates
from coordinator.fleet.job_phases import JobEvent, JobPhase
from coordinator.fleet.open_job import OpenJob, Senders, check_update, check_values, make_job
from coordinator.fleet.sessions import Sessions, trains
from coordinator.fleet.spool import Spool
from coordinator.fleet.transfers import Transfers
from edge_sdk.errors import EdgeError, StoreError
from edge_sdk.helpers.logs import EventName, event
from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.messages import Accepted, Fault, Fetch, Part, Ready, Update
from edge_sdk.protocol.tensors import Receiver, Sender, Tensors

log = logging.getLogger(__name__)
RESEND_S = 10.0  # a device that says it has another job gets it again
MOST_GIVEN = 4  # times that a device which restarts gets one job
MOST_STALLS = 3  # in a row, of a transfer that has moved
CLOSED = "the round was closed without this update"


class Jobs:
    """All open jobs of a run, by client, and what becomes of each. was_counted(job): whether a
    committed round holds its update. Results gather in `finished`; the cohort takes them there."""

    def __init__(
        self,
        run: str,
        spool: Spool,
        budget: Budget,
        sessions: Sessions,
        *,
        takes_late: bool = True,
        was_counted: Callable[[str], bool] = lambda job: False,
        counters: Counters | None = None,
    ) -> None:
        self.finished: list[ClientUpdate | Absence] = []
        self.check: Check = check_values
        self.budget = budget
        self.open: dict[str, OpenJob] = {}
        self.transfers = Transfers(self.open, budget, sessions)
        self._run = run
        self._spool = spool
        self._sessions = sessions
        self._takes_late = takes_late
        self._endings = Endings(sessions, was_counted)
        self._counters = counters or Counters()
        self._link_rates: defaultdict[str, LinkRates] = defaultdict(LinkRates)
        self._senders = Senders()
        self._digests = Digests()
        self._awaited: set[str] = set()

    @property
    def awaited(self) -> frozenset[str]:
        """The participants of the round that it still waits for."""
        return frozenset(self._awaited)

    def returned(self, round: int) -> set[str]:
        """The clients whose update of this round's job is here and not taken yet."""
        updates = [result for result in self.finished if isinstance(result, ClientUpdate)]
        return {update.client.id for update in updates if update.round == round}

    def give(self, client: Client, assignment: Assignment, round: int, deadline_s: float) -> None:
        """Send one participant its job, unless its update is in the spool already."""
        name = client.id
        if name in self.open:  # a late one: nobody can do two jobs
            self._end(self.open[name], counts=False)
        sender = self._senders.of(assignment)
        job = make_job(self._run, client, assignment, sender, round, deadline_s)
        open_job = OpenJob(client, job, assignment, sender, self._link_rates[name])
        self.open[name] = open_job
        self._awaited.add(name)
        self._endings.forget_unheard(name)
        if found := self._spool.take_update(round, name, job.id):
            arrived, tensors = found
            try:
                check_update(arrived.update, open_job)
                self.check(ClientUpdate(client, arrived, tensors), assignment.tensors)
            except EdgeError as error:
                log.warning("%s; it is asked for again", error)
            else:
                log.info("round %d: %s's update had arrived before the stop", round, name)
                self._count(open_job, arrived, tensors)
                return
        self._sessions.send(name, job)  # to whom it does not reach it is given again

    def miss(self, client: Client, assignment: Assignment) -> None:
        """Note as failed a participant that left between being chosen and being given its job."""
        why = ("failed", "gone", "left before its job")
        self.finished.append(Absence(client, assignment.plan.segments, *why))

    def close(self) -> None:
        """End the round without those who are still waited for: they are told, or may be late."""
        for name in sorted(self._awaited):
            self.let_go(name, "did not return in time")

    def let_go(self, name: str, detail: str) -> None:
        """Wait no longer for this participant; its update may be late."""
        open_job = self.open[name]
        self._absent(open_job, "straggler", "late", detail, stays=True)
        if name not in self.open:
            self._fault(name, "late", CLOSED, open_job.round)

    def give_up(self, name: str, detail: str) -> None:
        """This participant has failed: it holds up what it has begun."""
        open_job = self.open[name]
        self._fault(name, "stalled", detail, open_job.round)
        self._absent(open_job, "failed", "stalled", detail)

    def leave_open(self) -> None:
        """End the round; who is still waited for goes on, and is waited for beyond it."""
        for name in self._awaited:
            if not self.open[name].is_saved:
                self.open[name].is_saved = True
                self._save(self.open[name])

    def expire(self, before_round: int) -> None:
        """Give up the jobs of rounds before this one that are still in hand."""
        for open_job in [job for job in self.open.values() if job.round < before_round]:
            self._fault(open_job.name, "late", "this update comes too late", open_job.round)
            self._absent(open_job, "straggler", "late", "its update comes too late")

    def resume(self, round: int) -> None:
        """Go on with the jobs of rounds before this one that a coordinator that was killed had
        given: updates that had arrived, and of which no committed round knows, are taken."""
        for held, tensors in self._spool.saved_jobs(round) if self._takes_late else ():
            client, job = held.client, held.job
            self._counters.of(client.id)
            if self._endings.counts(client.id, job.id):
                continue
            if found := self._spool.take_update(job.round, client.id, job.id):
                self._endings.note(client.id, job.id, counts=True)
                self.finished.append(ClientUpdate(client, *found, sent=tensors))
                continue
            assignment = Assignment(job.model, job.plan, tensors, held.returns)
            rates = self._link_rates[client.id]
            phase = JobPhase.DOWNLOAD if held.outlives else JobPhase.LATE
            digests = {spec.name: spec.digest for spec in job.tensors if spec.digest}
            sender, outlives = Sender(tensors, digests=digests), held.outlives
            open_job = OpenJob(client, job, assignment, sender, rates, phase, is_saved=outlives)
            self._spool.adopt_job(held, open_job.sender)
            self.open[client.id] = open_job
            self._awaited |= {client.id} if outlives else set()
        for open_job in self.open.values():  # files may have been large
            open_job.given = open_job.progressed = time.monotonic()

    def clear_spool(self, round: int) -> None:
        """Delete what rounds before this one left, but for what may still count."""
        wanted = {(open_job.round, open_job.name) for open_job in self.open.values()}
        wanted |= {(u.round, u.client.id) for u in self.finished if isinstance(u, ClientUpdate)}
        self._spool.delete_before(round, wanted)

    # -- what devices say ----------------------------------------------------------------------

    def on_message(
        self, name: str, message: Fetch | Part | Update | Fault, payload: Payload | None
    ) -> None:
        """Handle a message about a job. An update of another than the open one is refused."""
        open_job = self.open.get(name)
        if open_job is None or message.round != open_job.round:
            if isinstance(message, Update):
                self._on_unwanted(name, message)
            self.transfers.pump()
            return
        match message:
            case Fault(code=code, detail=detail):
                self._absent(open_job, "failed", code, detail)
            case Fetch():
                if not self.transfers.on_fetch(open_job, message):
                    self._answer(name, "protocol", "too many ranges of parts at once", 0)
            case Update():
                self._on_update(open_job, message)
            case Part(index=index):
                self._on_part(open_job, index, payload or b"")
        self.transfers.pump()

    def on_return(self, name: str, round: int, job: str | None, num_examples: int = 0) -> None:
        """A device connected again with this job in hand: go on where the link broke."""
        if open_job := self.open.get(name):
            open_job.grow_examples(num_examples)
        if open_job and job == open_job.job.id:
            self.transfers.break_off(open_job)
            self.transfers.pump()
            return
        self._endings.forget_unheard(name)
        if job and round and self._endings.counts(name, job):
            self._sessions.send(name, Accepted(round=round))  # the first one was lost
        elif job:
            self._answer(name, "round", f"round {round} is over", round)
        if open_job is None:
            return
        if open_job.is_late:
            self._end(open_job, counts=False)  # it has lost the job that nobody waits for
        else:
            open_job.advance(JobEvent.LOST)

    def on_ready(self, name: str, ready: Ready) -> None:
        """A device that has no job in hand, but ought to, gets it again."""
        open_job = self.open.get(name)
        if open_job is None or not open_job.is_lost:
            return
        if open_job.fits(ready):
            self._give_again(open_job)
        else:
            detail = f"came back and can train {trains(ready)} only"
            self._absent(open_job, "failed", "capacity", detail)

    def on_heartbeat(self, name: str, round: int) -> None:
        """A device whose heartbeats name another round, or none, for RESEND_S never got its job.
        One that names its job's may take now what its queue did not."""
        open_job, now = self.open.get(name), time.monotonic()
        self._endings.tell_again(name)
        if open_job is None:
            return
        if round == open_job.round or open_job.is_lost:
            open_job.mismatched_since = None
            self.transfers.ask(open_job)
            self.transfers.pump()
        elif open_job.mismatched_since is None:  # may have been sent before the job came
            open_job.mismatched_since = now
        elif now - open_job.mismatched_since > RESEND_S:
            self._give_again(open_job)

    def on_gone(self, name: str, code: str, why: str, *, may_return: bool = True) -> None:
        """Nothing is heard of the device. If it may return, its update may still come: late."""
        if open_job := self.open.get(name):
            self.transfers.drop_link(open_job)
            if not (open_job.is_late and may_return):
                self._absent(open_job, "failed", code, why, stays=may_return)
            self.transfers.pump()

    def forgive_pause(self, seconds: float) -> None:
        """The coordinator did not listen for so long: no device is late, or slow, because of it."""
        now = time.monotonic()
        for open_job in self.open.values():
            open_job.given = min(now, open_job.given + seconds)
            open_job.progressed = min(now, open_job.progressed + seconds)
            open_job.moved = min(now, open_job.moved + seconds)

    def check_stalls(self) -> None:
        """Ask again for parts that a link's own pace would have brought by now. A participant of
        whom that was in vain, MOST_STALLS times or at the very first, has failed."""
        for open_job in self.transfers.take_stalled():
            if open_job.stalls == MOST_STALLS or open_job.has_never_moved:
                self.give_up(open_job.name, open_job.where_it_stopped)
            else:
                self.transfers.ask_again(open_job)
        self.transfers.pump()

    def _on_part(self, open_job: OpenJob, index: int, payload: Payload) -> None:
        if (receiver := open_job.receiver) is None:
            return
        try:
            if not receiver.add(index, payload):
                return  # a repeated part is no progress
        except StoreError:
            raise
        except EdgeError as error:
            self._refuse(open_job, error)
            return
        open_job.note_part(index, payload)
        self.transfers.note_part(open_job)
        if receiver.is_complete:
            self._complete(open_job, receiver)
        else:
            self.transfers.ask(open_job)

    # -- updates -------------------------------------------------------------------------------

    def _on_unwanted(self, name: str, update: Update) -> None:
        is_last = self._endings.is_last(name, update.job)
        if is_last and self._endings.counts(name, update.job):  # told twice, counts once
            self._sessions.send(name, Accepted(round=update.round))
            return
        why = f"no update of round {update.round} is wanted from {name} now"
        if is_last:
            why = f"{name} has failed in this round already"
        self._answer(name, "round", why, update.round)

    def _on_update(self, open_job: OpenJob, update: Update) -> None:
        if update.job != open_job.job.id:  # of a job that another state of this run gave
            why = f"round {open_job.round} has another job now"
            self._answer(open_job.name, "round", why, open_job.round)
            open_job.advance(JobEvent.LOST)
            return
        if open_job.update is not None and open_job.update.digest == update.digest:
            return  # told again after a reconnect
        try:
            check_update(update, open_job)
        except EdgeError as error:
            self._refuse(open_job, error)
            return
        self.budget.drop(open_job.name)
        receiver = Receiver(update.tensors, self._spool.storage(open_job.round, open_job.name))
        open_job.announce(update, receiver, self._digests.begin())
        if receiver.is_complete:  # an update of no bytes
            self._complete(open_job, receiver)
        else:
            self.transfers.ask(open_job)

    def _complete(self, open_job: OpenJob, receiver: Receiver) -> None:
        """Every part of the update is here: if it is sound it goes to the spool and counts."""
        tensors = receiver.tensors()
        try:
            arrived = open_job.as_arrived()
            update = ClientUpdate(open_job.client, arrived, tensors)
            self.check(update, open_job.assignment.tensors)
        except EdgeError as error:
            self._refuse(open_job, error)
            return
        self._spool.save_update(open_job.round, open_job.name, arrived)
        self._count(open_job, arrived, tensors)

    def _count(self, open_job: OpenJob, arrived: ArrivedUpdate, tensors: Tensors) -> None:
        extra = event("update_accepted", client=open_job.name, round=open_job.round)
        log.info("round %d: the update of %s counts", open_job.round, open_job.name, extra=extra)
        self._end(open_job, counts=True)
        self._endings.send_or_keep(open_job.name, Accepted(round=open_job.round))
        client, sent = open_job.client, open_job.assignment.tensors
        self.finished.append(ClientUpdate(client, arrived, tensors, sent=sent))

    def _refuse(self, open_job: OpenJob, error: EdgeError) -> None:
        self._fault(open_job.name, error.code, str(error), open_job.round)
        self._absent(open_job, "failed", error.code, str(error))

    def _absent(
        self, open_job: OpenJob, outcome: str, code: str, detail: str, *, stays: bool = False
    ) -> None:
        """The participant returns nothing that counts in its round; if it stays, maybe later."""
        kind: EventName = "update_late" if outcome == "straggler" else "update_failed"
        about = (open_job.round, open_job.name, outcome, code, detail)
        extra = event(kind, client=open_job.name, round=open_job.round, code=code)
        log.warning("round %d: %s %s: %s: %s", *about, extra=extra)
        self._counters.note_failure(open_job.name, open_job.round, outcome, code, detail)
        if not open_job.is_late:
            if code != "gone":  # before the device says anything else, as that it is ready
                self._sessions.set_ready(open_job.name, None)
            self.finished.append(open_job.absence(outcome, code, detail))
        if stays and (self._takes_late or code == "gone"):  # the round may be open still
            open_job.advance(JobEvent.WAITING_ENDED)
            if self._takes_late:
                self._save(open_job)
            self._awaited.discard(open_job.name)
        else:
            self._end(open_job, counts=False)

    def _save(self, open_job: OpenJob) -> None:
        """The job's round ends, and the job does not: a coordinator that is killed goes on."""
        job, returns, is_late = open_job.job, open_job.assignment.returns, open_job.is_late
        self._spool.save_job(open_job.client, job, returns, open_job.sender, outlives=not is_late)

    def _end(self, open_job: OpenJob, *, counts: bool) -> None:
        """The job is closed; what has arrived of an update that does not count is deleted."""
        open_job.advance(JobEvent.ACCEPTED if counts else JobEvent.ABANDONED)
        self.open.pop(open_job.name)
        self._counters.count_bytes(open_job.name, open_job.bytes_down, open_job.bytes_up)
        self._awaited.discard(open_job.name)
        self.budget.drop(open_job.name)
        self._endings.note(open_job.name, open_job.job.id, counts=counts)
        if not counts:
            self._spool.delete(open_job.round, open_job.name)

    def _give_again(self, open_job: OpenJob) -> None:
        """The device has lost its job, or never got it."""
        if open_job.is_late:  # nobody waits for it; the device may have another
            self._fault(open_job.name, "late", CLOSED, open_job.round)
            self._end(open_job, counts=False)
        elif open_job.times_given == MOST_GIVEN:
            detail = f"the device restarted {MOST_GIVEN} times during its job, or lost it"
            self._fault(open_job.name, "restarted", detail, open_job.round)
            self._absent(open_job, "failed", "restarted", detail)
        else:
            self.budget.drop(open_job.name)
            open_job.give_again()
            self._sessions.send(open_job.name, open_job.job)

    def _answer(self, name: str, code: str, detail: str, round: int) -> None:
        """Refuse what a device said. No job ends with it, so it is told only now."""
        self._sessions.send(name, Fault(code=code, detail=detail, round=round))

    def _fault(self, name: str, code: str, detail: str, round: int) -> None:
        """Tell a device that its job has ended, now or when it is heard of."""
        self._endings.send_or_keep(name, Fault(code=code, detail=detail, round=round))
