"""What a plan's second model, the teacher, takes beside the one that is trained."""

from __future__ import annotations

from typing import NamedTuple

import torch
from msgspec.structs import replace

from edge_sdk.capacity.costs import Moment, SegmentCost
from edge_sdk.capacity.flops import FlopCounter
from edge_sdk.capacity.moments import FEW, forward, freeze, moments, num_bytes, whole_step
from edge_sdk.models import family_code
from edge_sdk.models.checking import checked_model
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import Plan, TensorSpec
from edge_sdk.protocol.tensors import specs_of


class SecondModel(NamedTuple):
    """held_bytes: its weights, and of a copy that is trained also those and what the optimizer
    holds. moment: what lies in memory for a batch until the backward pass of both."""

    specs: tuple[TensorSpec, ...]
    is_trained: bool
    held_bytes: int
    gradient_bytes: int
    moment: Moment
    flops_per_example: float


def second_model(plan: Plan, copies: int) -> SecondModel | None:
    """That of the plan, if it has one. copies: of trained parameters, which the optimizer holds.
    Seeds nothing. Raises ConfigError where it cannot be built."""
    if (teacher := plan.teacher) is None:
        return None
    model = checked_model(teacher.model)
    x = moved(torch.zeros(FEW, *teacher.model.input_shape), "cpu")
    with family_code(teacher.model, "counting the teacher's costs", model):
        model.ready("cpu")
        with FlopCounter() as asked:
            _, widest = freeze(list(model.stages), x)
        moment, flops, gradient_bytes = Moment(example_bytes=widest / FEW), asked.total, 0
        if teacher.is_trained:
            step = whole_step(model, plan)
            moment = max(moments(step, x)[0], key=lambda moment: moment.at(plan.batch_size))
            with FlopCounter() as trained:
                forward(step, x)
            flops += trained.total
            gradient_bytes = num_bytes(step.named.values())
    own_bytes = num_bytes(model.tensors().values())
    copy_bytes = own_bytes + copies * gradient_bytes if teacher.is_trained else 0
    return SecondModel(
        specs_of(model.tensors()),
        teacher.is_trained,
        own_bytes + copy_bytes,
        gradient_bytes,
        moment,
        flops / FEW,
    )


def beside(cost: SegmentCost, second: SecondModel | None) -> SegmentCost:
    """The segment's costs with those of the second model: its answers are there while all that
    autograd saves of the first lies in memory."""
    if second is None:
        return cost
    travels = sum(spec.num_bytes for spec in second.specs)

    def both(whole: tuple[Moment, ...]) -> tuple[Moment, ...]:
        return tuple(
            replace(
                moment,
                fixed_bytes=moment.fixed_bytes + second.moment.fixed_bytes,
                example_bytes=moment.example_bytes + second.moment.example_bytes,
                weight_bytes=max(moment.weight_bytes, second.moment.weight_bytes),
            )
            for moment in whole
        )

    again = cost.recompute_moments
    return replace(
        cost,
        parameter_bytes=cost.parameter_bytes + second.held_bytes,
        load_bytes=cost.load_bytes + second.held_bytes + travels,
        gradient_bytes=cost.gradient_bytes + second.gradient_bytes,
        moments=both(cost.moments),
        recompute_moments=None if again is None else both(again),
        flops_per_example=cost.flops_per_example + second.flops_per_example,
        upload_bytes=cost.upload_bytes + travels * second.is_trained,
        download_bytes=cost.download_bytes + travels,
        teacher=second.specs if cost.tensors else (),
    )
