"""What a plan's second model, the teacher, takes beside the one that is trained."""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from edge_sdk.capacity.costs import Moment, SegmentCost
from edge_sdk.capacity.moments import FEW, forward, freeze, moments, num_bytes, whole_step
from edge_sdk.models import family_code
from edge_sdk.models.checking import checked_model
from edge_sdk.models.flops import FlopCounter
from edge_sdk.models.staged import drawn_inputs
from edge_sdk.protocol.messages import Plan, TensorSpec
from edge_sdk.protocol.tensors import specs_of


class SecondModel(NamedTuple):
    """moment: what lies in memory while it answers a batch. copy_moments: of the steps of a copy
    that is trained before the model, its gradients and optimizer included; () where none is."""

    specs: tuple[TensorSpec, ...]
    moment: Moment
    copy_moments: tuple[Moment, ...]
    flops_per_example: float

    @property
    def is_trained(self) -> bool:
        return bool(self.copy_moments)


def second_model(plan: Plan, copies: int) -> SecondModel | None:
    """That of the plan, if it has one. copies: of trained parameters, which the optimizer holds.
    Seeds nothing. Raises ConfigError where it cannot be built."""
    if (teacher := plan.teacher) is None:
        return None
    model = checked_model(teacher.model)
    x = drawn_inputs(teacher.model, FEW)
    with family_code(teacher.model, "counting the teacher's costs", model):
        model.ready("cpu")
        with FlopCounter() as asked:
            _, widest = freeze(list(model.stages), x)
        moment, flops = Moment(example_bytes=widest / FEW), asked.total
        steps: tuple[Moment, ...] = ()
        if teacher.is_trained:
            step = whole_step(model, plan, teacher.model.task)
            beside_bytes = (1 + copies) * num_bytes(step.named.values())
            steps = tuple(
                replace(m, fixed_bytes=m.fixed_bytes + beside_bytes) for m in moments(step, [x])[0]
            )
            with FlopCounter() as trained:
                forward(step, [x])
            flops += trained.total
    return SecondModel(specs_of(model.tensors()), moment, steps, flops / FEW)


def beside(cost: SegmentCost, second: SecondModel | None) -> SegmentCost:
    """The segment's costs with those of the second model: its answers are there while all that
    autograd saves of the first lies in memory. A copy is trained before that, when the first has
    neither gradients nor what its optimizer and its terms hold."""
    if second is None:
        return cost
    travels = sum(spec.num_bytes for spec in second.specs)
    held_bytes = travels * (1 + second.is_trained)
    later_bytes = cost.gradient_bytes + cost.optimizer_bytes
    before = [replace(m, fixed_bytes=m.fixed_bytes - later_bytes) for m in second.copy_moments]

    def both(whole: tuple[Moment, ...]) -> tuple[Moment, ...]:
        answering = (
            replace(
                moment,
                fixed_bytes=moment.fixed_bytes + second.moment.fixed_bytes,
                example_bytes=moment.example_bytes + second.moment.example_bytes,
                weight_bytes=max(moment.weight_bytes, second.moment.weight_bytes),
            )
            for moment in whole
        )
        return (*answering, *before)

    again = cost.recompute_moments
    return replace(
        cost,
        parameter_bytes=cost.parameter_bytes + held_bytes,
        load_bytes=cost.load_bytes + 2 * travels,
        moments=both(cost.moments),
        recompute_moments=None if again is None else both(again),
        flops_per_example=cost.flops_per_example + second.flops_per_example,
        upload_bytes=cost.upload_bytes + travels * second.is_trained,
        download_bytes=cost.download_bytes + travels,
        teacher=second.specs if cost.tensors else (),
    )
