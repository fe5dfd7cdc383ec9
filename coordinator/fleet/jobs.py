"""Jobs that devices have in hand: out, updates in, each update whole or not at all, counted once.

A seat is one client's job, from when it is given until its update is accepted or nobody waits for
it any more; a late one stays over the end of its round. Parts move as Credit allows; updates go to
the spool part by part, and so does, at the end of its round, a job that goes on. What grows: a
seat's small state per client, and for late seats one model for every round they began in.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from coordinator.cohorts.base import Absence, Assignment, Client, ClientUpdate
from coordinator.fleet.counters import Tally
from coordinator.fleet.flow_control import Credit, Paces
from coordinator.fleet.open_job import Seat, Senders, check_update, check_values, counted, make_job
from coordinator.fleet.spool import Arrived, Spool
from coordinator.fleet.transfers import Transfers
from edge_sdk.errors import EdgeError, StoreError
from edge_sdk.helpers.logs import Kind, event
from edge_sdk.protocol.link import Payload
from edge_sdk.protocol.messages import Accepted, Fault, Fetch, Message, Part, Ready, Update
from edge_sdk.protocol.tensors import Receiver, Sender

log = logging.getLogger(__name__)
RESEND_S = 10.0  # a device that says it has another job gets it again
MOST_GIVEN = 4  # times that a device which restarts gets one job
MOST_STALLS = 3  # times that an upload is asked for again without a new part


class Desk:
    """send(name, message, payload): False when the device cannot be reached now. was_counted(job):
    whether a committed round holds its update. on_absent(name): it failed or was late, and gets no
    job until it says that it is ready. Results gather in `finished`, from where the cohort takes
    them."""

    def __init__(
        self,
        run: str,
        spool: Spool,
        credit: Credit,
        send: Callable[[str, Message, Payload | None], bool],
        *,
        takes_late: bool = True,
        was_counted: Callable[[str], bool] = lambda job: False,
        on_absent: Callable[[str], None] = lambda name: None,
        tally: Tally | None = None,
    ) -> None:
        self.finished: list[ClientUpdate | Absence] = []
        self.credit = credit
        self.seats: dict[str, Seat] = {}
        self.transfers = Transfers(self.seats, credit, send)
        self._run = run
        self._spool = spool
        self._send = send
        self._takes_late = takes_late
        self._was_counted = was_counted
        self._on_absent = on_absent
        self._tally = tally or Tally()
        self._done: dict[str, tuple[str, bool]] = {}  # last job that ended, and whether it counts
        self._unheard: dict[str, Accepted | Fault] = {}  # of the end of a job: it met a full queue
        self._paces: dict[str, Paces] = {}
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
        if name in self.seats:  # a late one: nobody can do two jobs
            self._end(self.seats[name], counts=False)
        sender = self._senders.of(assignment)
        job = make_job(self._run, client, assignment, sender, round, deadline_s)
        seat = Seat(client, job, assignment, sender, self._paces.setdefault(name, Paces()))
        self.seats[name] = seat
        self._awaited.add(name)
        self._unheard.pop(name, None)
        if found := self._spool.take(round, name, job.id):
            arrived, tensors = found
            try:
                check_update(arrived.update, seat)
                check_values(tensors, seat)
            except EdgeError as error:
                log.warning("%s; it is asked for again", error)
            else:
                log.info("round %d: %s's update had arrived before the stop", round, name)
                self._count(seat, counted(client, arrived, tensors, assignment.tensors))
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
            seat = self.seats[name]
            self._absent(seat, "straggler", "late", "did not return in time", stays=True)
            if name not in self.seats:
                self._fault(name, "late", "the round was closed without this update", round)

    def leave_open(self) -> None:
        """The round ends, and who is still waited for goes on: nobody gives these jobs again."""
        for name in self._awaited:
            if not self.seats[name].outlives:
                self.seats[name].outlives = True
                self._hold(self.seats[name])

    def expire(self, before_round: int) -> None:
        """Give up the jobs of rounds before this one that are still in hand."""
        for seat in [seat for seat in self.seats.values() if seat.round < before_round]:
            self._fault(seat.name, "late", "this update comes too late", seat.round)
            self._absent(seat, "straggler", "late", "its update comes too late")

    def resume(self, round: int) -> None:
        """The jobs of rounds before this one that outlived a coordinator that was killed: updates
        that had arrived, and of which no committed round knows, are taken, others waited for."""
        for held, tensors in self._spool.held(round) if self._takes_late else ():
            client, job = held.client, held.job
            self._tally.of(client.id)
            if self._was_counted(job.id):
                continue
            if found := self._spool.take(job.round, client.id, job.id):
                self._done[client.id] = job.id, True
                self.finished.append(counted(client, *found, tensors))
                continue
            assignment = Assignment(job.model, job.plan, tensors, held.returns)
            paces = self._paces.setdefault(client.id, Paces())
            seat = Seat(client, job, assignment, Sender(tensors), paces)
            seat.is_late, seat.outlives = not held.outlives, held.outlives
            self._spool.holds(held, seat.sender)
            self.seats[client.id] = seat
            self._awaited |= {client.id} if seat.outlives else set()
        for seat in self.seats.values():  # files may have been large
            seat.given = time.monotonic()

    def clear_spool(self, round: int) -> None:
        """Delete what rounds before this one left, but for what may still count."""
        wanted = {(seat.round, seat.name) for seat in self.seats.values()}
        wanted |= {(u.round, u.client.id) for u in self.finished if isinstance(u, ClientUpdate)}
        self._spool.forget_before(round, wanted)

    # -- what devices say ----------------------------------------------------------------------

    def on_message(
        self, name: str, message: Fetch | Part | Update | Fault, payload: Payload | None
    ) -> None:
        """A message about a job. What is not about this client's seat is refused."""
        seat = self.seats.get(name)
        if seat is None or message.round != seat.round:
            if isinstance(message, Update):
                self._on_unwanted(name, message)
        elif isinstance(message, Fault):
            self._absent(seat, "failed", message.code, message.detail)
        elif isinstance(message, Fetch):
            if not self.transfers.on_fetch(seat, message):
                self._answer(name, "protocol", "too many ranges of parts at once", 0)
        elif isinstance(message, Update):
            self._on_update(seat, message)
        elif seat.receiver is not None:
            self._on_part(seat, message.index, payload or b"")
        self.transfers.pump()

    def on_return(self, name: str, round: int, job: str | None, num_examples: int = 0) -> None:
        """A device connected again with this job in hand: go on where the link broke."""
        if seat := self.seats.get(name):
            seat.has_examples(num_examples)
        if seat and job == seat.job.id:
            self.transfers.break_off(seat)
            self.transfers.pump()
            return
        self._unheard.pop(name, None)
        if job and round and (self._done.get(name) == (job, True) or self._was_counted(job)):
            self._send(name, Accepted(round=round), None)  # the first one was lost
        elif job:
            self._answer(name, "round", f"round {round} is over", round)
        if seat is None:
            return
        if seat.is_late:
            self._end(seat, counts=False)  # it has lost the job that nobody waits for
        else:
            seat.awaits_ready = True

    def on_ready(self, name: str, ready: Ready) -> None:
        """A device that has no job in hand, but ought to, gets it again."""
        seat = self.seats.get(name)
        if seat is None or not seat.awaits_ready:
            return
        if seat.fits(ready):
            self._give_again(seat)
        else:
            detail = f"came back and can train up to exit {ready.exit} only"
            self._absent(seat, "failed", "capacity", detail)

    def on_heartbeat(self, name: str, round: int) -> None:
        """A device that has another job in hand, or none, for a while never got this one. One that
        has it may take now what its queue did not."""
        seat, now = self.seats.get(name), time.monotonic()
        if message := self._unheard.pop(name, None):
            self._tell(name, message)
        if seat is None:
            return
        if round == seat.round or seat.awaits_ready:
            seat.mismatched_since = None
            self.transfers.ask(seat)
            self.transfers.pump()
        elif seat.mismatched_since is None:  # may have been sent before the job came
            seat.mismatched_since = now
        elif now - seat.mismatched_since > RESEND_S:
            self._give_again(seat)

    def on_gone(self, name: str, code: str, why: str, *, may_return: bool = True) -> None:
        """Nothing is heard of it. Its update is late if it comes back with it."""
        if seat := self.seats.get(name):
            self.transfers.lost(seat)
            if not (seat.is_late and may_return):
                self._absent(seat, "failed", code, why, stays=may_return)
            self.transfers.pump()

    def paused(self, seconds: float) -> None:
        """Nobody listened for so long: no device is late, or its link slow, for it."""
        now = time.monotonic()
        for seat in self.seats.values():
            seat.given = min(now, seat.given + seconds)
            seat.moved = min(now, seat.moved + seconds)

    def check_stalls(self) -> None:
        """Ask again for parts that a link's own pace would have brought by now. Who then sends
        nothing new again and again is failed."""
        for seat in self.transfers.stalled():
            seat.stalls += seat.receiver is not None  # what it asked for may still reach it
            if seat.stalls == MOST_STALLS:
                detail = f"its update stopped after {seat.bytes_up} bytes"
                self._fault(seat.name, "stalled", detail, seat.round)
                self._absent(seat, "failed", "stalled", detail)
                continue
            if seat.receiver is not None:
                seat.receiver.restart()
            self.transfers.ask(seat)
        self.transfers.pump()

    def _on_part(self, seat: Seat, index: int, payload: Payload) -> None:
        assert seat.receiver is not None
        try:
            if not seat.receiver.add(index, payload):
                return  # a repeated part is no progress
        except StoreError:
            raise
        except EdgeError as error:
            self._refuse(seat, error)
            return
        seat.bytes_up += len(payload)
        self.transfers.arrived(seat)
        if seat.receiver.is_complete:
            self._complete(seat)
        else:
            self.transfers.ask(seat)

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

    def _on_update(self, seat: Seat, update: Update) -> None:
        if update.job != seat.job.id:  # of a job that another state of this run gave
            self._answer(seat.name, "round", f"round {seat.round} has another job now", seat.round)
            seat.awaits_ready = True
            return
        if seat.update is not None and seat.update.digest == update.digest:
            return  # told again after a reconnect
        try:
            check_update(update, seat)
        except EdgeError as error:
            self._refuse(seat, error)
            return
        self.credit.drop(seat.name)
        seat.update, seat.announced, seat.awaits_ready = update, time.monotonic(), False
        seat.receiver = Receiver(update.tensors, self._spool.storage(seat.round, seat.name))
        if seat.receiver.is_complete:  # an update of no bytes
            self._complete(seat)
        else:
            self.transfers.ask(seat)

    def _complete(self, seat: Seat) -> None:
        """Everything arrived: check the values, keep it, then it counts."""
        assert seat.update is not None
        assert seat.receiver is not None
        tensors = seat.receiver.tensors()
        try:
            check_values(tensors, seat)
        except EdgeError as error:
            self._refuse(seat, error)
            return
        upload_s = time.monotonic() - seat.announced
        arrived = Arrived(
            update=seat.update, segments=seat.job.plan.segments,
            upload_s=upload_s, bytes_down=seat.bytes_down, bytes_up=seat.bytes_up,
        )  # fmt: skip
        self._spool.keep(seat.round, seat.name, arrived)
        self._count(seat, counted(seat.client, arrived, tensors, seat.assignment.tensors))

    def _count(self, seat: Seat, update: ClientUpdate) -> None:
        extra = event("update_accepted", client=seat.name, round=seat.round)
        log.info("round %d: the update of %s counts", seat.round, seat.name, extra=extra)
        self._end(seat, counts=True)
        self._tell(seat.name, Accepted(round=seat.round))
        self.finished.append(update)

    def _refuse(self, seat: Seat, error: EdgeError) -> None:
        self._fault(seat.name, error.code, str(error), seat.round)
        self._absent(seat, "failed", error.code, str(error))

    def _absent(
        self, seat: Seat, outcome: str, code: str, detail: str, *, stays: bool = False
    ) -> None:
        """The participant returns nothing that counts in its round; if it stays, maybe later."""
        kind: Kind = "update_late" if outcome == "straggler" else "update_failed"
        about = (seat.round, seat.name, outcome, code, detail)
        extra = event(kind, client=seat.name, round=seat.round, code=code)
        log.warning("round %d: %s %s: %s: %s", *about, extra=extra)
        if seat.name in self._awaited:
            if code != "gone":  # before the device says anything else, as that it is ready
                self._on_absent(seat.name)
            self.finished.append(
                Absence(
                    seat.client, seat.job.plan.segments, outcome, code, detail,
                    bytes_down=seat.bytes_down, bytes_up=seat.bytes_up,
                )
            )  # fmt: skip
        if stays and (self._takes_late or code == "gone"):  # the round may be open still
            seat.is_late, seat.outlives = True, False
            if self._takes_late:
                self._hold(seat)
            self._awaited.discard(seat.name)
        else:
            self._end(seat, counts=False)

    def _hold(self, seat: Seat) -> None:
        returns, outlives = seat.assignment.returns, seat.outlives
        self._spool.hold(seat.client, seat.job, returns, seat.sender, outlives=outlives)

    def _end(self, seat: Seat, *, counts: bool) -> None:
        """The seat is free; what has arrived of an update that does not count is deleted."""
        self.seats.pop(seat.name)
        self._tally.moved(seat.name, seat.bytes_down, seat.bytes_up)
        self._awaited.discard(seat.name)
        self.credit.drop(seat.name)
        self._done[seat.name] = seat.job.id, counts
        if not counts:
            self._spool.forget(seat.round, seat.name)

    def _give_again(self, seat: Seat) -> None:
        """It has lost its job, or never got it."""
        if seat.is_late:  # nobody waits for it; the device may have another
            self._fault(seat.name, "late", "the round was closed without this update", seat.round)
            self._end(seat, counts=False)
        elif seat.times_given == MOST_GIVEN:
            detail = f"the device restarted {MOST_GIVEN} times during its job, or lost it"
            self._fault(seat.name, "restarted", detail, seat.round)
            self._absent(seat, "failed", "restarted", detail)
        else:
            self.credit.drop(seat.name)
            seat.given_again()
            self._send(seat.name, seat.job, None)

    def _answer(self, name: str, code: str, detail: str, round: int) -> None:
        self._send(name, Fault(code=code, detail=detail, round=round), None)

    def _fault(self, name: str, code: str, detail: str, round: int) -> None:
        self._tell(name, Fault(code=code, detail=detail, round=round))

    def _tell(self, name: str, message: Accepted | Fault) -> None:
        """A job of the device has ended: it hears so now, or when it is heard of."""
        if not self._send(name, message, None):
            self._unheard[name] = message
