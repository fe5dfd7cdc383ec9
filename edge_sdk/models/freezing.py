"""Parts of a model that are not trained (a plan's `frozen`): what lies within takes no gradient and
runs as in evaluation, its norms by their statistics and without dropout."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from edge_sdk.errors import ConfigError
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import Segment
from edge_sdk.protocol.tensor_lists import is_frozen, stage_of, trained_names


def begin_training_(model: StagedModel, segment: Segment, frozen: Collection[str]) -> None:
    """Put the segment's stages and exits into training mode, but for what is frozen."""
    numbers = range(segment.first, segment.last + 1)
    for name, module in model.named_modules():  # a module before those within it
        if "." in name and stage_of(name)[1] in numbers:
            module.train(not is_frozen(name, frozen))
    for name, parameter in model.named_parameters():
        if stage_of(name)[1] in numbers:
            parameter.requires_grad_(not is_frozen(name, frozen))


def num_frozen_stages(model: StagedModel, segment: Segment, frozen: Collection[str]) -> int:
    """How many of the segment's first stages are frozen as a whole, before the first that is
    trained: what they make of an example never changes."""
    for number in range(segment.first, segment.last + 1):
        name = f"stages.{number - 1}"
        within = (f"{name}.{n}" for n, _ in model.stages[number - 1].named_parameters())
        if not all(is_frozen(part, frozen) for part in (name, *within)):
            return number - segment.first
    return segment.last + 1 - segment.first


def check_trainable(parameters: Iterable[str], num_exits: int, frozen: Collection[str]) -> None:
    """Raise ConfigError for a stage of which nothing is left to train, neither it nor its exit.
    parameters: the model's, by name."""
    names = list(parameters)
    for number in range(1, num_exits + 1) if frozen else ():
        if not trained_names(names, [Segment(first=number, last=number)], frozen):
            said = f"nothing of stage {number} and its exit is left to train"
            raise ConfigError(f"--freeze: {said}; freeze fewer stages")
