"""Settings by their paths and flags."""

from __future__ import annotations

from typing import Annotated

import pytest
from msgspec import UNSET, Meta
from msgspec.structs import replace

from coordinator.config import Options, RunConfig, ServerOptions, flag
from coordinator.settings import (
    changed,
    checked,
    differences,
    flag_of,
    flags_of,
    own_options,
    shaped,
)
from edge_sdk.errors import ConfigError, DataError, UsageError
from tests.support.examples import config


class Mine(Options, frozen=True, kw_only=True):
    size: Annotated[int, Meta(ge=1, le=9), flag("of it", name="--my-size", metavar="N")] = 3
    is_slow: Annotated[bool, flag("slowly")] = False
    shares: Annotated[tuple[float, ...], flag("of each")] = (0.5, 0.5)
    silent: int = 7


def test_flags_are_the_described_fields():
    flags = flags_of(Mine)
    assert list(flags) == ["size", "is_slow", "shares"]
    size = flags["size"]
    assert (size.name, size.destination, size.metavar, size.help) == (
        "--my-size",
        "my_size",
        "N",
        "of it",
    )
    assert (size.kind, size.default, size.choices) == (int, 3, ())
    assert (flags["is_slow"].name, flags["is_slow"].kind) == ("--is-slow", bool)
    assert flags["shares"].is_list
    assert flags_of(RunConfig)["participants"].kind is int, "of int | None"
    assert flags_of(ServerOptions)["serve"].choices == ("ema", "last")
    assert flags_of(RunConfig)["rounds"].default is None


@pytest.mark.parametrize(
    ("path", "flag"),
    [
        ("epochs", "--epochs"),
        ("deadline_s", "--deadline"),
        ("server.lr", "--server-lr"),
        ("generator.epochs", "--fit-epochs"),
        ("generator.own.part", "--part"),
        ("model.options", "--option"),
        ("population.alpha", "--alpha"),
        ("generator.lr", "--lr"),
    ],
)
def test_every_setting_has_a_name_on_the_command_line(path, flag):
    assert flag_of(path) == flag


def test_own_options_are_checked_and_name_the_known():
    assert own_options(UNSET, None, "method 'a'") == ()
    assert own_options({"size": 4}, Mine, "method 'a'") == (Mine(size=4),)
    with pytest.raises(ConfigError, match=r"method 'a' has no option big; known: size, is_slow, "):
        own_options({"big": 4}, Mine, "method 'a'")
    with pytest.raises(ConfigError, match=r"--my-size is 10, expected a whole number, at most 9"):
        own_options({"size": 10}, Mine, "method 'a'")


def test_changes_and_differences_by_path():
    old = config("owners-mean")
    new = changed(old, {"epochs": 3, "server.lr": 0.5, "own": {"part": 1}})
    assert (new.epochs, new.server.lr, new.own) == (3, 0.5, {"part": 1})
    assert (
        differences(old, new)
        == "--epochs 1 (now 3), --server-lr 1.0 (now 0.5), --part None (now 1)"
    )
    assert differences(new, new) == ""


def test_a_model_gets_the_shape_of_the_data():
    model = shaped(config("owners-mean"), (3, 5), 2).model
    assert (model.input_shape, model.num_classes) == ((3, 5), 2)
    with pytest.raises(DataError, match="digits: got 1 class, expected at least 2"):
        shaped(config("owners-mean", data="digits"), (3, 5), 1)


def test_logit_adjustment_and_holdout_are_part_of_every_plan():
    run = replace(config("owners-mean"), logit_adjustment=1.5, holdout=0.25)
    plan = run.plan(1)
    assert (plan.logit_adjustment, plan.holdout) == (1.5, 0.25)
    for wrong in ({"logit_adjustment": -1.0}, {"holdout": 1.0}):
        (field,) = wrong
        with pytest.raises(UsageError, match=flag_of(field)):
            checked(replace(run, **wrong))
