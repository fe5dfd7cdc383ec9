"""--model, --exits, --cuts and --option, as both commands read them."""

from __future__ import annotations

import argparse

import pytest

from edge_sdk.cli.flags import adapters_of, add_adapters, model_parts
from edge_sdk.errors import UsageError
from edge_sdk.protocol.fields import Adapters


def parts(model, exits=3, cuts=None, **options):
    given = argparse.Namespace(model=model, exits=exits, cuts=cuts, option=list(options.items()))
    return model_parts(given)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (parts("cnn", 2, channels=4), ("cnn", 2, {"channels": 4})),
        (parts("timm:vit"), ("timm", 3, {"model": "vit", "cuts": "auto:3"})),
        (parts("timm:vit", 4, "auto"), ("timm", 4, {"model": "vit", "cuts": "auto:4"})),
        (parts("timm:vit", 3, "a,b.1"), ("timm", 2, {"model": "vit", "cuts": "a,b.1"})),
        (parts("timm:vit", 2, "a,b.1"), ("timm", 2, {"model": "vit", "cuts": "a,b.1"})),
        (parts("timm:vit", 2, cuts=None), ("timm", 2, {"model": "vit", "cuts": "auto:2"})),
        (parts("mine", 5, "auto"), ("mine", 5, {"cuts": "auto:5"})),
    ],
)
def test_a_model_is_named_by_its_package_and_its_cuts(given, found):
    assert given == found


def test_an_option_may_say_the_cuts():
    given = argparse.Namespace(model="timm:vit", exits=2, cuts=None, option=[("cuts", "a,b")])
    assert model_parts(given) == ("timm", 2, {"model": "vit", "cuts": "a,b"})
    given.cuts = "auto"
    with pytest.raises(UsageError, match="--cuts and --option cuts say the same"):
        model_parts(given)


def test_as_many_exits_as_cuts():
    with pytest.raises(UsageError, match="--cuts names 2 modules for --exits 5; give one of them"):
        parts("timm:vit", 5, "a,b")


def adapters(text):
    parser = argparse.ArgumentParser()
    add_adapters(parser)
    return adapters_of(parser.parse_args(text.split()))


def test_adapters_as_flags():
    assert adapters("") is None
    assert adapters("--adapt none") is None
    assert adapters("--adapt lora") == Adapters(kind="lora")
    every = "--adapt dema --adapt-rank 4 --adapt-branches 2 --adapt-targets a.*,b --adapt-from 3"
    assert adapters(every) == Adapters(
        kind="dema", rank=4, branches=2, targets=("a.*", "b"), first=3
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--adapt-rank 4", "--adapt-rank counts with --adapt KIND"),
        ("--adapt none --adapt-from 2", "--adapt-from counts with --adapt KIND"),
        ("--adapt lora --adapt-targets a,,b", "--adapt-targets is 'a,,b', expected patterns of"),
        ("--adapt lora --adapt-targets ,", "--adapt-targets is ',', expected patterns of names"),
        ("--adapt " + 300 * "x", "--adapt x+.*: expected text of length"),
    ],
)
def test_adapters_that_are_no_flags(text, said):
    with pytest.raises(UsageError, match=said):
        adapters(text)
