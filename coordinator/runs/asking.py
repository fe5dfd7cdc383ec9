"""Whom one round asks: its participants, then others for those who failed, until it has the updates
that it needs or waiting is in vain."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator

from coordinator.aggregation.border import Border
from coordinator.cohorts.base import Absence, Client, ClientUpdate, Cohort, Fleet
from coordinator.cohorts.quorum import updates_needed
from coordinator.cohorts.sampling import sample
from coordinator.methods.base import Method
from coordinator.store.store import Store
from edge_sdk.errors import TrainerError
from edge_sdk.helpers.logs import event

log = logging.getLogger(__name__)
FIGURE = re.compile(r"[\d.]+")
MOST = 3  # kinds of failures in an error


class Reasons:
    """Why participants of a round failed, by kind: details that differ in figures alone are one."""

    def __init__(self, round: int) -> None:
        self._round = round
        self._clients: dict[tuple[str, str], set[str]] = {}
        self._first: dict[tuple[str, str], str] = {}

    def note(self, absence: Absence) -> bool:
        """Whether it is the first of its kind."""
        name = rf"\b{re.escape(absence.client.id)}\b"
        kind = absence.code, FIGURE.sub("", re.sub(name, "", absence.detail))
        is_first = kind not in self._first
        self._first.setdefault(kind, absence.detail)
        self._clients.setdefault(kind, set()).add(absence.client.id)
        return is_first

    def __str__(self) -> str:
        """The most frequent kinds, e.g. "3 failed: trainer: loss is not finite"."""
        kinds = sorted(self._first, key=lambda kind: -len(self._clients[kind]))
        said = [f"{len(self._clients[k])} failed: {k[0]}: {self._first[k]}" for k in kinds[:MOST]]
        more = [f"and {len(kinds) - MOST} other reasons"] if len(kinds) > MOST else []
        return "; ".join(said + more) or "no reason was told"


class Asking:
    """One round. Making it draws the participants, and may wait for devices; a round that was cut
    short has those of before. A fleet is told whom such a round had asked; in asynchronous mode it
    knows who is still at work for a round before."""

    def __init__(
        self, store: Store, method: Method, cohort: Cohort, border: Border, round: int
    ) -> None:
        self._store = store
        self._method = method
        self._cohort = cohort
        self._border = border
        self._asked: dict[str, int] = {}  # examples
        self._round = round
        fleet = cohort if isinstance(cohort, Fleet) else None
        self._asynchronous = fleet if store.config.mode == "async" else None
        self._counted: set[str] = set()
        self._failed: set[str] = set()
        self._reasons = Reasons(round)
        self._is_told = fleet is not None  # a fleet logs each failure when it hears of it
        known, num_chosen = store.participants_of(round)
        if fleet:
            fleet.expect(known, num_chosen, border.check)
        self.chosen = known or self._draw_first()
        self._num_chosen = num_chosen or len(self.chosen)  # of whom the quorum is a share

    def results(self) -> Iterator[ClientUpdate | Absence]:
        """Train the round. One that lacks updates is no round: others are asked, and those who
        failed again. Raises TrainerError when nobody returns anything."""
        store, round, tries = self._store, self._round, 0
        chosen = self.chosen
        while True:
            store.begin(round, chosen)
            store.record_clients(chosen)
            work = {client.id: self._method.assign(client, round) for client in chosen}
            self._asked |= {client.id: client.num_examples for client in chosen}
            if self._asynchronous:  # a round asks few
                self._asked |= store.client_examples()
            before = len(self._counted)
            results = self._watched(self._cohort.train(work, round, store.config.deadline_s))
            asked = [number for number in self._asked.values() if number]
            for result in self._border.screened(
                round, results, {name: job.tensors for name, job in work.items()}, asked
            ):
                self._note(result)
                yield result
                del result  # no reference stays here
            lacking = self._num_needed - len(self._counted)
            if lacking <= 0:
                return
            tries = 0 if len(self._counted) > before else tries + 1
            said = "round %d: %d of %d needed returned"
            log.warning(said, round, len(self._counted), self._num_needed)
            if not self._cohort.rest(tries):
                if self._counted:
                    return
                raise TrainerError(
                    f"round {round}: none of {len(self._failed)} participants returned an update, "
                    f"{tries} times in a row; {self._reasons}; {store.way_on()}"
                )
            chosen = self._draw(lacking)

    @property
    def _num_needed(self) -> int:
        """Updates. Asynchronous: a share of all who had a job, also of a round before."""
        if self._asynchronous:
            return self._asynchronous.needed
        return updates_needed(self._store.config, self._num_chosen)

    @property
    def _num_busy(self) -> int:
        """Clients that take a place of this round with a job of a round before."""
        return self._asynchronous.num_busy if self._asynchronous else 0

    def _watched(
        self, results: Iterator[ClientUpdate | Absence]
    ) -> Iterator[ClientUpdate | Absence]:
        """Pass the results on, and log the first failure of each kind."""
        for result in results:
            if isinstance(result, Absence) and self._reasons.note(result) and not self._is_told:
                name, code = result.client.id, result.code
                about = (self._round, name, result.outcome, code, result.detail)
                extra = event("update_failed", client=name, round=self._round, code=code)
                log.warning("round %d: %s %s: %s: %s", *about, extra=extra)
            yield result
            del result

    def _note(self, result: ClientUpdate | Absence) -> None:
        if isinstance(result, Absence):
            self._failed.add(result.client.id)
        elif self._asynchronous or not result.staleness:
            self._counted.add(result.client.id)

    def _draw_first(self) -> list[Client]:
        """Participants of whom a share will be needed: not of nobody, where all who are there are
        late with the job of a round before. Asynchronous: those count."""
        tries = 0
        while not (chosen := self._draw(self._store.config.participants)):
            tries += 1
            if self._num_busy or not self._cohort.rest(tries):
                break
        return chosen

    def _draw(self, places: int | None) -> list[Client]:
        """Clients for so many places (None: all), first those who have not failed in this round.
        Nobody who has a job, or has returned one, is asked again."""
        if places is not None:
            places = max(0, places - self._num_busy)
        clients = [c for c in self._cohort.clients() if c.id not in self._counted]
        seed = self._store.config.seed
        return sample(clients, places, seed=seed, round=self._round, failed=self._failed)
