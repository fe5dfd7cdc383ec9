"""Which exit this device trains now: predicted costs, free memory, and what failed before."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from edge_sdk.capacity import Choice, SegmentCost, choose_exit
from edge_sdk.errors import EdgeError
from edge_sdk.profile import DeviceProfile
from edge_sdk.wire import Ready, Segment, Welcome

GROWN = 1.25  # memory must have grown so much before what failed is tried


class Chooser:
    """costs: of every segment of the run's model, empty until they are counted."""

    def __init__(self) -> None:
        self.costs: tuple[SegmentCost, ...] = ()
        self.choice: Choice | None = None
        self._ceiling: int | None = None  # exits from here on failed for memory
        self._is_prefix_only = False  # a deeper stage alone failed for memory
        self._failed_bytes = 0  # memory that was available then

    def choose(self, profile: DeviceProfile, welcome: Welcome, num_examples: int) -> bool:
        """Choose for the memory there is now; True if it differs from the last choice."""
        if self._failed_bytes and profile.memory_available_bytes > GROWN * self._failed_bytes:
            self._ceiling, self._is_prefix_only, self._failed_bytes = None, False, 0
        costs = [c for c in self.costs if self._ceiling is None or c.last < self._ceiling]
        old = self.choice
        self.choice = self._choose(costs, profile, welcome, num_examples)
        return old is None or _facts(old) != _facts(self.choice)

    def _choose(
        self,
        costs: Sequence[SegmentCost],
        profile: DeviceProfile,
        welcome: Welcome,
        num_examples: int,
    ) -> Choice:
        if not costs:
            reason = "exit 1 failed for memory here" if self.costs else "costs are not counted yet"
            return Choice(exit=0, stages=(), prefix_s=0.0, stage_s=(), reason=reason, rows=())
        try:
            choice = choose_exit(
                costs,
                profile,
                deadline_s=welcome.deadline_s or None,
                num_examples=num_examples,
                epochs=welcome.plan.epochs,
            )
        except EdgeError as error:
            return Choice(exit=0, stages=(), prefix_s=0.0, stage_s=(), reason=str(error), rows=())
        return replace(choice, stages=(), stage_s=()) if self._is_prefix_only else choice

    def failed(self, segments: Sequence[Segment], available_bytes: int) -> str:
        """A job ended for memory: what is not tried again until memory grew, as one line."""
        self._failed_bytes = available_bytes
        if any(segment.first > 1 for segment in segments):
            self._is_prefix_only = True
            return "training a deeper stage failed for memory; only the prefix from now on"
        self._ceiling = max(segment.last for segment in segments)
        return f"training exit {self._ceiling} failed for memory; one exit less from now on"

    def cache_bytes(self, segments: Sequence[Segment]) -> int:
        """How much of frozen features the trainer may keep, as it was predicted for these segments:
        0 if one of them has no room for its own."""
        rows = self.choice.rows if self.choice else ()
        deep = {segment.first for segment in segments if segment.first > 1}
        kept = [row.cache_bytes for row in rows if row.first == row.last and row.first in deep]
        return max(kept, default=0) if all(kept) else 0

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


def told(choice: Choice) -> Ready:
    """What the coordinator hears of it."""
    return Ready(
        exit=choice.exit,
        stages=choice.stages,
        prefix_s=choice.prefix_s,
        stage_s=choice.stage_s,
        reason=choice.reason,
    )


def _facts(choice: Choice) -> Ready:
    """Without the reason: it names the memory available, which changes all the time."""
    return replace(told(choice), reason="")
