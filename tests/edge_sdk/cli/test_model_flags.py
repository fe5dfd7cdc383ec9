"""--model, --exits, --cuts and --option, as both commands read them."""

from __future__ import annotations

import argparse

import pytest

from edge_sdk.cli.flags import model_parts
from edge_sdk.errors import UsageError


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
