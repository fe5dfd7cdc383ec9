"""What both commands say of themselves, and that they end quietly where nobody reads it."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.cli import main as coordinator_cli
from edge_sdk.cli import main as device_cli
from edge_sdk.cli.flags import HelpFormatter
from edge_sdk.helpers.interrupts import ends_unread
from edge_sdk.version import __version__
from tests.support.admission import new_key
from tests.support.processes import ROOT

MAINS = {"edge-sdk": device_cli.main, "edge-coordinator": coordinator_cli.main}
PARSERS = {"edge-sdk": device_cli.make_parser(), "edge-coordinator": coordinator_cli.make_parser()}


def commands(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Of a parser and, as `service install`, of its commands."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield command
                yield from commands(command)


EVERY = {command.prog: command for parser in PARSERS.values() for command in commands(parser)}


@pytest.mark.parametrize("command", EVERY.values(), ids=EVERY)
def test_help_tells_every_flag_its_default_and_an_example(command):
    for action in command._actions:
        hidden = action.help == argparse.SUPPRESS
        commands = isinstance(action, argparse._SubParsersAction)
        assert hidden or commands or action.help, f"{action.option_strings} says nothing"
    examples = [line.strip() for line in command.epilog.splitlines()[1:]]
    assert examples
    assert all(line in command.format_help() for line in examples), "as they are written"
    for example in examples:
        name, *words = shlex.split(example.removeprefix("sudo "))
        assert example.removeprefix("sudo ").startswith(command.prog)
        assert PARSERS[name].parse_args(words).run, "it is a command that parses"


@pytest.mark.parametrize("command", ["serve", "emulate"])
def test_the_flags_of_a_run_are_in_groups(command):
    text = EVERY[f"edge-coordinator {command}"].format_help()
    groups = ["run:", "model:", "local training:", "aggregation:", "data:", "watching and results:"]
    assert all(f"\n{group}\n" in text for group in groups)
    alone = text.split("\noptions:\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in alone.splitlines()] == ["-h,"], "all others are in groups"
    assert "--rounds ROUNDS       of the whole run; default 20\n" in text


def test_defaults_that_help_shows():
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--count", default=3, help="of it")
    parser.add_argument("--folder", default=Path("keys"), help="with keys")
    parser.add_argument("--size", default=1024, help="as such; default 1K")
    parser.add_argument("--other", help="no default")
    parser.add_argument("--quick", action="store_true", help="be quick")
    parser.add_argument("--name", default="", help="may be left out")
    text = " ".join(parser.format_help().split())
    assert "of it; default 3 --folder FOLDER with keys; default keys --size" in text
    assert (
        "as such; default 1K --other OTHER no default --quick be quick --name NAME may be" in text
    )
    assert text.endswith("may be left out")


@pytest.mark.parametrize("name", MAINS)
def test_version(name, capsys):
    with pytest.raises(SystemExit) as ended:
        MAINS[name](["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{name} {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["edge_sdk.cli", "doctor"],
        ["coordinator.cli", "clients", "list", "--keys"],
        ["edge_sdk.cli", "doctor", "--json"],
        ["edge_sdk.cli", "--help"],
        ["coordinator.cli", "serve", "--help"],
        ["coordinator.cli", "--version"],
    ],
    ids=" ".join,
)
def test_a_closed_pipe_ends_a_command_quietly(words, tmp_path):
    if words[-1] == "--keys":  # more than a pipe's buffer
        lines = [f"pi-{number} {new_key()}\n" for number in range(300)]
        (tmp_path / "clients").write_text("".join(lines))
        words = [*words, str(tmp_path)]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run([sys.executable, "-m", *words], stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert done.stderr == b""
    assert done.returncode in ((0, 1) if "doctor" in words else (0,)), "doctor's own status"


def test_a_run_whose_lines_nobody_reads_says_that_it_stopped():
    argv = ["emulate", "--rounds", "2", "--clients", "3", "--groups", "1,1,1", "--examples", "100"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "coordinator.cli", *argv]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writer)
    assert done.returncode == 1
    said = "nobody reads its standard output any more, so the run stopped; go on with --resume"
    assert done.stderr.splitlines()[-1] == f"edge-coordinator: {said}"


def test_another_broken_pipe_is_an_error():
    """Not this process's standard output, so it is not for us to keep quiet about."""

    @ends_unread
    def main(argv):
        raise BrokenPipeError("of a trainer")

    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as output, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        with pytest.raises(BrokenPipeError, match="of a trainer"):
            main([])
    os.close(reader)


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], {"--generator": "update-regression", "--rotation": "add", "--server-momentum": "0.5"}),
        (["--paper"], {"--generator": "svd-mlp", "--rank": "100", "--serve": "last"}),
        (["--method", "fedavg-l"], {"--generator": "none", "--rotation": "off"}),
        (["--server-optimizer", "fedadam"], {"--server-momentum": "0.9", "--server-lr": "0.01"}),
        (["--preset", "svhn"], {"--model": "vgg"}),
    ],
    ids=str,
)
def test_help_shows_the_values_of_what_is_named(flags, shown):
    parser = coordinator_cli.make_parser()
    (emulate,) = [one for one in commands(parser) if one.prog.endswith(" emulate")]
    with pytest.raises(SystemExit):
        parser.parse_args(["emulate", *flags, "--help"])
    for flag, value in shown.items():
        assert str(emulate._option_string_actions[flag].default) == value, flag


def help_of(capsys, *flags):
    with pytest.raises(SystemExit) as ended:
        coordinator_cli.make_parser().parse_args([*flags, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", ["emulate", "serve"])
def test_help_of_a_method_leaves_out_what_has_no_place_in_it(command, capsys):
    hidden = [
        "--rotation",
        "--rotation-stages",
        "--generator",
        "--hidden",
        "--distill",
        "--damping",
    ]
    hidden += ["--exit-weights", "--paper", "stages that few clients train:"]
    hidden += ["--holders"] * (command == "emulate")
    whole, shallow = help_of(capsys, command), help_of(capsys, command, "--method", "fedavg-s")
    for text in hidden:
        assert re.search(rf"^ *{text}(?![\w-])", whole, re.M), (
            "without a method all flags are there"
        )
        assert not re.search(rf"^ *{text}(?![\w-])", shallow, re.M), text
    assert "--server-momentum" in shallow
    again = help_of(capsys, command, "--method", "hypemefed")
    assert "--rotation-stages" in again
    assert "--paper" in again


def test_an_option_of_another_method_is_told_whose_it_is(own_things, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    with pytest.raises(SystemExit) as ended:
        coordinator_cli.main(["emulate", "--import", "own_method", "--shallow", "2"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "unrecognized arguments: --shallow 2; it is of --method warm-up" in said
    assert said.count("\n") == 1
