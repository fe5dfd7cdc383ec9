"""What a device refuses before anything is allocated for it: a welcome that does not fit its data,
a job that is not what the welcome and its own costs were about.

A device plans for the model and plan of `welcome`. A job may ask for a part of that: a cut of the
model at a shallower exit, or one of the welcome's variants that is no larger than the chosen one,
fewer epochs, another seed or learning rate; never for more. Where the device trains a model of its
own, that stands for the job's, which the coordinator cannot name."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from edge_sdk.agent.pipe import Inspected
from edge_sdk.capacity.chooser import Chooser
from edge_sdk.capacity.costs import SegmentCost
from edge_sdk.data.contract import misfit
from edge_sdk.errors import CapacityError, ConfigError, DataError
from edge_sdk.helpers.text import one_line
from edge_sdk.protocol.messages import Job, ModelSpec, Plan, TensorSpec, Welcome
from edge_sdk.protocol.plan_tensors import check_plan, job_specs
from edge_sdk.protocol.stream import layout
from edge_sdk.protocol.tensor_lists import check_segments, check_specs

# What decides memory, how tensors travel, or which examples are set aside: as it was counted.
SAME = ("batch_size", "micro_batch", "recompute", "optimizer", "flat", "holdout", "frozen")
# As the welcome has it, or without: nothing was counted or is kept for another.
SAME_OR_WITHOUT = ("distill", "prune", "static_norm", "scaler", "mask_absent", "correction")
# Any number where the welcome has one.
NONE_WHERE_NONE = (
    "momentum",
    "prox_mu",
    "distill_weight",
    "clip_norm",
    "clip_value",
    "logit_adjustment",
    "dyn_alpha",
)


def check_welcome(welcome: Welcome, inspected: Inspected) -> None:
    """Raise DataError unless the run's model takes this device's examples, ConfigError for one that
    contradicts itself."""
    model, plan = welcome.model, welcome.plan
    check_plan(plan)
    others = (*welcome.variants, *([plan.teacher.model] if plan.teacher else []))
    for other in others:
        for field in ("input_shape", "num_classes", "task", "vocabulary"):
            if getattr(other, field) != getattr(model, field):
                raise ConfigError(
                    f"run {welcome.run} has models of {field} {getattr(model, field)} and of "
                    f"{getattr(other, field)}; see what this coordinator runs"
                )
    if found := misfit(inspected, model):
        raise DataError(f"run {welcome.run}: {found}; join the run that they belong to")


def checked_job(job: Job, welcome: Welcome, chooser: Chooser) -> Job:
    """The job as it is trained here: its model cut at its deepest stage, its plan with the levers
    that make it fit. Raises CapacityError for more than the device said it can train, ConfigError
    for another model or plan than the welcome's, ShapeError for other tensors than they need."""
    if chooser.is_own:
        job = replace(job, model=chooser.variants[0])
    variant = chooser.variant_of(job.model)
    if refused := chooser.refusal(job.plan.segments, variant):
        raise CapacityError(refused)
    check_segments(job.plan.segments, job.model.exit)
    check_plan(job.plan)
    if not variant:
        _check_model(job.model, welcome.model)
    _check_plan(job.plan, welcome.plan)
    costs = chooser.costs[variant - 1 : variant] if variant else chooser.costs
    named = [replace(spec, digest=None) for spec in job.tensors]
    check_specs(named, _wanted(job, costs), f"job of round {job.round}", is_ordered=False)
    layout(job.tensors)
    deepest = max(segment.last for segment in job.plan.segments)
    model = replace(job.model, exit=deepest)
    return replace(job, model=model, plan=chooser.adapted(job.plan, variant))


def _wanted(job: Job, costs: Sequence[SegmentCost]) -> list[TensorSpec]:
    """All tensors that the job's plan needs, by the model and the teacher that were counted. The
    values that pruned weights begin again from come when the coordinator sends them."""
    model = [spec for cost in costs for spec in cost.tensors]
    buffers = {name for cost in costs for name in cost.buffers}
    teacher = costs[0].teacher if job.plan.teacher else ()
    has_initial = bool(job.plan.prune) and any(t.role == "initial" for t in job.tensors)
    return job_specs(job.plan, model, buffers, teacher, has_initial=has_initial)


def _check_model(got: ModelSpec, want: ModelSpec) -> None:
    for field in ModelSpec.__struct_fields__:
        ours, theirs = getattr(want, field), getattr(got, field)
        if theirs != ours and not (field == "exit" and theirs <= ours):
            raise _other("model", field, theirs, ours)


def _check_plan(got: Plan, want: Plan) -> None:
    for field in SAME:
        if getattr(got, field) != getattr(want, field):
            raise _other("plan", field, getattr(got, field), getattr(want, field))
    without = Plan(segments=got.segments)
    for field in SAME_OR_WITHOUT:
        if getattr(got, field) not in (getattr(want, field), getattr(without, field)):
            raise _other("plan", field, getattr(got, field), getattr(want, field))
    for field in NONE_WHERE_NONE:
        if getattr(got, field) and not getattr(want, field):
            raise _other("plan", field, getattr(got, field), getattr(want, field))
    if got.epochs > want.epochs:
        raise _other("plan", "epochs", got.epochs, want.epochs, "at most ")
    if (teacher := got.teacher) and (told := want.teacher):  # how much it teaches may differ
        teacher = replace(teacher, weight=told.weight, temperature=told.temperature)
    if teacher and teacher != want.teacher:
        raise _other("plan", "teacher", got.teacher, want.teacher)


def _other(of: str, field: str, got: object, want: object, how: str = "") -> ConfigError:
    wanted = how + one_line(repr(want))
    said = f"{of}.{field} of the job is {one_line(repr(got))}, welcome said {wanted}"
    return ConfigError(f"{said}; nothing was trained: see what this coordinator runs")
