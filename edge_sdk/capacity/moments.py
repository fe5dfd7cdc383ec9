"""What lies in memory at the moments of a training step, read off steps of very few examples: what
autograd saves, and how that grows with the batch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from edge_sdk.capacity.costs import Moment
from edge_sdk.models import StagedModel
from edge_sdk.models.losses import exit_weights, local_loss
from edge_sdk.models.staged import moved
from edge_sdk.protocol.fields import Task
from edge_sdk.protocol.messages import Plan
from edge_sdk.protocol.tensor_lists import ADAPTER
from edge_sdk.tasks.table import task_of

FEW = 2  # examples of the smaller step; BatchNorm wants two
LAST = 0  # instead of a stage's number: what is saved by a segment's last stage, exits and loss


class Step(NamedTuple):
    """What a training step goes through, in training mode. stages: without the first that are
    frozen; of these there may be heads, before those of the stages. named: the parameters that are
    trained. weights: of the exits."""

    stages: nn.ModuleList
    heads: nn.ModuleList
    named: dict[str, nn.Parameter]
    weights: Sequence[float]
    plan: Plan
    task: Task = "classify"


def whole_step(model: StagedModel, plan: Plan, task: Task = "classify") -> Step:
    named = dict(model.train().named_parameters())
    weights = exit_weights(plan, 1, len(model.stages))
    return Step(model.stages, model.exits, named, weights, plan, task)


def widest_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the largest tensor: a kernel reorders one weight at a time into a copy."""
    return max((num_bytes([tensor]) for tensor in tensors), default=0)


def leaves(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers of the modules: those that hold no other modules."""
    return [m for module in modules for m in module.modules() if not list(m.children())]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def freeze(frozen: Sequence[nn.Module], x: Tensor, num_kept: int = 1) -> tuple[list[Tensor], int]:
    """Features after the last num_kept of the frozen stages, and the most bytes that one of their
    layers has in hand: its input and its output."""
    widest = 0

    def look(_: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        nonlocal widest
        outputs = output if isinstance(output, tuple) else (output,)  # an LSTM: also its state
        held = (tensor for tensor in (*inputs, *outputs) if isinstance(tensor, Tensor))
        widest = max(widest, num_bytes(held))

    handles = [leaf.register_forward_hook(look) for leaf in leaves(frozen)]
    made = [x]
    for stage in frozen:
        made.append(stage.eval()(made[-1]))
    for handle in handles:
        handle.remove()
    return made[-num_kept:], widest


def moments(step: Step, features: Sequence[Tensor]) -> tuple[list[Moment], list[Moment]]:
    """The moments of a backward pass, one for each stage, from the last to the first; and the same
    where stages are run again. features: each (FEW, ...), as for `forward`. How bytes grow with the
    batch is seen in steps of FEW examples and of twice as many."""
    stages, heads = step.stages, step.heads
    few = saved(step, features)
    twice = saved(step, [moved(torch.cat([made, made]), "cpu") for made in features])
    order = [LAST, *range(len(stages) - 1, 0, -1)]
    last = [p for stage in stages[-1:] for p in stage.parameters()]
    largest = [widest_bytes([*last, *heads.parameters()])]
    largest += [widest_bytes(stages[number - 1].parameters()) for number in order[1:]]

    def growing(bytes_of: Callable[[Counter[str], int], int]) -> list[Moment]:
        found = []
        for number, weight_bytes in zip(order, largest, strict=True):
            grown = bytes_of(twice, number) - bytes_of(few, number)
            fixed, each = bytes_of(few, number) - grown, grown / FEW
            found.append(Moment(fixed_bytes=fixed, example_bytes=each, weight_bytes=weight_bytes))
        return found

    return growing(_whole), growing(_again)


def _whole(sizes: Counter[str], number: int) -> int:
    """A stage's backward pass makes a gradient as large as the stage's largest activation, when
    what later stages saved is gone."""
    later = 0
    if number != LAST:
        later = sizes[f"{LAST}"] + sum(sizes[f"{n}"] for n in range(number + 1, sizes["stages"]))
    return sizes["all"] - later + sizes[f"widest {number}"]


def _again(sizes: Counter[str], number: int) -> int:
    """What a stage that is run again holds: its own, its input, the inputs of the stages before."""
    up_to = sizes["stages"] if number == LAST else number
    inputs = sum(sizes[f"input {n}"] for n in range(1, up_to + 1))
    return inputs + sizes[f"{number}"] + sizes[f"widest {number}"]


def saved(step: Step, features: Sequence[Tensor]) -> Counter[str]:
    """Bytes that autograd saves in one step, every storage once and the parameters not at all:
    "all"; by stage (LAST for all that follows) what is saved beside the stages' inputs, a stage's
    own output, made a second time, included; its "widest" tensor, three times where layers have
    adapters: the gradients through both and their sum; each stage's "input". And how many "stages"
    there are."""
    storages: dict[int, tuple[int, int]] = {}  # address: bytes, and the stage that saved them
    own = {
        parameter.untyped_storage()._cdata
        for parameter in (*step.stages.parameters(), *step.heads.parameters())
    }
    inputs: list[torch.UntypedStorage] = []
    where = LAST

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages.setdefault(storage._cdata, (storage.nbytes(), where))
        # The graph keeps it, so no other storage takes this address. Detached, as a node that saves
        # its own output would never be freed.
        return tensor.detach()

    def enter(number: int, given: Tensor) -> None:
        nonlocal where
        where = number if number < len(step.stages) else LAST
        if number:
            inputs.append(given.untyped_storage())

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward(step, features, enter)
    times = 3 if any(ADAPTER in name.split(".") for name in step.named) else 1
    sizes = Counter(stages=len(step.stages), all=sum(size for size, _ in storages.values()))
    sizes.update({f"input {n}": storage.nbytes() for n, storage in enumerate(inputs, 1)})
    input_addresses = {storage._cdata for storage in inputs}
    for address, (size, stage) in storages.items():
        if address not in input_addresses or (
            stage != LAST and address != inputs[stage - 1]._cdata
        ):
            sizes[f"{stage}"] += size
            sizes[f"widest {stage}"] = max(sizes[f"widest {stage}"], times * size)
    del loss  # the graph, which kept the storages alive
    return sizes


def forward(
    step: Step,
    features: Sequence[Tensor],
    enter: Callable[[int, Tensor], None] = lambda number, features: None,
) -> Tensor:
    """A step's loss. features: what the frozen stages that have heads made, or what the first stage
    takes alone. enter: called before a stage with its number from 1, after it with LAST."""
    stages, heads, _, weights, plan, task = step
    carried = features[-1]
    made = list(features[: len(heads) - len(stages)])
    for number, stage in enumerate(stages, 1):
        enter(number, carried)
        carried = stage(carried)
        enter(LAST, carried)
        made.append(carried)
    logits = []
    for head, seen, weight in zip(heads, made, weights, strict=True):
        with torch.set_grad_enabled(bool(weight) or plan.distill != "none"):
            logits.append(head(seen))  # of weight 0: no backward pass
    labels = torch.from_numpy(task_of(task).some_labels(logits[0].shape))
    return local_loss(logits, labels, weights, plan, task)
