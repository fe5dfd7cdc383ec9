"""A struct's fields as flags, and back."""

from __future__ import annotations

import argparse
from typing import Annotated, Literal

import pytest

from coordinator.cli.arguments import add_flags, taken
from coordinator.config import Options, flag
from edge_sdk.cli.flags import Parser


class Every(Options, frozen=True, kw_only=True):
    """One field of each type that a flag can have."""

    size: Annotated[int, flag("of it")] = 3
    share: Annotated[float | None, flag("of all")] = None
    is_slow: Annotated[bool, flag("slowly")] = True
    kind: Annotated[Literal["round", "flat"], flag("of wheel")] = "flat"
    name: Annotated[str, flag("of somebody", metavar="WHO")] = "nobody"
    shares: Annotated[tuple[float, ...], flag("of each")] = (0.5, 2.0)
    silent: int = 7


def parsed(*argv, **more):
    parser = Parser(exit_on_error=False)
    add_flags(parser, Every, **more)
    return parser.parse_args(argv)


def test_defaults_are_the_structs():
    assert Every(**taken(parsed(), Every)) == Every()


def test_every_type_is_parsed():
    argv = ["--size", "4", "--share", "0.25", "--no-is-slow", "--kind", "round"]
    argv += ["--name", "me", "--shares", "1,2.5"]
    expected = Every(size=4, share=0.25, is_slow=False, kind="round", name="me", shares=(1, 2.5))
    assert Every(**taken(parsed(*argv), Every)) == expected


def test_a_command_may_have_other_defaults_choices_and_fewer_fields():
    args = parsed(fields=["size", "name"], defaults={"size": 9}, choices={"name": ["a", "nobody"]})
    assert vars(args) == {"size": 9, "name": "nobody"}
    assert taken(args, Every, ["size"]) == {"size": 9}
    with pytest.raises(argparse.ArgumentError, match="invalid choice: 'b'"):
        parsed("--name", "b", choices={"name": ["a"]})


@pytest.mark.parametrize("argv", [["--kind", "square"], ["--size", "big"], ["--share", "half"]])
def test_wrong_values_are_wrong_usage(argv):
    with pytest.raises(argparse.ArgumentError, match=argv[0]):
        parsed(*argv)


def test_a_list_of_other_things_is_refused():
    with pytest.raises(argparse.ArgumentError, match="--shares: '1,a', expected numbers with comm"):
        parsed("--shares", "1,a")
