"""What a plan's job brings and its update returns, tensor by tensor, and which fields of a plan do
not go together: one list for devices and coordinator, without a tensor.

Beside the model's weights travel tensors of other roles, named ROLE/NAME (fields.Role)."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from msgspec.structs import replace

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.fields import Role
from edge_sdk.protocol.messages import Plan, TensorSpec
from edge_sdk.protocol.tensor_lists import needed_names, trained_names

FLAT = "flat/all"


def check_plan(plan: Plan) -> None:
    """Raise ConfigError for fields that do not go together."""
    is_plain_sgd = plan.optimizer == "sgd" and not plan.momentum
    is_prefix = len(plan.segments) == 1 and plan.segments[0].first == 1
    for is_wrong, said in (
        (plan.correction and not is_plain_sgd, "correction needs sgd without momentum"),
        (plan.correction and plan.dyn_alpha, "correction and dyn_alpha exclude each other"),
        (plan.flat and plan.prune, "flat and prune exclude each other"),
        (plan.flat and plan.correction, "flat and correction exclude each other"),
        (plan.prune and plan.correction, "prune and correction exclude each other"),
        (plan.prune and not plan.holdout, "prune needs a holdout, by which it is decided"),
        (plan.flat and not is_prefix, "flat needs one segment from stage 1"),
        (plan.prune and not is_prefix, "prune needs one segment from stage 1"),
        (plan.frozen and plan.flat, "frozen and flat exclude each other"),
        (plan.frozen and plan.prune, "frozen and prune exclude each other"),
        (plan.frozen and plan.teacher, "frozen and a teacher exclude each other"),
        (plan.frozen and plan.static_norm, "frozen and static_norm exclude each other"),
        (plan.teacher and not is_prefix, "a teacher needs one segment from stage 1"),
    ):
        if is_wrong:
            raise ConfigError(f"plan: {said}; nothing was trained: change the plan")


def is_prunable(spec: TensorSpec, buffers: Collection[str]) -> bool:
    """Weights of layers, never biases, the scales of norms or statistics (LotteryFL)."""
    return spec.name not in buffers and len(spec.shape) >= 2


def job_specs(
    plan: Plan,
    model: Sequence[TensorSpec],
    buffers: Collection[str] = (),
    teacher: Sequence[TensorSpec] = (),
    *,
    has_initial: bool = False,
) -> list[TensorSpec]:
    """All that a job brings. model: the tensors of the whole model, or more than the plan needs;
    buffers: which of them are no parameters; teacher: those of the plan's second model.
    has_initial: with the values that pruned weights begin again from, which a client gets once."""
    needed = set(needed_names([spec.name for spec in model], plan.segments))
    specs = _weights(plan, [spec for spec in model if spec.name in needed], buffers)
    trained = _trained(plan, model)
    if has_initial:
        parameters = [spec for spec in trained if spec.name not in buffers]
        specs += [_beside("initial", spec) for spec in parameters]
    return specs + _beside_both_ways(plan, trained, buffers, teacher)


def update_specs(
    plan: Plan,
    model: Sequence[TensorSpec],
    buffers: Collection[str] = (),
    teacher: Sequence[TensorSpec] = (),
) -> list[TensorSpec]:
    """All that an update returns, in order; of "packed" tensors at most so many values."""
    trained = _trained(plan, model)
    comes_back = teacher if plan.teacher and plan.teacher.is_trained else ()
    return _weights(plan, trained, buffers) + _beside_both_ways(plan, trained, buffers, comes_back)


def _trained(plan: Plan, model: Sequence[TensorSpec]) -> list[TensorSpec]:
    names = set(trained_names([spec.name for spec in model], plan.segments, plan.frozen))
    return [spec for spec in model if spec.name in names]


def _weights(plan: Plan, specs: Sequence[TensorSpec], buffers: Collection[str]) -> list[TensorSpec]:
    """The model's tensors as they travel."""
    if plan.flat:
        count = sum(_count(spec) for spec in specs if spec.name not in buffers)
        return [TensorSpec(name=FLAT, shape=(count,), dtype="float32", role="flat")]
    if not plan.prune:
        return list(specs)
    found = []
    for spec in specs:
        if is_prunable(spec, buffers):
            packed = replace(_beside("packed", spec), shape=(_count(spec),))
            bits = replace(_beside("mask", spec), shape=(-(-_count(spec) // 8),), dtype="uint8")
            found += [bits, packed]
        else:
            found.append(spec)
    return found


def _beside_both_ways(
    plan: Plan,
    trained: Sequence[TensorSpec],
    buffers: Collection[str],
    teacher: Sequence[TensorSpec],
) -> list[TensorSpec]:
    parameters = [spec for spec in trained if spec.name not in buffers] if plan.correction else []
    beside = [_beside("correction", spec) for spec in parameters]
    return beside + [_beside("teacher", spec) for spec in teacher]


def _beside(role: Role, spec: TensorSpec) -> TensorSpec:
    return replace(spec, name=f"{role}/{spec.name}", role=role)


def _count(spec: TensorSpec) -> int:
    count = 1
    for size in spec.shape:
        count *= size
    return count
