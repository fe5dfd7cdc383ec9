"""Which exit or variant this device trains now: predicted costs, free memory, what failed before,
heat."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from msgspec.structs import replace

from edge_sdk.capacity.choice import Choice, Row, choose_exit, choose_variant
from edge_sdk.capacity.costs import SegmentCost
from edge_sdk.errors import ConfigError, EdgeError
from edge_sdk.hardware.conditions import FULL, Allowance
from edge_sdk.helpers.text import mebibytes, one_line
from edge_sdk.protocol.messages import DeviceProfile, ModelSpec, Plan, Ready, Segment, Welcome

GROWN = 1.25  # memory must have grown so much before what failed is tried
# Of the predicted peak that failed, without the runtime, so much is tried next: the next lever, or
# an exit less.
LESS = 0.9
LONGEST_S = 86_400.0  # that a job may be predicted to take


class Chooser:
    """The choice for one model, or among several. variants: those; is_own: the only one is this
    device's own, of which no coordinator knows. costs: of the model's segments or of the first of
    the variants, () until they are counted."""

    def __init__(self, variants: Sequence[ModelSpec] = (), *, is_own: bool = False) -> None:
        self.variants = tuple(variants)
        self.is_own = is_own
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
        """Take over the costs of a model of so many exits, or of its variants; fewer than all of
        them where memory did not do. excuse: why there are none."""
        self.costs, self.excuse = costs, excuse
        is_complete = len(costs) == (len(self.variants) or 2 * exits - 1)
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
        return old is None or self._facts(old) != self._facts(self.choice)

    def _choose(self, profile: DeviceProfile, welcome: Welcome, num_examples: int) -> Choice:
        if not self.costs:
            return _nothing(self.excuse or "costs are not counted yet")
        available = profile.memory_available_bytes
        if self._bound_bytes is not None:
            runtime = max(cost.runtime_bytes for cost in self.costs)
            available = min(available, runtime + self._bound_bytes)
        choose = choose_exit
        if self.variants:
            choose = partial(choose_variant, num_variants=len(self.variants))
        try:
            choice = choose(
                self.costs,
                profile=replace(profile, memory_available_bytes=available),
                deadline_s=_deadline_s(welcome, profile),
                num_examples=num_examples,
                epochs=welcome.plan.epochs,
            )
        except EdgeError as error:
            return _nothing(str(error))
        if not welcome.plan.flat:
            choice = replace(choice, num_weights=0)
        if (
            not self.variants
            and choice.exit == max(cost.last for cost in self.costs) < welcome.model.exit
        ):
            reason = f"memory did not do for counting what exit {choice.exit + 1} takes"
            choice = replace(choice, reason=reason)
        if available < profile.memory_available_bytes:
            failed = f"; more than {mebibytes(available)} failed here before"
            return replace(choice, reason=choice.reason + failed)
        return choice

    def note_failure(
        self, segments: Sequence[Segment], available_bytes: int, variant: int = 0
    ) -> str:
        """Remember that a job of these segments, of this variant, failed for memory; one line that
        says how much is not tried again until memory has grown."""
        wanted = self._rows(segments, variant)
        peak = max((row.peak_bytes for row in wanted), default=available_bytes)
        runtime = max((row.runtime_bytes for row in wanted), default=0)
        self._bound_bytes = int(LESS * max(0, peak - runtime))
        self._failed_bytes = available_bytes
        stages = ", ".join(f"{segment.first}-{segment.last}" for segment in segments)
        limit = f"at most {mebibytes(runtime + self._bound_bytes)} from now on"
        what = f"variant {variant}" if variant else f"stages {stages}"
        failed = f"training {what} failed for memory"
        return f"{failed}, predicted {mebibytes(peak)}; {limit}"

    def variant_of(self, model: ModelSpec) -> int:
        """The place of this model among the variants, from 1; 0: there are none. Raises ConfigError
        for a model that is none of them."""
        if self.is_own or not self.variants:
            return int(self.is_own)
        if model not in self.variants:
            said = f"the job's model is none of the {len(self.variants)} variants of the welcome"
            raise ConfigError(f"{said}: {one_line(repr(model))}; see what this coordinator runs")
        return self.variants.index(model) + 1

    def _rows(self, segments: Sequence[Segment], variant: int) -> list[Row]:
        """Those of a job's segments."""
        rows = self.choice.rows if self.choice else ()
        return [r for r in rows if _segment(r) in segments and r.variant == variant]

    def adapted(self, plan: Plan, variant: int = 0) -> Plan:
        """The plan with the levers that its segments need to fit here: the smallest micro-batch of
        any, stages run again if any needs it. A lever that the coordinator set stays."""
        wanted = self._rows(plan.segments, variant)
        sizes = [size for size in (plan.micro_batch, *(r.micro_batch for r in wanted)) if size]
        return replace(
            plan,
            micro_batch=min(sizes, default=0),
            recompute=plan.recompute or any(row.recompute for row in wanted),
        )

    def predicted_s(self, segments: Sequence[Segment], variant: int = 0) -> float:
        """Seconds that a job of these segments takes by the welcome's plan; 0: not known."""
        return sum(row.seconds or 0.0 for row in self._rows(segments, variant))

    def cache_bytes(self, segments: Sequence[Segment]) -> int:
        """How much of frozen features the trainer may keep, as it was predicted for these segments:
        0 if one of them has no room for its own."""
        deep = [segment for segment in segments if segment.first > 1]
        caches = [row.cache_bytes for row in self._rows(deep, 0)]
        return max(caches, default=0) if all(caches) else 0

    def refusal(self, segments: Sequence[Segment], variant: int = 0) -> str:
        """Why these segments, of this variant, are more than this device said it can train; "" when
        they are not."""
        choice = self.choice
        if choice is None:
            return "this device has not chosen an exit yet"
        if self.variants:
            return self._refusal_of(segments, variant, choice)
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

    def _refusal_of(self, segments: Sequence[Segment], variant: int, choice: Choice) -> str:
        fits = any(r.variant == variant and r.is_feasible for r in choice.rows)
        if variant > choice.variant or not fits:
            return (
                f"variant {variant} asked for, this device trains up to variant {choice.variant}: "
                f"{choice.reason}"
            )
        whole = Segment(first=1, last=self.variants[variant - 1].exit)
        if tuple(segments) != (whole,):
            asked = ", ".join(f"{segment.first}-{segment.last}" for segment in segments)
            return f"stages {asked} asked for, a variant is trained as one segment, 1-{whole.last}"
        return ""

    def ready(self) -> Ready:
        """The choice as the coordinator hears of it."""
        assert self.choice is not None
        return self._ready(self.choice)

    def _ready(self, choice: Choice) -> Ready:
        return Ready(
            exit=choice.exit,
            variant=0 if self.is_own else choice.variant,
            num_weights=choice.num_weights,
            stages=choice.stages,
            prefix_s=choice.prefix_s,
            stage_s=choice.stage_s,
            reason=choice.reason,
        )

    def _facts(self, choice: Choice) -> Ready:
        """The choice without its reason: it names the memory available, which is no news."""
        return replace(self._ready(choice), reason="")


def _deadline_s(welcome: Welcome, profile: DeviceProfile) -> float | None:
    """The run's deadline; a job of more than a day is none, whatever the coordinator says."""
    longest_s = LONGEST_S if profile.gflops else math.inf
    bound_s = min(welcome.deadline_s or math.inf, longest_s)
    return None if math.isinf(bound_s) else bound_s


def _within(choice: Choice, allowance: Allowance) -> Choice:
    """The choice within the work that conditions allow. Its rows stay: a job may be running."""
    if allowance.work == "none":
        reason = f"sitting out: {allowance.reason}"
        nothing = _nothing(reason)
        return replace(nothing, rows=choice.rows)
    if allowance.work == "short" and choice.stages:
        reason = f"{choice.reason}; no deeper stages: {allowance.reason}"
        return replace(choice, stages=(), stage_s=(), reason=reason)
    return choice


def _segment(row: Row) -> Segment:
    return Segment(first=row.first, last=row.last)


def _nothing(reason: str) -> Choice:
    return Choice(exit=0, stages=(), prefix_s=0.0, stage_s=(), reason=reason, rows=())
