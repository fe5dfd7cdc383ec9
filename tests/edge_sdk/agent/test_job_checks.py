"""What a device refuses before anything is allocated for it: the checks without processes."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from edge_sdk.agent.job_checks import (
    NONE_WHERE_NONE,
    SAME,
    SAME_OR_WITHOUT,
    check_welcome,
    checked_job,
)
from edge_sdk.agent.pipe import Inspected
from edge_sdk.capacity.chooser import Chooser
from edge_sdk.capacity.counting import each_variant_cost, segment_costs
from edge_sdk.errors import CapacityError, ConfigError, DataError, EdgeError, ShapeError
from edge_sdk.models import build, initial_tensors
from edge_sdk.protocol.messages import (
    Job,
    ModelSpec,
    Plan,
    Prune,
    Segment,
    Teacher,
    TensorSpec,
    Welcome,
)
from edge_sdk.protocol.plan_tensors import job_specs
from edge_sdk.protocol.tensor_lists import role_of
from edge_sdk.protocol.tensors import specs_of
from tests.support.agent import MODEL, WHOLE, job_tensors
from tests.support.costs import welcome
from tests.support.devices import PROFILE

INSPECTED = Inspected(
    num_examples=24,
    input_shape=(1, 8, 8),
    num_classes=3,
    num_labels=3,
    runtime_bytes=0,
    gflops=1.0,
)
PROMISED = replace(WHOLE, epochs=5, distill="mutual", distill_weight=0.5)
WELCOME = replace(welcome(), plan=PROMISED)


@pytest.fixture(scope="module")
def counted() -> Chooser:
    """All three exits of the welcome's model fit."""
    chooser = Chooser()
    chooser.set_costs(segment_costs(MODEL, PROMISED, 24, 0), 3, 2**33)
    chooser.choose(replace(PROFILE, memory_available_bytes=2**33), WELCOME, 24)
    assert chooser.choice is not None
    assert chooser.choice.exit == 3
    return chooser


def job(
    model: ModelSpec = MODEL, plan: Plan = PROMISED, tensors: tuple[TensorSpec, ...] | None = None
) -> Job:
    specs = specs_of(job_tensors(plan)) if tensors is None else tensors
    return Job(id="4" * 32, round=4, model=model, plan=plan, tensors=specs, deadline_s=0.0)


@pytest.mark.parametrize(
    "segments",
    [((1, 3),), ((1, 1),), ((2, 2),), ((1, 1), (3, 3)), ((3, 3), (1, 2))],
)
def test_a_part_of_what_was_promised_is_trained_on_no_more_than_its_stages(counted, segments):
    parts = tuple(Segment(first=first, last=last) for first, last in segments)
    plan = replace(PROMISED, segments=parts, epochs=1, lr=0.5, seed=7, distill="none")
    taken = checked_job(job(plan=plan), WELCOME, counted)
    assert taken.model == replace(MODEL, exit=max(last for _, last in segments))
    assert taken.plan == plan


def test_the_order_of_the_list_is_free(counted):
    assert checked_job(job(tensors=job().tensors[::-1]), WELCOME, counted)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": "mlp"}, "model.family of the job is 'mlp', welcome said 'cnn'"),
        ({"input_shape": (3, 800, 800)}, "model.input_shape of the job is (3, 800, 800)"),
        ({"num_classes": 1_000_000}, "model.num_classes of the job is 1000000, welcome said 3"),
        ({"width": 0.5}, "model.width of the job is 0.5, welcome said 1.0"),
        ({"options": {"channels": (10**6,) * 3}}, "model.options of the job is {'channels'"),
        ({"exit": 4}, "model.exit of the job is 4, welcome said 3"),
    ],
)
def test_another_model(counted, changes, said):
    refused(counted, job(model=replace(MODEL, **changes)), ConfigError, said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"epochs": 100_000}, "plan.epochs of the job is 100000, welcome said at most 5"),
        ({"batch_size": 1_000_000}, "plan.batch_size of the job is 1000000, welcome said 8"),
        ({"batch_size": 2}, "plan.batch_size of the job is 2, welcome said 8"),
        ({"micro_batch": 1}, "plan.micro_batch of the job is 1, welcome said 0"),
        ({"recompute": True}, "plan.recompute of the job is True, welcome said False"),
        ({"optimizer": "sgd"}, "plan.optimizer of the job is 'sgd', welcome said 'adam'"),
        ({"momentum": 0.9}, "plan.momentum of the job is 0.9, welcome said 0.0"),
        ({"prox_mu": 0.1}, "plan.prox_mu of the job is 0.1, welcome said 0.0"),
        ({"distill": "shallow-to-deep"}, "welcome said 'mutual'"),
    ],
)
def test_a_plan_that_takes_more_than_was_promised(counted, changes, said):
    refused(counted, job(plan=replace(PROMISED, **changes)), ConfigError, said)


@pytest.mark.parametrize(
    ("segments", "kind", "said"),
    [
        (((2, 3),), CapacityError, "stages 2-3 asked for"),
        (((1, 4),), CapacityError, "stages 1-4 asked for"),
        (((3, 1),), CapacityError, "stages 3-1 asked for"),
        (((1, 1),) * 100, ConfigError, "overlaps another"),  # a hundred times the work
        (((1, 2), (2, 2)), ConfigError, "overlaps another"),
        (((1, 0),), ConfigError, "empty"),
    ],
)
def test_segments_beyond_the_choice(counted, segments, kind, said):
    # msgspec lets none of last 0 in
    parts = tuple(Segment(first=first, last=last) for first, last in segments)
    plan = replace(PROMISED, segments=parts)
    refused(counted, job(plan=plan, tensors=job().tensors), kind, said)


def test_segments_beyond_the_jobs_own_model(counted):
    refused(counted, job(model=replace(MODEL, exit=2)), ConfigError, "exceeds exit 2")


NAMES = {spec.name: spec for spec in job().tensors}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"shape": (2**30,)}, "exits.0.2.bias is (1073741824,) float32 weight, expected (3,)"),
        ({"dtype": "float64"}, "exits.0.2.bias is (3,) float64 weight, expected (3,) float32"),
        ({"role": "teacher"}, "exits.0.2.bias is (3,) float32 teacher"),
        ({"name": "exits.7.bias"}, "tensors missing: exits.0.2.bias; not expected: exits.7.bias"),
        ({"name": "exits.1.2.bias"}, "tensors missing: exits.0.2.bias; not expected: none; named"),
    ],
)
def test_other_tensors(counted, changes, said):
    wrong = replace(NAMES["exits.0.2.bias"], **changes)
    specs = tuple(wrong if spec.name == "exits.0.2.bias" else spec for spec in job().tensors)
    refused(counted, job(tensors=specs), ShapeError, said)


@pytest.mark.parametrize("extra", [1, 9_000])
def test_more_tensors_than_the_model_has(counted, extra):
    big = tuple(TensorSpec(name=f"t{n}", shape=(2**28,), dtype="float32") for n in range(extra))
    refused(counted, job(tensors=job().tensors + big), ShapeError, "not expected: t0")


def refused(chooser: Chooser, wrong: Job, kind: type[EdgeError], said: str) -> None:
    with pytest.raises(kind) as found:
        checked_job(wrong, WELCOME, chooser)
    assert said in str(found.value)
    assert "\n" not in str(found.value)


# -- the welcome ---------------------------------------------------------------------------------


def of_model(**changes: Any) -> Welcome:
    return replace(WELCOME, model=replace(MODEL, **changes))


def test_welcome_to_a_run_of_the_devices_examples():
    check_welcome(WELCOME, INSPECTED)
    check_welcome(of_model(num_classes=10), INSPECTED)  # others have the other seven


@pytest.mark.parametrize(
    "changes", [{"input_shape": (1, 30_000, 30_000)}, {"input_shape": (64,)}, {"num_classes": 2}]
)
def test_welcome_to_a_run_of_other_examples(changes):
    with pytest.raises(DataError, match=r"its examples are \(1, 8, 8\) with 3 classes"):
        check_welcome(of_model(**changes), INSPECTED)


# -- variants ------------------------------------------------------------------------------------

VARIANTS = (replace(MODEL, width=0.5), MODEL)
OFFER = replace(WELCOME, variants=VARIANTS)


@pytest.fixture(scope="module")
def among_variants() -> Chooser:
    """Both fit."""
    chooser = Chooser(VARIANTS)
    chooser.set_costs(tuple(each_variant_cost(VARIANTS, PROMISED, 24, 0)), 3, 2**33)
    chooser.choose(replace(PROFILE, memory_available_bytes=2**33), OFFER, 24)
    return chooser


@pytest.mark.parametrize("spec", VARIANTS)
def test_a_variant_is_trained_with_all_of_its_own_tensors(among_variants, spec):
    given = job(spec, tensors=specs_of(initial_tensors(spec, 0)))
    assert checked_job(given, OFFER, among_variants) == given
    other = next(v for v in VARIANTS if v != spec)
    with pytest.raises(ShapeError, match="float32 weight, expected"):
        checked_job(replace(given, model=other), OFFER, among_variants)


@pytest.mark.parametrize(
    ("spec", "kind", "said"),
    [
        (replace(MODEL, width=0.25), ConfigError, "is none of the 2 variants of the welcome"),
        (replace(MODEL, exit=2), ConfigError, "is none of the 2 variants of the welcome"),
    ],
)
def test_a_model_that_is_no_variant(among_variants, spec, kind, said):
    with pytest.raises(kind, match=said):
        checked_job(job(spec), OFFER, among_variants)


def test_a_cut_of_a_variant(among_variants):
    plan = replace(PROMISED, segments=(Segment(first=1, last=2),))
    with pytest.raises(CapacityError, match="stages 1-2 asked for, a variant is trained as one"):
        checked_job(job(plan=plan), OFFER, among_variants)


# -- fields of the plan and what travels with them -----------------------------------------------

FREE = {"segments", "epochs", "lr", "weight_decay", "exit_weights", "distill_temperature", "seed"}
RICH = replace(
    PROMISED,
    optimizer="sgd",
    correction=True,
    holdout=0.2,
    teacher=Teacher(model=replace(MODEL, exit=1), weight=0.5, is_trained=True),
)


def test_every_field_of_a_plan_has_its_rule():
    named = [*SAME, *SAME_OR_WITHOUT, *NONE_WHERE_NONE, "teacher"]
    assert sorted({*named} | FREE) == sorted(Plan.__struct_fields__)
    assert len(named) + len(FREE) == len(Plan.__struct_fields__)


@pytest.fixture(scope="module")
def counted_richly() -> Chooser:
    chooser = Chooser()
    chooser.set_costs(segment_costs(MODEL, RICH, 24, 0), 3, 2**33)
    chooser.choose(replace(PROFILE, memory_available_bytes=2**33), replace(WELCOME, plan=RICH), 24)
    return chooser


def rich_specs(plan: Plan) -> tuple[TensorSpec, ...]:
    model, buffers = build(MODEL), [name for name, _ in build(MODEL).named_buffers()]
    teacher = specs_of(build(replace(MODEL, exit=1)).tensors())
    return tuple(job_specs(plan, specs_of(model.tensors()), buffers, teacher))


def check_rich(chooser: Chooser, given: Job, promised: Plan = RICH) -> Job:
    return checked_job(given, replace(WELCOME, plan=promised), chooser)


@pytest.mark.parametrize("last", [1, 3])
def test_control_variates_and_a_teacher_come_with_the_weights(counted_richly, last):
    plan = replace(RICH, segments=(Segment(first=1, last=last),))
    specs = rich_specs(plan)
    assert {role_of(spec.name)[0] for spec in specs} == {"weight", "correction", "teacher"}
    assert check_rich(counted_richly, job(plan=plan, tensors=specs)).plan == plan
    with pytest.raises(ShapeError, match="tensors missing: teacher/stages.0.0.weight"):
        check_rich(
            counted_richly,
            job(
                plan=plan, tensors=tuple(s for s in specs if s.name != "teacher/stages.0.0.weight")
            ),
        )
    plain = tuple(spec for spec in specs if spec.role == "weight")
    with pytest.raises(ShapeError, match="tensors missing: correction/exits.0.2.bias"):
        check_rich(counted_richly, job(plan=plan, tensors=plain))


def test_a_job_may_leave_out_what_was_promised(counted_richly):
    plan = replace(RICH, correction=False, teacher=None)
    assert check_rich(counted_richly, job(plan=plan)).plan == plan
    told = replace(RICH, teacher=replace(RICH.teacher, weight=0.25, temperature=3.0))
    assert check_rich(counted_richly, job(plan=told, tensors=rich_specs(told))).plan == told


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": replace(RICH.teacher, model=MODEL)}, "plan.teacher of the job is Teacher("),
        ({"teacher": replace(RICH.teacher, is_trained=False)}, "plan.teacher of the job is"),
        ({"holdout": 0.0}, "plan.holdout of the job is 0.0, welcome said 0.2"),
        ({"flat": True, "correction": False}, "plan.flat of the job is True, welcome said False"),
        ({"static_norm": True}, "plan.static_norm of the job is True, welcome said False"),
        ({"scaler": "always"}, "plan.scaler of the job is 'always', welcome said 'none'"),
        ({"mask_absent": True}, "plan.mask_absent of the job is True, welcome said False"),
        ({"prune": Prune(share=0.1, target=0.5)}, "prune and correction exclude each other"),
        ({"clip_norm": 1.0}, "plan.clip_norm of the job is 1.0, welcome said 0.0"),
        ({"logit_adjustment": 1.0}, "plan.logit_adjustment of the job is 1.0, welcome said 0.0"),
        ({"dyn_alpha": 0.1, "correction": False}, "plan.dyn_alpha of the job is 0.1, welcome said"),
    ],
)
def test_a_plan_with_fields_that_were_not_announced(counted_richly, changes, said):
    plan = replace(RICH, **changes)
    with pytest.raises(ConfigError) as found:
        check_rich(counted_richly, job(plan=plan, tensors=rich_specs(RICH)))
    assert said in str(found.value)


def test_a_pruned_model_may_bring_fewer_values(counted):
    """The values that remain, the mask of all, and what they begin again from if it is sent."""
    promised = replace(PROMISED, prune=Prune(share=0.1, target=0.5), holdout=0.2)
    chooser = Chooser()
    chooser.set_costs(segment_costs(MODEL, promised, 24, 0), 3, 2**33)
    chooser.choose(
        replace(PROFILE, memory_available_bytes=2**33), replace(WELCOME, plan=promised), 24
    )
    model, buffers = build(MODEL), [name for name, _ in build(MODEL).named_buffers()]
    every = job_specs(promised, specs_of(model.tensors()), buffers, has_initial=True)
    without = job_specs(promised, specs_of(model.tensors()), buffers)
    for specs in (every, without):
        fewer = tuple(
            replace(s, shape=(s.shape[0] // 2,)) if s.role == "packed" else s for s in specs
        )
        assert check_rich(chooser, job(plan=promised, tensors=fewer), promised)
    for role in ("packed", "mask"):
        more = tuple(replace(s, shape=(s.shape[0] + 1,)) if s.role == role else s for s in without)
        with pytest.raises(ShapeError, match=rf"{role}/\S+ is \(\d+,\) .* expected"):
            check_rich(chooser, job(plan=promised, tensors=more), promised)
    some = tuple(s for s in every if s.name != "initial/exits.0.2.bias")
    with pytest.raises(ShapeError, match="tensors missing: initial/exits.0.2.bias"):
        check_rich(chooser, job(plan=promised, tensors=some), promised)


def test_welcomes_that_contradict_themselves():
    with pytest.raises(ConfigError, match="correction needs sgd without momentum"):
        check_welcome(replace(WELCOME, plan=replace(WHOLE, correction=True)), INSPECTED)
    other = replace(MODEL, num_classes=4)
    with pytest.raises(ConfigError, match="has models of num_classes 3 and of 4"):
        check_welcome(replace(WELCOME, variants=(MODEL, other)), INSPECTED)
    taught = replace(WHOLE, teacher=Teacher(model=replace(MODEL, input_shape=(64,)), weight=0.5))
    with pytest.raises(ConfigError, match=r"has models of input_shape \(1, 8, 8\) and of \(64,\)"):
        check_welcome(replace(WELCOME, plan=taught), INSPECTED)
