"""Which exit this device trains now: predicted costs, free memory, what failed before, heat."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec.structs import replace

from edge_sdk.capacity.choice import Choice, Row, choose_exit
from edge_sdk.capacity.costs import SegmentCost
from edge_sdk.errors import EdgeError
from edge_sdk.hardware.conditions import FULL, Allowance
from edge_sdk.helpers.text import mebibytes
from edge_sdk.protocol.messages import DeviceProfile, Plan, Ready, Segment, Welcome

GROWN = 1.25  # memory must have grown so much before what failed is tried
# Of the predicted peak that failed, without the runtime, so much is tried next: the next lever, or
# an exit less.
LESS = 0.9
LONGEST_S = 86_400.0  # that a job may be predicted to take


class Chooser:
    """The choice for one model. costs: those of its segments, () until they are counted."""

    def __init__(self) -> None:
        self.costs: tuple[SegmentCost, ...] = ()
        self.excuse = ""  # why they could not be counted
        self._counted_with = math.inf  # memory there was when not all could be
        self.choice: Choice | None = None
        # A predicted peak that exceeds the runtime by more failed for memory. The runtime itself
        # differs a little from trainer to trainer.
        self._bound_bytes: int | None = None
        self._failed_bytes = 0  # memory that was available then

    def set_costs(
        self, costs: tuple[SegmentCost, ...], exits: int, available_bytes: int, excuse: str = ""
    ) -> None:
        """Take over the costs of a model of so many exits; fewer than all its segments' where
        memory did not do for counting them. excuse: why there are none."""
        self.costs, self.excuse = costs, excuse
        is_complete = len(costs) == 2 * exits - 1
        self._counted_with = math.inf if is_complete else available_bytes

    def begin_recount(self, available_bytes: int) -> bool:
        """Whether memory has grown since not all could be counted; said once for every growth."""
        if available_bytes <= GROWN * self._counted_with:
            return False
        self._counted_with = available_bytes
        return True

    def choose(
        self,
        profile: DeviceProfile,
        welcome: Welcome,
        num_examples: int,
        allowance: Allowance = FULL,
    ) -> bool:
        """Choose for the memory there is now; whether the choice differs from the last one."""
        if profile.memory_available_bytes > GROWN * self._failed_bytes:
            self._bound_bytes = None
        old = self.choice
        self.choice = _within(self._choose(profile, welcome, num_examples), allowance)
        return old is None or _facts(old) != _facts(self.choice)

    def _choose(self, profile: DeviceProfile, welcome: Welcome, num_examples: int) -> Choice:
        if not self.costs:
            return _nothing(self.excuse or "costs are not counted yet")
        available = profile.memory_available_bytes
        if self._bound_bytes is not None:
            runtime = max(cost.runtime_bytes for cost in self.costs)
            available = min(available, runtime + self._bound_bytes)
        try:
            choice = choose_exit(
                self.costs,
                replace(profile, memory_available_bytes=available),
                deadline_s=_deadline_s(welcome, profile),
                num_examples=num_examples,
                epochs=welcome.plan.epochs,
            )
        except EdgeError as error:
            return _nothing(str(error))
        if choice.exit == max(cost.last for cost in self.costs) < welcome.model.exit:
            reason = f"memory did not do for counting what exit {choice.exit + 1} takes"
            choice = replace(choice, reason=reason)
        if available < profile.memory_available_bytes:
            failed = f"; more than {mebibytes(available)} failed here before"
            return replace(choice, reason=choice.reason + failed)
        return choice

    def note_failure(self, segments: Sequence[Segment], available_bytes: int) -> str:
        """Remember that a job of these segments failed for memory; one line that says how much is
        not tried again until memory has grown."""
        wanted = [row for row in self._rows() if _segment(row) in segments]
        peak = max((row.peak_bytes for row in wanted), default=available_bytes)
        runtime = max((row.runtime_bytes for row in wanted), default=0)
        self._bound_bytes = int(LESS * max(0, peak - runtime))
        self._failed_bytes = available_bytes
        stages = ", ".join(f"{segment.first}-{segment.last}" for segment in segments)
        limit = f"at most {mebibytes(runtime + self._bound_bytes)} from now on"
        failed = f"training stages {stages} failed for memory"
        return f"{failed}, predicted {mebibytes(peak)}; {limit}"

    def _rows(self) -> Sequence[Row]:
        return self.choice.rows if self.choice else ()

    def adapted(self, plan: Plan) -> Plan:
        """The plan with the levers that its segments need to fit here: the smallest micro-batch of
        any, stages run again if any needs it. A lever that the coordinator set stays."""
        wanted = [row for row in self._rows() if _segment(row) in plan.segments]
        sizes = [size for size in (plan.micro_batch, *(r.micro_batch for r in wanted)) if size]
        return replace(
            plan,
            micro_batch=min(sizes, default=0),
            recompute=plan.recompute or any(row.recompute for row in wanted),
        )

    def predicted_s(self, segments: Sequence[Segment]) -> float:
        """Seconds that a job of these segments takes by the welcome's plan; 0: not known."""
        return sum(row.seconds or 0.0 for row in self._rows() if _segment(row) in segments)

    def cache_bytes(self, segments: Sequence[Segment]) -> int:
        """How much of frozen features the trainer may keep, as it was predicted for these segments:
        0 if one of them has no room for its own."""
        deep = [segment for segment in segments if segment.first > 1]
        caches = [row.cache_bytes for row in self._rows() if _segment(row) in deep]
        return max(caches, default=0) if all(caches) else 0

    def refusal(self, segments: Sequence[Segment]) -> str:
        """Why these segments are more than this device said it can train; "" when they are not."""
        choice = self.choice
        if choice is None:
            return "this device has not chosen an exit yet"
        for segment in segments:
            is_prefix = segment.first == 1 and segment.last <= choice.exit
            is_stage = segment.first == segment.last and (
                segment.first in choice.stages or 1 < segment.first <= choice.exit
            )
            if not (is_prefix or is_stage):
                return (
                    f"stages {segment.first}-{segment.last} asked for, this device trains up to "
                    f"exit {choice.exit} and stages {list(choice.stages)} alone: {choice.reason}"
                )
        return ""


def _deadline_s(welcome: Welcome, profile: DeviceProfile) -> float | None:
    """The run's deadline; a job of more than a day is none, whatever the coordinator says."""
    longest_s = LONGEST_S if profile.gflops else math.inf
    bound_s = min(welcome.deadline_s or math.inf, longest_s)
    return None if math.isinf(bound_s) else bound_s


def _within(choice: Choice, allowance: Allowance) -> Choice:
    """The choice within the work that conditions allow. Its rows stay: a job may be running."""
    if allowance.work == "none":
        reason = f"sitting out: {allowance.reason}"
        return replace(choice, exit=0, stages=(), prefix_s=0.0, stage_s=(), reason=reason)
    if allowance.work == "short" and choice.stages:
        reason = f"{choice.reason}; no deeper stages: {allowance.reason}"
        return replace(choice, stages=(), stage_s=(), reason=reason)
    return choice


def ready_message(choice: Choice) -> Ready:
    """The choice as the coordinator hears of it."""
    return Ready(
        exit=choice.exit,
        stages=choice.stages,
        prefix_s=choice.prefix_s,
        stage_s=choice.stage_s,
        reason=choice.reason,
    )


def _facts(choice: Choice) -> Ready:
    """The choice without its reason: it names the memory available, which is no news."""
    return replace(ready_message(choice), reason="")


def _segment(row: Row) -> Segment:
    return Segment(first=row.first, last=row.last)


def _nothing(reason: str) -> Choice:
    return Choice(exit=0, stages=(), prefix_s=0.0, stage_s=(), reason=reason, rows=())
