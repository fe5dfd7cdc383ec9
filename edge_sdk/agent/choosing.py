"""What the agent says it can train: has the trainer count, looks at the device, tells the
coordinator of the choice when that changes."""

from __future__ import annotations

import logging

from edge_sdk.agent import events
from edge_sdk.agent.events import EventLog
from edge_sdk.agent.job_checks import check_welcome, checked_job
from edge_sdk.agent.options import Senses
from edge_sdk.agent.own_model import OwnModel, check_own_model, models_to_choose
from edge_sdk.agent.pipe import Estimate, Estimated
from edge_sdk.agent.state import State
from edge_sdk.agent.trainer_process import Supervisor
from edge_sdk.capacity.chooser import Chooser
from edge_sdk.capacity.costs import SegmentCost
from edge_sdk.errors import EdgeError
from edge_sdk.protocol.link import Link
from edge_sdk.protocol.messages import DeviceProfile, Job, Welcome

log = logging.getLogger(__name__)
COUNTED = ("model", "variants", "plan")  # of a welcome: what costs are counted of


class Choosing:
    """The choice of one agent. chooser: that of the run's model and plan. own: the device's own
    model, if it has one."""

    def __init__(
        self,
        state: State,
        senses: Senses,
        trainer: Supervisor,
        link: Link,
        tell: EventLog,
        own: OwnModel | None = None,
    ) -> None:
        self.chooser = Chooser()
        self._own = own
        self._state, self._senses, self._trainer = state, senses, trainer
        self._link, self._tell_event = link, tell
        self._is_counting = self._is_recount_due = False
        self._rest = ""  # why no trainer is started for long

    def profile(self) -> DeviceProfile:
        return self._senses.profile(self._trainer.own_bytes(), self._state.inspected)

    def begin(self, welcome: Welcome, before: Welcome | None) -> bool:
        """A coordinator has welcomed the device, the one before to the model and plan of before.
        Whether the choice stands; else it is to be counted anew."""
        stands = before and all(getattr(before, f) == getattr(welcome, f) for f in COUNTED)
        if not stands:
            variants = models_to_choose(welcome, self._own)
            self.chooser = Chooser(variants, is_own=self._own is not None)
            self.chooser.excuse = self._rest
        return bool(stands)

    def count(self, welcome: Welcome) -> None:
        """Have the trainer count, one model at a time: of those that come meanwhile the last. One
        that is not there yet is asked when it has read its data."""
        assert self._state.inspected is not None
        try:
            check_welcome(welcome, self._state.inspected)
            check_own_model(welcome, self._own)
        except EdgeError as error:
            log.warning("nothing to train for this device: %s", error)
            self._take_costs((), welcome, str(error))
            return
        if self._trainer.process is None:
            self.tell(is_repeated=True)
            return
        if self._is_counting:
            self._is_recount_due = True
            return
        self._is_counting = True
        available = self.profile().memory_available_bytes
        model, plan, variants = welcome.model, welcome.plan, self.chooser.variants
        asked = Estimate(model=model, plan=plan, variants=variants, memory_bytes=available)
        self._trainer.send(asked)

    def on_estimated(self, estimated: Estimated) -> None:
        welcome = self._state.last_welcome
        if self._is_counted() and welcome and estimated.model == welcome.model:
            self._take_costs(estimated.costs, welcome)

    def on_not_counted(self, reason: str) -> None:
        welcome = self._state.last_welcome
        if self._is_counted() and welcome:
            self._take_costs((), welcome, reason)

    def on_trainer_death(self, rest: str = "") -> None:
        """Until the next one has counted them, no exit can be trained. rest: why there is none for
        long."""
        self._is_counting = self._is_recount_due = False
        self.chooser.costs, self._rest = (), rest
        self.chooser.excuse = rest or self.chooser.excuse

    def checked(self, job: Job, welcome: Welcome) -> Job:
        """The job as the device trains it. Raises EdgeError, see checked_job."""
        return checked_job(job, welcome, self.chooser)

    def predicted_s(self, job: Job) -> float:
        """See Chooser.predicted_s."""
        chooser = self.chooser
        return chooser.predicted_s(job.plan.segments, chooser.variant_of(job.model))

    def note_failure(self, job: Job) -> str:
        """See Chooser.note_failure."""
        variant = self.chooser.variant_of(job.model)
        available = self.profile().memory_available_bytes
        return self.chooser.note_failure(job.plan.segments, available, variant)

    def look_at_conditions(self) -> None:
        """While a job runs: whether it has to end at its epoch's end."""
        allowance = self._senses.look(self.profile())[1]
        self._state.watch.note_conditions(allowance.reason if allowance.work == "none" else "")

    def tell(self, is_repeated: bool = False) -> None:
        """Choose an exit for the memory and conditions there are now. The coordinator hears of a
        choice that changed; is_repeated: of any."""
        state, inspected, chooser = self._state, self._state.inspected, self.chooser
        is_begun = bool(chooser.costs or chooser.excuse or chooser.choice)  # with a new model
        if state.welcome is None or inspected is None or not is_begun:
            return
        profile, allowance = self._senses.look(self.profile())
        if chooser.begin_recount(profile.memory_available_bytes):
            self.count(state.welcome)
        state.is_resting = allowance.work == "none"
        is_new = chooser.choose(profile, state.welcome, inspected.num_examples, allowance)
        choice = chooser.choice
        assert choice is not None
        if is_new and (choice.exit or chooser.costs):
            self._tell_event(events.chosen(choice, is_resting=state.is_resting))
        if is_new or is_repeated:
            self._link.send(chooser.ready())

    def _is_counted(self) -> bool:
        """The trainer has counted; whether that is what was asked for last."""
        self._is_counting, is_due = False, self._is_recount_due
        self._is_recount_due = False
        if is_due and self._state.last_welcome:
            self.count(self._state.last_welcome)
        return not is_due

    def _take_costs(
        self, costs: tuple[SegmentCost, ...], welcome: Welcome, excuse: str = ""
    ) -> None:
        available = self.profile().memory_available_bytes
        self._rest = ""
        self.chooser.set_costs(costs, welcome.model.exit, available, excuse)
        self.tell(is_repeated=True)
