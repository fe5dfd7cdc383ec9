"""Jobs that devices have in hand: out, updates in, each update whole or not at all, counted once.

A job is open from when it is given until its update is accepted or nobody waits for it any more; a
late one stays open over the end of its round. Parts move as the budget allows; updates go to the
spool part by part, and so does, at the end of its round, a job that goes on. What grows: the small
state of a job per client, and for late ones one model for every round they began in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from coordinator.cohorts.base import Absence, ArrivedUpdate, Assignment, Client, ClientUpdate
from coordinator.fleet.counters import Counters
from coordinator.fleet.flow_control import Budget, LinkRates
from coordinator.fleet.open_job import (
    OpenJob,
    Senders,
    check_update,
    check_values,
    make_job,
)
from coordinator.fleet.spool import Spool
from coordinator.fleet.transfers import Transfers
from edge_sdk.errors import EdgeError, StoreError
from edge_sdk.helpers.logs import Kind, event
from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.messages import Accepted, Fault, Fetch, Message, Part, Ready, Update
from edge_sdk.protocol.tensors import Receiver, Sender, Tensors

log = logging.getLogger(__name__)
RESEND_S = 10.0  # a device that says it has another job gets it again
MOST_GIVEN = 4  # times that a device which restarts gets one job
MOST_STALLS = 3  # times that an upload is asked for again without a new part


class Jobs:
    """send(name, message, payload): False when the device cannot be reached now. was_counted(job):
    whether a committed round holds its update. on_absent(name): it failed or was late, and gets no
    job until it says that it is ready. Results gather in `finished`, from where the cohort takes
    them."""

    def __init__(
        self,
        run: str,
        spool: Spool,
        budget: Budget,
        send: Callable[[str, Message, Payload | None], bool],
        *,
        takes_late: bool = True,
        was_counted: Callable[[str], bool] = lambda job: False,
        on_absent: Callable[[str], None] = lambda name: None,
        counters: Counters | None = None,
    ) -> None:
        self.finished: list[ClientUpdate | Absence] = []
        self.budget = budget
        self.open: dict[str, OpenJob] = {}
        self.transfers = Transfers(self.open, budget, send)
        self._run = run
        self._spool = spool
        self._send = send
        self._takes_late = takes_late
        self._was_counted = was_counted
        self._on_absent = on_absent
        self._counters = counters or Counters()
        self._done: dict[str, tuple[str, bool]] = {}  # last job that ended, and whether it counts
        self._unheard: dict[str, Accepted | Fault] = {}  # of the end of a job: it met a full queue
        self._link_rates: dict[str, LinkRates] = {}
        self._senders = Senders()
        self._awaited: set[str] = set()

    @property
    def num_open(self) -> int:
        """Participants of the round that are still waited for."""
        return len(self._awaited)

    @property
    def awaited(self) -> frozenset[str]:
        return frozenset(self._awaited)

    def returned(self, round: int) -> set[str]:
        """Whose update of this round's job is here and not taken yet."""
        updates = [result for result in self.finished if isinstance(result, ClientUpdate)]
        return {update.client.id for update in updates if update.round == round}

    def give(self, client: Client, assignment: Assignment, round: int, deadline_s: float) -> None:
        """Send one participant its job, unless its update is in the spool already."""
        name = client.id
        if name in self.open:  # a late one: nobody can do two jobs
            self._end(self.open[name], counts=False)
        sender = self._senders.of(assignment)
        job = make_job(self._run, client, assignment, sender, round, deadline_s)
        open_job = OpenJob(
            client, job, assignment, sender, self._link_rates.setdefault(name, LinkRates())
        )
        self.open[name] = open_job
        self._awaited.add(name)
        self._unheard.pop(name, None)
        if found := self._spool.take_update(round, name, job.id):
            arrived, tensors = found
            try:
                check_update(arrived.update, open_job)
                check_values(tensors, open_job)
            except EdgeError as error:
                log.warning("%s; it is asked for again", error)
            else:
                log.info("round %d: %s's update had arrived before the stop", round, name)
                self._count(open_job, arrived, tensors)
                return
        self._send(name, job, None)  # to whom it does not reach it is given again

    def miss(self, client: Client, assignment: Assignment) -> None:
        """A participant that left between being chosen and being given its job."""
        self.finished.append(
            Absence(client, assignment.plan.segments, "failed", "gone", "left before its job")
        )

    def close(self, round: int) -> None:
        """The round ends without those who are still waited for. They are told, or may go on."""
        for name in sorted(self._awaited):
            open_job = self.open[name]
            self._absent(open_job, "straggler", "late", "did not return in time", stays=True)
            if name not in self.open:
                self._fault(name, "late", "the round was closed without this update", round)

    def leave_open(self) -> None:
        """The round ends, and who is still waited for goes on: nobody gives these jobs again."""
        for name in self._awaited:
            if not self.open[name].outlives:
                self.open[name].outlives = True
                self._hold(self.open[name])

    def expire(self, before_round: int) -> None:
        """Give up the jobs of rounds before this one that are still in hand."""
        for open_job in [
            open_job for open_job in self.open.values() if open_job.round < before_round
        ]:
            self._fault(open_job.name, "late", "this update comes too late", open_job.round)
            self._absent(open_job, "straggler", "late", "its update comes too late")

    def resume(self, round: int) -> None:
        """The jobs of rounds before this one that outlived a coordinator that was killed: updates
        that had arrived, and of which no committed round knows, are taken, others waited for."""
        for held, tensors in self._spool.saved_jobs(round) if self._takes_late else ():
            client, job = held.client, held.job
            self._counters.of(client.id)
            if self._was_counted(job.id):
                continue
            if found := self._spool.take_update(job.round, client.id, job.id):
                self._done[client.id] = job.id, True
                self.finished.append(ClientUpdate(client, *found, sent=tensors))
                continue
            assignment = Assignment(job.model, job.plan, tensors, held.returns)
            link_rates = self._link_rates.setdefault(client.id, LinkRates())
            open_job = OpenJob(client, job, assignment, Sender(tensors), link_rates)
            open_job.is_late, open_job.outlives = not held.outlives, held.outlives
            self._spool.adopt_job(held, open_job.sender)
            self.open[client.id] = open_job
            self._awaited |= {client.id} if open_job.outlives else set()
        for open_job in self.open.values():  # files may have been large
            open_job.given = time.monotonic()

    def clear_spool(self, round: int) -> None:
        """Delete what rounds before this one left, but for what may still count."""
        wanted = {(open_job.round, open_job.name) for open_job in self.open.values()}
        wanted |= {(u.round, u.client.id) for u in self.finished if isinstance(u, ClientUpdate)}
        self._spool.delete_before(round, wanted)

    # -- what devices say ----------------------------------------------------------------------

    def on_message(
        self, name: str, message: Fetch | Part | Update | Fault, payload: Payload | None
    ) -> None:
        """A message about a job. What is not about this client's open job is refused."""
        open_job = self.open.get(name)
        if open_job is None or message.round != open_job.round:
            if isinstance(message, Update):
                self._on_unwanted(name, message)
        elif isinstance(message, Fault):
            self._absent(open_job, "failed", message.code, message.detail)
        elif isinstance(message, Fetch):
            if not self.transfers.on_fetch(open_job, message):
                self._answer(name, "protocol", "too many ranges of parts at once", 0)
        elif isinstance(message, Update):
            self._on_update(open_job, message)
        elif open_job.receiver is not None:
            self._on_part(open_job, message.index, payload or b"")
        self.transfers.pump()

    def on_return(self, name: str, round: int, job: str | None, num_examples: int = 0) -> None:
        """A device connected again with this job in hand: go on where the link broke."""
        if open_job := self.open.get(name):
            open_job.grow_examples(num_examples)
        if open_job and job == open_job.job.id:
            self.transfers.break_off(open_job)
            self.transfers.pump()
            return
        self._unheard.pop(name, None)
        if job and round and (self._done.get(name) == (job, True) or self._was_counted(job)):
            self._send(name, Accepted(round=round), None)  # the first one was lost
        elif job:
            self._answer(name, "round", f"round {round} is over", round)
        if open_job is None:
            return
        if open_job.is_late:
            self._end(open_job, counts=False)  # it has lost the job that nobody waits for
        else:
            open_job.awaits_ready = True

    def on_ready(self, name: str, ready: Ready) -> None:
        """A device that has no job in hand, but ought to, gets it again."""
        open_job = self.open.get(name)
        if open_job is None or not open_job.awaits_ready:
            return
        if open_job.fits(ready):
            self._give_again(open_job)
        else:
            detail = f"came back and can train up to exit {ready.exit} only"
            self._absent(open_job, "failed", "capacity", detail)

    def on_heartbeat(self, name: str, round: int) -> None:
        """A device that has another job in hand, or none, for a while never got this one. One that
        has it may take now what its queue did not."""
        open_job, now = self.open.get(name), time.monotonic()
        if message := self._unheard.pop(name, None):
            self._tell(name, message)
        if open_job is None:
            return
        if round == open_job.round or open_job.awaits_ready:
            open_job.mismatched_since = None
            self.transfers.ask(open_job)
            self.transfers.pump()
        elif open_job.mismatched_since is None:  # may have been sent before the job came
            open_job.mismatched_since = now
        elif now - open_job.mismatched_since > RESEND_S:
            self._give_again(open_job)

    def on_gone(self, name: str, code: str, why: str, *, may_return: bool = True) -> None:
        """Nothing is heard of it. Its update is late if it comes back with it."""
        if open_job := self.open.get(name):
            self.transfers.lost(open_job)
            if not (open_job.is_late and may_return):
                self._absent(open_job, "failed", code, why, stays=may_return)
            self.transfers.pump()

    def paused(self, seconds: float) -> None:
        """Nobody listened for so long: no device is late, or its link slow, for it."""
        now = time.monotonic()
        for open_job in self.open.values():
            open_job.given = min(now, open_job.given + seconds)
            open_job.moved = min(now, open_job.moved + seconds)

    def check_stalls(self) -> None:
        """Ask again for parts that a link's own pace would have brought by now. Who then sends
        nothing new again and again is failed."""
        for open_job in self.transfers.stalled():
            open_job.stalls += open_job.receiver is not None  # what it asked for may still reach it
            if open_job.stalls == MOST_STALLS:
                detail = f"its update stopped after {open_job.bytes_up} bytes"
                self._fault(open_job.name, "stalled", detail, open_job.round)
                self._absent(open_job, "failed", "stalled", detail)
                continue
            if open_job.receiver is not None:
                open_job.receiver.restart()
            self.transfers.ask(open_job)
        self.transfers.pump()

    def _on_part(self, open_job: OpenJob, index: int, payload: Payload) -> None:
        assert open_job.receiver is not None
        try:
            if not open_job.receiver.add(index, payload):
                return  # a repeated part is no progress
        except StoreError:
            raise
        except EdgeError as error:
            self._refuse(open_job, error)
            return
        open_job.bytes_up += len(payload)
        self.transfers.arrived(open_job)
        if open_job.receiver.is_complete:
            self._complete(open_job)
        else:
            self.transfers.ask(open_job)

    # -- updates -------------------------------------------------------------------------------

    def _on_unwanted(self, name: str, update: Update) -> None:
        job, counts = self._done.get(name, ("", False))
        if update.job == job and counts:  # told twice, counts once
            self._send(name, Accepted(round=update.round), None)
            return
        why = f"no update of round {update.round} is wanted from {name} now"
        if update.job == job:
            why = f"{name} has failed in this round already"
        self._answer(name, "round", why, update.round)

    def _on_update(self, open_job: OpenJob, update: Update) -> None:
        if update.job != open_job.job.id:  # of a job that another state of this run gave
            self._answer(
                open_job.name,
                "round",
                f"round {open_job.round} has another job now",
                open_job.round,
            )
            open_job.awaits_ready = True
            return
        if open_job.update is not None and open_job.update.digest == update.digest:
            return  # told again after a reconnect
        try:
            check_update(update, open_job)
        except EdgeError as error:
            self._refuse(open_job, error)
            return
        self.budget.drop(open_job.name)
        open_job.update, open_job.announced, open_job.awaits_ready = update, time.monotonic(), False
        open_job.receiver = Receiver(
            update.tensors, self._spool.storage(open_job.round, open_job.name)
        )
        if open_job.receiver.is_complete:  # an update of no bytes
            self._complete(open_job)
        else:
            self.transfers.ask(open_job)

    def _complete(self, open_job: OpenJob) -> None:
        """Everything arrived: check the values, keep it, then it counts."""
        assert open_job.update is not None
        assert open_job.receiver is not None
        tensors = open_job.receiver.tensors()
        try:
            check_values(tensors, open_job)
        except EdgeError as error:
            self._refuse(open_job, error)
            return
        upload_s = time.monotonic() - open_job.announced
        arrived = ArrivedUpdate(
            update=open_job.update, segments=open_job.job.plan.segments,
            upload_s=upload_s, bytes_down=open_job.bytes_down, bytes_up=open_job.bytes_up,
        )  # fmt: skip
        self._spool.save_update(open_job.round, open_job.name, arrived)
        self._count(open_job, arrived, tensors)

    def _count(self, open_job: OpenJob, arrived: ArrivedUpdate, tensors: Tensors) -> None:
        extra = event("update_accepted", client=open_job.name, round=open_job.round)
        log.info("round %d: the update of %s counts", open_job.round, open_job.name, extra=extra)
        self._end(open_job, counts=True)
        self._tell(open_job.name, Accepted(round=open_job.round))
        sent = open_job.assignment.tensors
        self.finished.append(ClientUpdate(open_job.client, arrived, tensors, sent=sent))

    def _refuse(self, open_job: OpenJob, error: EdgeError) -> None:
        self._fault(open_job.name, error.code, str(error), open_job.round)
        self._absent(open_job, "failed", error.code, str(error))

    def _absent(
        self, open_job: OpenJob, outcome: str, code: str, detail: str, *, stays: bool = False
    ) -> None:
        """The participant returns nothing that counts in its round; if it stays, maybe later."""
        kind: Kind = "update_late" if outcome == "straggler" else "update_failed"
        about = (open_job.round, open_job.name, outcome, code, detail)
        extra = event(kind, client=open_job.name, round=open_job.round, code=code)
        log.warning("round %d: %s %s: %s: %s", *about, extra=extra)
        if open_job.name in self._awaited:
            if code != "gone":  # before the device says anything else, as that it is ready
                self._on_absent(open_job.name)
            self.finished.append(
                Absence(
                    open_job.client, open_job.job.plan.segments, outcome, code, detail,
                    bytes_down=open_job.bytes_down, bytes_up=open_job.bytes_up,
                )
            )  # fmt: skip
        if stays and (self._takes_late or code == "gone"):  # the round may be open still
            open_job.is_late, open_job.outlives = True, False
            if self._takes_late:
                self._hold(open_job)
            self._awaited.discard(open_job.name)
        else:
            self._end(open_job, counts=False)

    def _hold(self, open_job: OpenJob) -> None:
        returns, outlives = open_job.assignment.returns, open_job.outlives
        self._spool.save_job(
            open_job.client, open_job.job, returns, open_job.sender, outlives=outlives
        )

    def _end(self, open_job: OpenJob, *, counts: bool) -> None:
        """The job is closed; what has arrived of an update that does not count is deleted."""
        self.open.pop(open_job.name)
        self._counters.moved(open_job.name, open_job.bytes_down, open_job.bytes_up)
        self._awaited.discard(open_job.name)
        self.budget.drop(open_job.name)
        self._done[open_job.name] = open_job.job.id, counts
        if not counts:
            self._spool.delete(open_job.round, open_job.name)

    def _give_again(self, open_job: OpenJob) -> None:
        """It has lost its job, or never got it."""
        if open_job.is_late:  # nobody waits for it; the device may have another
            self._fault(
                open_job.name, "late", "the round was closed without this update", open_job.round
            )
            self._end(open_job, counts=False)
        elif open_job.times_given == MOST_GIVEN:
            detail = f"the device restarted {MOST_GIVEN} times during its job, or lost it"
            self._fault(open_job.name, "restarted", detail, open_job.round)
            self._absent(open_job, "failed", "restarted", detail)
        else:
            self.budget.drop(open_job.name)
            open_job.given_again()
            self._send(open_job.name, open_job.job, None)

    def _answer(self, name: str, code: str, detail: str, round: int) -> None:
        self._send(name, Fault(code=code, detail=detail, round=round), None)

    def _fault(self, name: str, code: str, detail: str, round: int) -> None:
        self._tell(name, Fault(code=code, detail=detail, round=round))

    def _tell(self, name: str, message: Accepted | Fault) -> None:
        """A job of the device has ended: it hears so now, or when it is heard of."""
        if not self._send(name, message, None):
            self._unheard[name] = message
