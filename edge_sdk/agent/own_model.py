"""A model of this device's own, for runs that never see it: they send its parameters as one vector
(Plan.flat), and know of it how many those are."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from edge_sdk.errors import ConfigError
from edge_sdk.protocol.fields import Name, Option, Struct
from edge_sdk.protocol.messages import ModelSpec, Welcome


class OwnModel(Struct, frozen=True, kw_only=True):
    """Of the family's options, and with so many exits. It takes the run's inputs and classes."""

    family: Name
    exits: Annotated[int, Meta(ge=1, le=100)] = 1
    options: dict[Name, Option] = field(default_factory=dict)


def models_to_choose(welcome: Welcome, own: OwnModel | None) -> tuple[ModelSpec, ...]:
    """The models among which this device chooses; (): cuts of the welcome's one."""
    if own is None:
        return welcome.variants
    model = welcome.model
    spec = ModelSpec(
        family=own.family,
        input_shape=model.input_shape,
        num_classes=model.num_classes,
        task=model.task,
        vocabulary=model.vocabulary,
        exit=own.exits,
        options=own.options,
    )
    return (spec,)


def check_own_model(welcome: Welcome, own: OwnModel | None) -> None:
    """Raise ConfigError where the run cannot train this device's own model, or wants one."""
    run, is_flat = f"run {welcome.run}", welcome.plan.flat
    if own is None and is_flat and not welcome.variants:
        raise ConfigError(f"{run} trains devices' own models and offers none; give --model")
    if own and not is_flat:
        raise ConfigError(
            f"{run} trains models of its coordinator, this device was started with one of its own "
            f"(--model {own.family}); start it without"
        )
    if own and own.exits > welcome.model.exit:
        raise ConfigError(
            f"{run} has {welcome.model.exit} exits, this device's own model {own.exits}; start it "
            "with fewer --exits"
        )
