"""tools/testbed as somebody runs it: real processes, a report, and nothing left behind."""

from __future__ import annotations

import argparse
import json
import os
import signal

import pytest
from msgspec.structs import replace

from coordinator.cli.arguments import SHARED, CommandParser, run_config
from coordinator.cli.serve import add_serve_command
from coordinator.methods.registry import METHODS
from coordinator.settings import changed
from edge_sdk.capacity.choice import choose_exit
from edge_sdk.capacity.counting import segment_costs
from edge_sdk.cli.flags import DEFAULT_EPOCHS
from edge_sdk.hardware.boards import board, save_board
from edge_sdk.hardware.measure import emulated, measure, measured_board
from tests.support.commands import status_of
from tests.support.examples import config, examples
from tests.support.processes import ROOT, Running, kill_marked, marked, read_rows, wait_until
from tools.testbed.__main__ import (
    TRAINING,
    choose_deadline,
    main,
    make_parser,
    serve_command,
    spec_of,
    written_model,
)
from tools.testbed.boards import Device

FLAGS = ["--devices", "jetson-nano=1,raspberry-pi-4=2", "--examples", "240", "--epochs", "1"]
NAMES = {"jetson-nano-1", "raspberry-pi-4-1", "raspberry-pi-4-2"}


@pytest.fixture
def testbed(tmp_path):
    """start(*flags): the tool in a process group of its own, its run in tmp_path / "run"."""
    started = []

    def start(*flags: str) -> Running:
        command = ["tools.testbed", *FLAGS, "--run-dir", str(tmp_path / "run"), *flags]
        running = Running("testbed", command, tmp_path / "testbed.log", str(tmp_path))
        started.append(running)
        return running

    yield start
    kill_marked(str(tmp_path))
    for running in started:
        running.process.wait(10)


def test_two_rounds_on_three_boards(testbed, tmp_path):
    running = testbed("--rounds", "2")
    assert running.end(120) == 0, running.text()
    assert marked(str(tmp_path)) == [], "a process was left behind"
    run_dir = tmp_path / "run"
    taken = read_rows(run_dir, "SELECT round, client_id, outcome FROM participations")
    assert sorted(taken) == sorted((round, name, "ok") for round in (1, 2) for name in NAMES)
    boards = read_rows(run_dir, "SELECT client_id, platform, is_emulated FROM clients")
    assert {(name, platform) for name, platform, _ in boards} == {
        (name, name.rsplit("-", 1)[0]) for name in NAMES
    }
    assert all(is_emulated for _, _, is_emulated in boards)
    assert (run_dir / "model.safetensors").exists()
    text = running.text()
    steps = [
        "reading digits",
        "measuring the speed of one thread here",
        "splitting digits among the boards (jetson-nano=1,raspberry-pi-4=2)",
        "counting what training takes on each board, for the deadline",
        "starting the coordinator and 3 boards, each with a trainer",
        "3 of 3 boards are ready",
        "round 1: served accuracy per exit",
    ]
    places = [text.find(f"{step}") for step in steps]
    assert -1 not in places, text
    assert places == sorted(places), "told in the order in which they are done"
    for said in (
        "3 emulated boards",
        "round 2: served accuracy per exit",
        "2 of 2 rounds finished",
    ):
        assert said in text, text
    for name in NAMES:
        assert "run finished" in (run_dir / "devices" / name / "device.log").read_text()


def test_two_kinds_of_boards_train_two_backbones(testbed, tmp_path):
    """The fast one has time for the large one within the deadline that the slow one needs."""
    backbones = str(ROOT / "examples" / "backbones.toml")
    boards = ["--devices", "raspberry-pi-zero-2w=1,jetson-tx2=1"]
    running = testbed("--rounds", "1", *boards, "--method", "heterotune", "--backbones", backbones)
    assert running.end(120) == 0, running.text()
    run_dir = tmp_path / "run"
    chosen = read_rows(run_dir, "SELECT client_id, variant, outcome FROM participations")
    assert sorted(chosen) == [("jetson-tx2-1", 2, "ok"), ("raspberry-pi-zero-2w-1", 1, "ok")]
    models = [run_dir / f"model-{name}.safetensors" for name in ("large", "small")]
    assert ", ".join(map(str, models)) in running.text()
    assert "small, exit 1" in running.text()


def test_a_measured_board_takes_part(testbed, tmp_path):
    """Its file as `edge-sdk measure --save` writes it: with its own layer_s, without a link."""
    file = tmp_path / "my-device.toml"
    here = measure(cap_bytes=900 * 1024**2, compute=False)
    saved = measured_board(replace(here, gflops=12.5, layer_s=2.5e-5), "cpu")
    save_board(saved, file)
    running = testbed("--rounds", "1", "--devices", f"{file}=2,generic=1", "--deadline", "0")
    assert running.end(120) == 0, running.text()
    run_dir = tmp_path / "run"
    query = "SELECT client_id, link_mbit_s, profile FROM clients ORDER BY client_id"
    (generic, _, _), *mine = read_rows(run_dir, query)
    assert [generic, *(name for name, *_ in mine)] == ["generic-1", "my-device-1", "my-device-2"]
    for _, link_mbit_s, text in mine:
        profile = json.loads(text)
        assert link_mbit_s is None
        assert profile["is_emulated"]
        assert profile["layer_s"] == saved.layer_s
        assert profile["gflops"] == saved.gflops
        assert profile["memory_available_bytes"] == 900 * 1024**2


def test_interrupted_it_leaves_no_process_behind(testbed, tmp_path):
    running = testbed("--rounds", "1000", "--devices", "jetson-nano=1")
    running.wait_said(": served accuracy per exit")
    assert len(marked(str(tmp_path))) == 4, "tool, coordinator, agent, trainer"
    os.killpg(running.process.pid, signal.SIGINT)  # Ctrl-C reaches the whole group
    assert running.end(30) == 130
    wait_until(lambda: not marked(str(tmp_path)), "every process ends", 5)
    assert "Traceback" not in running.text()
    coordinator = (tmp_path / "run" / "coordinator.log").read_text()
    assert "go on with --resume" in coordinator
    assert "Traceback" not in coordinator


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--devices", "raspberry-pi-4"], "'raspberry-pi-4' is not BOARD=COUNT"),
        (["--devices", "raspberry-pi-4=0"], "'raspberry-pi-4=0' is not BOARD=COUNT"),
        (["--devices", "raspberry-pi-4=1,raspberry-pi-4=1"], "names a board twice"),
        (["--devices", "abacus=2"], "unknown board 'abacus'; known: "),
        (["--devices", "abacus.toml=2"], "board file abacus.toml: No such file"),
        (["--devices", "a board.toml=2"], "--devices a board.toml: rename it"),
        (["--devices", "generic=1,my/generic.toml=1"], "names a board twice"),
        (["--data", "nowhere"], "nowhere"),
        (["--rounds", "0"], "--rounds: '0', expected a whole number, at least 1"),
        (["--participants", "0"], "--participants: '0'"),
        (["--epochs", "0"], "--epochs: '0'"),
        (["--batch-size", "1"], "--batch-size: '1'"),
        (["--lr", "nan"], "--lr: 'nan'"),
        (["--seed", "-1"], "--seed: '-1'"),
        (["--alpha", "0"], "alpha is 0.0"),
        (["--exits", "0"], "--exits: '0'"),
        (["--model", "abacus"], "unknown model family 'abacus'"),
        (["--", "--quorum", "2"], "--quorum: '2'"),
        (["--", "--import", "no_such_module"], "--import no_such_module"),
        (["--", "--resume"], "holds no run"),
    ],
    ids=lambda value: value[1] if isinstance(value, list) else "",
)
def test_bad_flags_are_one_line(tmp_path, capsys, flags, said):
    unread = [] if "--data" in flags else ["--data", "never-read"]
    assert status_of(main, [*FLAGS, "--run-dir", str(tmp_path / "run"), *unread, *flags])
    error = capsys.readouterr().err
    assert error.startswith(("testbed: ", "python -m tools.testbed: ", "edge-coordinator serve: "))
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists(), "nothing was begun"


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "fedavgx"],
        ["--deadline", "-1"],
        ["--deadline", "soon"],
        ["--deadline", "nan"],
        ["--", "--mode", "fast"],
        ["--option", "channels"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_told_with_the_flag(tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as ended:
        main([*FLAGS, "--run-dir", str(tmp_path / "run"), "--data", "never-read", *flags])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert f"argument {flags[-2]}: " in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists(), "nothing was begun"


def test_a_flag_of_the_coordinator_is_told_where_to_stand(capsys):
    with pytest.raises(SystemExit):
        main(["--method", "hypemefed", "--paper"])
    error = capsys.readouterr().err
    assert "unrecognized arguments: --paper; those of edge-coordinator serve follow --" in error
    assert error.count("\n") == 1


def test_a_model_is_named_only_where_there_is_one(tmp_path):
    assert written_model(tmp_path) == "none for all, each client has its own"
    (tmp_path / "model.safetensors").touch()
    assert written_model(tmp_path) == str(tmp_path / "model.safetensors")


def served(folder, method, *flags):
    """The settings of the coordinator that the testbed starts."""
    given = make_parser().parse_args(["--method", method, *flags])
    parser = argparse.ArgumentParser()
    add_serve_command(parser.add_subparsers(parser_class=CommandParser))
    return run_config(parser.parse_args(serve_command(given, folder, 3, 0.0)), SHARED)


@pytest.mark.parametrize("method", METHODS)
def test_the_coordinator_runs_a_method_with_its_own_settings(tmp_path, method):
    assert METHODS["hypemefed"].defaults["server.momentum"] == 0.5, "or this shows nothing"
    own = served(tmp_path, method)
    assert changed(own, METHODS[method].defaults) == own
    plain = served(
        tmp_path, method, "--", "--server-momentum", "0", "--server-lr", "1", "--mode", "async"
    )
    assert (plain.server.momentum, plain.server.lr) == (0.0, 1.0)


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].paper])
def test_a_paper_has_its_own_settings_too(tmp_path, method):
    """Where the publication says nothing, the testbed's own."""
    values = METHODS[method].paper
    paper = served(tmp_path, method, "--", "--paper")
    assert changed(paper, values) == paper
    for name, value in TRAINING.items():
        assert getattr(paper, name) == values.get(name, value)
    asked = served(tmp_path, method, "--lr", "0.03", "--epochs", "3", "--", "--paper")
    assert (asked.lr, asked.epochs) == (0.03, 3)


def test_the_chosen_deadline_lets_weak_boards_train_what_rotation_gives_them(tmp_path):
    """Of a device as the testbed emulates it: stage 3 alone takes longer than exit 1. A method
    without rotation gets the least with which exit 1 is trained."""
    pi = emulated(board("raspberry-pi-4"), 30.0, 1e-5)
    devices = [Device("pi", "raspberry-pi-4", pi, tmp_path, examples(60))]
    plan, chosen = config("hypemefed", batch_size=16).plan(1), {}
    for method in ("hypemefed", "owners-mean"):
        args = make_parser().parse_args(["--method", method, "--option", "channels=4,16,64"])
        deadline_s = choose_deadline(args, tmp_path, devices)
        costs = segment_costs(spec_of(args, devices[0].examples, 3), plan, 60, 0)
        given = {"num_examples": 60, "epochs": DEFAULT_EPOCHS}
        chosen[method] = choose_exit(costs, pi, deadline_s=deadline_s, **given)
        slowest = {row.last: row.seconds for row in chosen[method].rows if row.first == row.last}
    assert slowest[3] > slowest[1]
    assert 3 in chosen["hypemefed"].stages
    assert (chosen["owners-mean"].exit, chosen["owners-mean"].stages) == (1, ())


def test_a_run_dir_in_use_is_refused(tmp_path, capsys):
    (tmp_path / "run.sqlite").touch()
    assert main([*FLAGS, "--run-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error == f"testbed: {tmp_path} holds a run already; choose another --run-dir\n"
