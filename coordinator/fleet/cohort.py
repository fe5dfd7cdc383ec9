"""Real devices as a cohort: who is there, what they can train, deadlines and quorum.

One thread, one socket; who is connected is in sessions.py, a job's way there and back in jobs.py.
Whatever a device does, the others and the round go on. While the caller aggregates, messages wait
in ZeroMQ's queues, and that pause is no device's silence.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from coordinator.cohorts.base import Absence, Assignment, Check, Client, ClientUpdate, Offer
from coordinator.cohorts.quorum import clients_needed, updates_needed
from coordinator.config import RunConfig
from coordinator.fleet.counters import Counters
from coordinator.fleet.declared import plausible_ready
from coordinator.fleet.flow_control import BUDGET_BYTES, Budget
from coordinator.fleet.jobs import Jobs
from coordinator.fleet.open_job import check_values
from coordinator.fleet.patience import Patience
from coordinator.fleet.sessions import SILENCE_S, Gone, Session, Sessions, welcome_of
from coordinator.fleet.spool import Spool
from coordinator.fleet.state import RoundAtHand, cohort_state, folder_bytes
from coordinator.fleet.waiting import TELL_S, Waiting
from coordinator.links.router import Outcast, Received, Refused, Router
from coordinator.store.status import CohortState
from edge_sdk.helpers.logs import event
from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.messages import (
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Part,
    Ready,
    Update,
)

log = logging.getLogger(__name__)
HEARTBEAT_S = 5.0
FAREWELL_S = 3.0  # for devices to answer a Bye
LISTENING_GAP_S = 1.0  # a longer pause between two looks was the caller's
LOOK_S = 1.0  # between looks after those who are silent
MOST_REST_S = 15.0  # between two tries of a round
OF_NO_JOB = ("protocol", "version")  # faults that end whatever a device has in hand


class Stopped(Exception):
    """The run was asked to stop; the round in progress is not final."""


class ZmqCohort:
    """Clients over a Router. run: its id; model: that of the run's method. give_up_after_s: how
    long nothing may change while there are too few devices, 0: without end. budget_bytes: of parts
    on their way at once. should_stop is asked about twice a second; then Stopped is raised.
    was_counted(job): whether a committed round holds its update. next_round: the first to come; of
    those before, what was under way goes on."""

    def __init__(
        self,
        router: Router,
        spool: Spool,
        config: RunConfig,
        offer: Offer,
        *,
        run: str,
        give_up_after_s: float = 0.0,
        budget_bytes: int = BUDGET_BYTES,
        should_stop: Callable[[], bool] = lambda: False,
        was_counted: Callable[[str], bool] = lambda job: False,
        next_round: int = 1,
    ) -> None:
        self._router = router
        self._config = config
        self._is_async = config.mode == "async"
        self._budget_bytes = budget_bytes
        self._spool = spool
        self._counters = counters = Counters()
        self._should_stop = should_stop
        welcome, names = welcome_of(config, offer, run, HEARTBEAT_S), config.trained_on.class_names
        self.sessions = Sessions(router, welcome, counters, names)
        self.jobs = Jobs(
            run,
            spool,
            Budget(budget_bytes),
            self.sessions,
            takes_late=config.oldest > 0,
            was_counted=was_counted,
            counters=counters,
        )
        self.jobs.resume(next_round)
        self._expected: dict[str, Client] = {}
        self._num_chosen = 0  # of a resumed round
        self._is_assembled = False
        self._assembles_until = time.monotonic() + SILENCE_S if next_round > 1 else math.inf
        self._at_hand = RoundAtHand()
        self._patience = Patience(config, self.jobs, self.sessions, give_up_after_s)
        self._listened = self._looked = time.monotonic()
        self._num_heard = 0  # messages since the last look after the silent

    # -- Cohort ------------------------------------------------------------------------------

    @property
    def needed(self) -> int:
        """Updates that the round needs: a share of its participants, in asynchronous mode also of
        those who were at work for a round before when they were asked."""
        return self._at_hand.needed

    @property
    def num_busy(self) -> int:
        """Clients with a job in hand. One that is late and not connected is not counted: it keeps
        nobody else from getting a job."""
        connected = self.sessions.all
        return sum(not job.is_late or name in connected for name, job in self.jobs.open.items())

    def clients(self) -> Sequence[Client]:
        """Devices ready for a job. Waits for min_clients before the first round (after a restart no
        longer than for a silent device), for a quorum of them before later ones, and says what it
        waits for. Those with a late job in hand are there, but not ready. Raises QuorumError."""
        self._drain()
        told, most = 0.0, -1
        while (here := self._num_here()) < (least := self._least()):
            if here > most:
                if most >= 0:
                    self._patience.note_change()
                most = here
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                extra = event("waiting", ready=here, needed=least)
                told_of = (here, least, self.sessions.lacking())
                log.info("waiting for devices: %d of %d ready%s", *told_of, extra=extra)
            self._patience.check(f"{here} of the {least} devices that it needs are there")
            self._pump()
        self._is_assembled = True
        return self._idle_clients()

    def expect(
        self,
        clients: Iterable[Client],
        num_chosen: int,
        check: Check = check_values,
    ) -> None:
        """A round begins. These clients, whether they are there yet or not, take part in one that
        was cut short: the first num_chosen were chosen, the others asked for those who failed."""
        self._expected = {client.id: client for client in clients}
        self._num_chosen = num_chosen
        self.jobs.check = check
        last = self._at_hand.round
        self.jobs.expire(last + 1 - self._config.oldest)  # before anything more is heard
        self._at_hand = RoundAtHand(last)
        if self._expected:  # they had been there before the restart
            self._assembles_until = min(self._assembles_until, time.monotonic() + SILENCE_S)

    def rest(self, tries: int) -> bool:
        """Listen for a while, longer every time. Raises QuorumError."""
        until = time.monotonic() + min(MOST_REST_S, 2**tries)
        while True:
            self._patience.check(f"too few devices or updates after {tries} tries of a round")
            self._pump()
            if time.monotonic() > until or self.jobs.finished:
                return True

    def train(
        self, work: Mapping[str, Assignment], round: int, deadline_s: float
    ) -> Iterator[ClientUpdate | Absence]:
        """Hand out the jobs; yield each result as it completes, late ones of rounds before too. The
        round closes when nobody is left to wait for, or at deadline + grace once a quorum has
        returned or no longer can. Asynchronous: as soon as a quorum has returned, others go on.
        Raises QuorumError."""
        jobs = self.jobs
        needed = self._hand_out(work, round, deadline_s)
        returned, started = 0, time.monotonic()
        waiting = Waiting(round, started + deadline_s + self._config.grace_s, started)
        while True:
            while jobs.finished:
                result = jobs.finished.pop(0)
                self._note(result, round)
                if isinstance(result, ClientUpdate):
                    self._patience.note_change()
                    result = replace(result, staleness=round - result.round)
                    returned += int(self._is_async or not result.staleness)
                yield result
                del result  # no reference stays here
                waiting.note_result(time.monotonic())
                self._num_heard = 0  # messages waited for the caller
            if not jobs.awaited or (self._is_async and returned >= needed):
                jobs.leave_open()
                return
            overdue_s = time.monotonic() - started - deadline_s - self._config.grace_s
            is_hopeless = returned + len(jobs.awaited) < needed  # too many have failed
            may_close = returned >= needed or is_hopeless
            if overdue_s > 0 and may_close:
                self._drain()  # what came while the caller aggregated is not late
                if not jobs.finished:
                    jobs.close()
                continue
            if overdue_s > 0:
                self._patience.check(f"{returned} of {needed} needed returned in round {round}")
            here = self._at_hand
            counts = (len(here.returned), len(here.asked), here.needed)
            waiting.tell(counts, jobs.awaited, time.monotonic(), may_close=may_close)
            self._pump()

    def snapshot(self) -> CohortState:
        """What every client does now; for the thread that uses the cohort."""
        return cohort_state(
            self._counters,
            self.sessions.all,
            self.jobs,
            self._at_hand,
            budget_bytes=self._budget_bytes,
            spool_bytes=folder_bytes(self._spool.folder),
            strangers=self._router.num_refused,
            links=self._router.link_counts(),
            unfit=self._router.unfit.told(),
            now=time.monotonic(),
        )

    def close(self, reason: str, *, is_final: bool) -> None:
        """Tell every device why, and close the socket. is_final: nothing goes on after this run."""
        self.sessions.take_leave(Bye(reason=reason, is_final=is_final), FAREWELL_S)
        self._router.close()
        if is_final:
            self._spool.clear()

    # -- inside --------------------------------------------------------------------------------

    def _hand_out(self, work: Mapping[str, Assignment], round: int, deadline_s: float) -> int:
        """Give the jobs of a round, or of another try of it. How many updates it needs."""
        if round != self._at_hand.round:
            self._at_hand = RoundAtHand(round)
            self._patience.note_change()
            self.jobs.expire(round - self._config.oldest)
            self.jobs.clear_spool(round)
        here = self.jobs.returned(round)  # between two tries of the round: nobody is asked twice
        work = {name: job for name, job in work.items() if name not in here}
        at_work = self.num_busy if self._is_async else 0
        known = self._expected | {client.id: client for client in self._idle_clients()}
        for name, assignment in work.items():
            if name in known:
                self.jobs.give(known[name], assignment, round, deadline_s)
            else:
                self.jobs.miss(Client(id=name, exit=assignment.model.exit), assignment)
        chosen = min(len(work), self._num_chosen or len(work))
        self._expected, self._num_chosen = {}, 0
        needed = updates_needed(self._config, chosen + at_work)
        self._at_hand.asked |= work.keys() | (self.jobs.open.keys() if self._is_async else set())
        self._at_hand.needed = max(self._at_hand.needed, needed)
        extra = event("round_opened", round=round, chosen=len(work), needed=needed)
        log.info("round %d: %d asked, %d needed", round, len(work), needed, extra=extra)
        return needed

    def _idle_clients(self) -> list[Client]:
        """The clients that could be given a job now."""
        return [c for c in self.sessions.ready_clients() if c.id not in self.jobs.open]

    def _num_here(self) -> int:
        """Clients that are ready, or connected and at work."""
        at_work = self.jobs.open.keys() & self.sessions.all.keys()
        return len(self.sessions.ready | at_work)

    def _least(self) -> int:
        """Devices that the next round begins with at least."""
        if not self._is_assembled and time.monotonic() < self._assembles_until:
            return self._config.min_clients
        return clients_needed(self._config)

    def _note(self, result: ClientUpdate | Absence, round: int) -> None:
        """Count the result for the status page."""
        name = result.client.id
        if isinstance(result, ClientUpdate):
            is_stale = result.round != round
            self._counters.count_result(name, "stale" if is_stale else "accepted")
            self._counters.of(name).exits = result.message.exits
            if not is_stale or self._is_async:
                self._at_hand.returned.add(name)
            return
        self._patience.note_absence(name, result.code)
        self._counters.count_fault(name, result.code)
        self._counters.count_result(name, "late" if result.outcome == "straggler" else "failed")

    def _drain(self) -> None:
        """Handle messages that came while the caller did not listen, a bounded number, up to a
        result: the caller takes that before the device's next message is handled."""
        for _ in range(self._many):
            if not self._pump(0) or self.jobs.finished:
                return

    @property
    def _many(self) -> int:
        """After so many messages every device has been heard: ZeroMQ takes from all by turns."""
        return 100 * (len(self.sessions.all) + 10)

    def _pump(self, timeout_ms: int = 500) -> bool:
        """Handle one message if there is one; look after those who are silent, also while one
        never stops talking. Raises Stopped."""
        if self._should_stop():
            raise Stopped
        now = time.monotonic()
        if (gap := now - self._listened) > LISTENING_GAP_S:
            self._patience.forgive_pause(gap)
            self.sessions.forgive_pause(gap)
            self.jobs.forgive_pause(gap)
        has_message, received = self._router.receive(0)
        self._num_heard += 1
        if not has_message or self._num_heard > self._many:  # all that came has been heard
            self._num_heard = 0
            if now - self._looked > LOOK_S:
                self._look(now, now - self._looked)
                self._looked = now
        if not has_message:
            has_message, received = self._router.receive(timeout_ms)
        self._listened = time.monotonic()
        if received is not None:
            self._handle(received)
        return has_message

    def _look(self, now: float, elapsed_s: float) -> None:
        """Look after sessions, participants that are not connected, and transfers that stalled."""
        for happened in self.sessions.check_links(now, self.jobs.transfers.patience_s()):
            self._tell_jobs(happened)
        for name in self.jobs.awaited - self.sessions.all.keys():
            if now - self.jobs.open[name].given > SILENCE_S:
                self.jobs.on_gone(name, "gone", "is not connected")
        self.jobs.check_stalls()
        self._patience.end_holdups(elapsed_s)

    def _tell_jobs(self, happened: Hello | Gone | None) -> None:
        """A device has its place, or is gone: that changes what becomes of its job."""
        match happened:
            case Hello(client_id=name, round=round, job=job, num_examples=num_examples):
                self.jobs.on_return(name, round, job, num_examples)
            case Gone(name=name, why=why, may_return=may_return):
                self.jobs.on_gone(name, "gone", why, may_return=may_return)

    # -- messages ----------------------------------------------------------------------------

    def _handle(self, received: Received | Refused | Outcast) -> None:
        if isinstance(received, Refused):
            self.sessions.on_refused(received)
            return
        if isinstance(received, Outcast):
            self._tell_jobs(self.sessions.on_outcast(received))
            return
        route, message = received.route, received.message
        if isinstance(message, Hello):
            self._tell_jobs(self.sessions.on_hello(received, message))
            return
        found = self.sessions.on_route(route)
        if found is None:
            self.sessions.refuse(route, "hello", "this connection has not said hello")
            return
        name, session = found
        if received.name not in (None, name):
            self.sessions.refuse(route, "admission", f"this key no longer belongs to {name!r}")
            return
        session.seen = time.monotonic()
        match message:
            case Heartbeat(round=round):
                self.sessions.send(name, Heartbeat(round=round))
                self.jobs.on_heartbeat(name, round)
            case Ready():
                self._on_ready(name, session, message)
            case Bye():
                self._tell_jobs(self.sessions.leave(name, "said bye"))
            case Fault():
                self._on_fault(name, message)
            case Fetch() | Part() | Update():
                self.jobs.on_message(name, message, received.payload)
            case _:
                detail = f"{type(message).__name__} is not for coordinators"
                self.sessions.refuse(route, "protocol", detail)

    def _on_fault(self, name: str, fault: Fault) -> None:
        extra = event("fault", client=name, code=fault.code, round=fault.round)
        if (behind := self.sessions.repeats.note("fault", name)) is not None:
            said = (name, one_line(fault.code), fault.detail, behind)
            log.warning("%s reports %s: %s%s", *said, extra=extra)
        if name not in self.jobs.awaited:  # else it counts as its absence
            self._counters.count_fault(name, fault.code)
        if not fault.round and fault.code in OF_NO_JOB:
            self.jobs.on_gone(name, fault.code, fault.detail, may_return=False)
        else:
            self.jobs.on_message(name, fault, None)

    def _on_ready(self, name: str, session: Session, ready: Ready) -> None:
        if wrong := self.sessions.offered.misfit(name, ready):
            self.sessions.refuse(session.route, "protocol", wrong)
            return
        self.sessions.log_ready(name, ready)
        self.jobs.on_ready(name, ready)  # first: what fails here was before this ready
        self.sessions.set_ready(name, plausible_ready(ready))
