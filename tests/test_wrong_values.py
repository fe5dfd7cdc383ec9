"""Every flag of both commands with wrong values: status 2 and one line that names it."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

import pytest

from coordinator.cli.main import make_parser
from tests.support.commands import status_of
from tests.test_help import EVERY, MAINS

NO_NUMBERS = ("abc", "nan", "inf", "-inf", "1e999", "-5", "0x10")
NO_INTEGERS = (*NO_NUMBERS, "7.5", "1e3", "99999999999999999999999999999999999")
NO_SHAPES = ("abc", "1x", "1x-8x8", "1x0x8", "1,8,8", "1x8.5x8", "nan")


def accepts(action: argparse.Action, text: str, parser: argparse.ArgumentParser) -> bool:
    parse = parser._registry_get("type", action.type, action.type)
    try:
        parse(text)
    except (argparse.ArgumentTypeError, ValueError):
        return False
    return True


def wrong_values(action: argparse.Action, parser: argparse.ArgumentParser) -> Iterator[str]:
    yield ""
    if action.choices:
        yield "no-such-choice"
    elif accepts(action, "abc", parser):  # text
        return
    elif accepts(action, "1x8x8", parser):
        yield from NO_SHAPES
    elif any(accepts(action, text, parser) for text in ("0.25", "7.5")):
        yield from NO_NUMBERS
    elif accepts(action, "2", parser) or accepts(action, "50", parser):
        yield from NO_INTEGERS


VALUED = [
    pytest.param(command, action, id=f"{command.prog} {'/'.join(action.option_strings)}")
    for command in EVERY.values()
    for action in command._actions
    if action.option_strings and action.nargs is None
]


@pytest.mark.parametrize(("command", "action"), VALUED)
def test_a_wrong_value_is_one_line_that_names_its_flag(command, action, capsys):
    name, *words = shlex.split(command.epilog.splitlines()[1].strip().removeprefix("sudo "))
    flag = action.option_strings[0]
    for value in wrong_values(action, command):
        status = status_of(MAINS[name], [*words, f"{flag}={value}"])
        captured = capsys.readouterr()
        told = f"{flag}={value}: {captured.err}"
        assert status == 2, told
        assert captured.err.startswith(name), told
        assert captured.err.count("\n") in (1, 2), told
        assert flag in captured.err, told
        assert repr(value) in captured.err, told
        assert not any(word in captured.err for word in ("$.", "Expected `", "Traceback")), told
        assert captured.out == "", told


def test_all_kinds_of_flags_are_tried():
    """A new flag is among them by itself; this holds that the kinds are told apart."""
    tried = {id: len(list(wrong_values(*reversed(p)))) for id, p in _by_id().items()}
    assert tried["edge-coordinator emulate --rounds"] == 1 + len(NO_INTEGERS)
    assert tried["edge-coordinator emulate --lr"] == 1 + len(NO_NUMBERS)
    assert tried["edge-coordinator serve --input"] == 1 + len(NO_SHAPES)
    assert tried["edge-sdk plan --optimizer"] == 2
    assert tried["edge-sdk run --id"] == 1
    assert len(tried) > 150


def _by_id() -> dict[str, tuple[argparse.ArgumentParser, argparse.Action]]:
    return {param.id: param.values for param in VALUED}


@pytest.mark.parametrize(
    "argv",
    [
        ["edge-sdk"],
        ["edge-sdk", "no-such-command"],
        ["edge-sdk", "plan"],
        ["edge-sdk", "plan", "--no-such-flag"],
        ["edge-sdk", "infer", "model", "--data"],
        ["edge-sdk", "service"],
        ["edge-coordinator"],
        ["edge-coordinator", "status"],
        ["edge-coordinator", "emulate", "more"],
        ["edge-coordinator", "serve", "--test", "digits"],
        ["edge-coordinator", "clients", "list", "pi-1"],
        ["edge-coordinator", "clients", "add", "pi-1"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_no_list_of_flags(argv, capsys):
    assert status_of(MAINS[argv[0]], argv[1:]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(argv[0])
    assert captured.err.count("\n") == 1, captured.err
    assert captured.out == ""


SERVE = "serve --run-dir r --test t.npz"
NO_EFFECT = [
    ("edge-coordinator", "emulate --trim 0.2", "--trim has no effect with --aggregation mean"),
    ("edge-coordinator", "emulate --alpha 1 --split iid", "--alpha has no effect with --split iid"),
    (
        "edge-coordinator",
        "emulate --optimizer adam --momentum 0.9",
        "--momentum has no effect with --optimizer adam",
    ),
    (
        "edge-coordinator",
        "emulate --hidden 8",
        "--hidden has no effect with --generator update-reg",
    ),
    (
        "edge-coordinator",
        "emulate --paper --memory-rows 8",
        "with --generator svd-mlp; leave it out",
    ),
    (
        "edge-coordinator",
        "emulate --generator none --gain 1",
        "--gain has no effect with --generator",
    ),
    (
        "edge-coordinator",
        "emulate --method fedavg-s --rank 4",
        "--rank has no effect with --generat",
    ),
    ("edge-coordinator", "emulate --rotation off --rotation-stages 1", "--rotation-stages has no"),
    ("edge-coordinator", "emulate --rotation off --holders 0.5", "--holders has no effect with"),
    ("edge-coordinator", "emulate --rotation replace --rotation-stages 1", "give --rotation add"),
    ("edge-coordinator", "emulate --distill none --distill-ramp 3", "--distill-ramp has no effect"),
    ("edge-coordinator", "emulate --serve last --ema 0.5", "--ema has no effect with --serve last"),
    (
        "edge-coordinator",
        "emulate --method stale-copy --damping 0.5",
        "--damping 0.5 has no place there",
    ),
    ("edge-coordinator", "emulate --resume", "--resume has no effect without --run-dir"),
    (
        "edge-coordinator",
        f"{SERVE} --late drop --staleness-half-life 3",
        "has no effect with --late",
    ),
    ("edge-coordinator", f"{SERVE} --insecure --keys k", "--keys has no effect with --insecure"),
    (
        "edge-coordinator",
        f"{SERVE} --insecure --clients-file k",
        "--clients-file has no effect with",
    ),
    (
        "edge-coordinator",
        "serve --run-dir r --input 1x8x8 --classes 3 --eval-every 2",
        "--eval-every has no effect without --test",
    ),
    ("edge-sdk", "measure --link-mbit-s 94", "--link-mbit-s has no effect without --save"),
    ("edge-sdk", "measure --force", "--force has no effect without --save"),
    ("edge-sdk", "run --host-gflops 5", "--host-gflops has no effect without --board"),
    ("edge-sdk", "run --insecure --server-key k", "--server-key has no effect with --insecure"),
    ("edge-sdk", "keys --coordinator tcp://h:1", "--coordinator has no effect without --rotate"),
    ("edge-sdk", "service install --start --dry-run", "--start has no effect with --dry-run"),
]


@pytest.mark.parametrize(("name", "words", "said"), NO_EFFECT, ids=lambda value: str(value)[:60])
def test_a_flag_that_another_makes_void_is_refused(name, words, said, capsys):
    assert status_of(MAINS[name], words.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [
        "emulate --aggregation trimmed-mean --trim 0.2",
        "emulate --preset unimib --alpha 0.3",
        "emulate --preset prelim --option channels=4,4,4,4",
        "emulate --optimizer sgd --momentum 0.9",
        "emulate --method stage-rotation --rotation-stages 1",
        "emulate --generator svd-mlp --hidden 8",
        "emulate --run-dir r --resume --trim 0.2 --hidden 8",  # compared with what it began with
        f"{SERVE} --insecure --mode async --staleness-half-life 3",
    ],
)
def test_flags_that_count_are_taken(words):
    assert make_parser().parse_args(words.split()).run  # a new one, as it keeps defaults
