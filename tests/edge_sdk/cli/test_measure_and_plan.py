"""The measure and plan commands, as a person calls them."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from coordinator.cli.arguments import CommandParser
from coordinator.cli.serve import add_serve_command
from edge_sdk.cli import main, plan
from edge_sdk.cli.flags import Parser, option_flag, shape_flag
from edge_sdk.cli.measure import tell_load
from edge_sdk.errors import ConfigError, TrainerError
from edge_sdk.hardware import conditions, measure
from edge_sdk.hardware.boards import board
from edge_sdk.hardware.conditions import Conditions, Zone
from edge_sdk.helpers.text import parse_size
from edge_sdk.version import __version__
from tests.support.commands import status_of

MiB = 1024**2
VERSION = f"by edge-sdk {__version__}"
PLAN = ["plan", "--model", "cnn", "--input", "1x8x8", "--classes", "10"]


@pytest.fixture
def fixed_runtime(monkeypatch):
    """230 MiB instead of starting a trainer for every test; one test below starts it."""
    trainer = {"runtime_bytes": 230 * MiB, "allowance": 1.1, "error": 0.1}
    monkeypatch.setattr(plan, "_trial_trainer", lambda: dict(trainer))


@pytest.fixture
def fixed_speed(monkeypatch):
    """Not measured anew by every test; the two below do."""
    monkeypatch.setattr(measure, "measure_gflops", lambda seconds, device: 12.5)
    monkeypatch.setattr(measure, "measure_layer_s", lambda device: 2.5e-5)


def test_measure_prints_json(capsys):
    assert main.main(["measure", "--memory-cap", "64M", "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert captured.err.startswith("edge-sdk: measuring compute, about 2 seconds\n")
    assert found["memory_available_bytes"] == 64 * MiB
    assert found["memory_bound"] == "cap"
    assert found["gflops"] > 0


def test_measure_prints_lines(capsys):
    assert main.main(["measure", "--memory-cap", "64M"]) == 0
    assert "memory   64.0 MiB for training (bound: cap)" in capsys.readouterr().out


@pytest.mark.usefixtures("fixed_speed")
def test_measure_tells_the_conditions(capsys, monkeypatch):
    hot = Conditions(zones=(Zone("cpu-thermal", 78.2, 80.0, 110.0),), is_throttled=False)
    monkeypatch.setattr(conditions, "read", lambda **_: hot)
    assert main.main(["measure"]) == 0
    assert capsys.readouterr().out.endswith(
        "\nstate    cpu-thermal 78 °C, not throttled: short work, as cpu-thermal is at 78 °C, it "
        "is slowed at 80 °C\n"
    )
    assert main.main(["measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["conditions"]
    assert found["zones"] == [
        {"name": "cpu-thermal", "celsius": 78.2, "throttle_c": 80.0, "critical_c": 110.0}
    ]
    assert found["is_throttled"] is False
    assert found["battery_percent"] is None


@pytest.mark.usefixtures("fixed_speed")
def test_measure_saves_a_board_that_plan_takes(capsys, tmp_path):
    file = tmp_path / "boards" / "mine.toml"
    arguments = ["measure", "--memory-cap", "64M", "--save", str(file)]
    assert main.main([*arguments, "--link-mbit-s", "94", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    saved = board(str(file))
    assert (saved.memory_available_bytes, saved.link_mbit_s) == (64 * MiB, 94.0)
    assert (saved.gflops, saved.layer_s) == (12.5, 2.5e-5)
    for name in ("platform", "machine", "cores", "gflops", "layer_s", "memory_total_bytes"):
        assert getattr(saved, name) == measured[name]
    assert set(saved.source) == {
        "memory_total_bytes",
        "memory_available_bytes",
        "cores",
        "gflops",
        "layer_s",
        "link_mbit_s",
    }
    for name, text in saved.source.items():
        told = (
            ("Told by --link-mbit-s on 2",) if name == "link_mbit_s" else ("Measured on 2", VERSION)
        )
        assert all(part in text for part in told)
    assert f"with torch {torch.__version__} on cpu" in saved.source["gflops"]
    assert "(bound: cap)" in saved.source["memory_available_bytes"]

    assert main.main(arguments) == 1  # before anything is measured
    assert capsys.readouterr().err.endswith("exists; choose another name, or give --force\n")
    assert board(str(file)) == saved
    assert main.main([*arguments, "--force"]) == 0
    assert board(str(file)).link_mbit_s is None
    assert f"saved    {file}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--save", "generic"], "generic is a board of this package; choose another name"),
        (["--save", "a/b"], "board name 'a/b': expected 1 to 60 letters"),
    ],
)
def test_measure_refuses_in_one_line(capsys, arguments, message):
    assert main.main(["measure", *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.usefixtures("fixed_runtime")
def test_plan_counts_what_is_frozen(capsys):
    """Of a cnn of 4, 8, 8 channels its exits are left: 10 classes of 20 channels at 4 places,
    and biases; (4, 4, 4), (8, 2, 2) and (8, 1, 1) floats of 300 examples are kept."""
    arguments = ["--board", "raspberry-pi-4", "--examples", "300", "--epochs", "2"]
    given = [*PLAN, *arguments, "--option", "channels=4,8,8", "--freeze"]
    assert main.main([*given, "backbone"]) == 0
    out = capsys.readouterr().out
    (line,) = (line for line in out.splitlines() if line.startswith("exit 3 "))
    assert line.split()[2] == "830"
    assert "  0.1 MiB" in line
    assert "frozen   backbone: 0.0 MiB travel once, then are kept" in out
    assert main.main([*given, "stages=4"]) == 2
    assert "--freeze stages=4: the model has stages 1 to 3" in capsys.readouterr().err


@pytest.mark.usefixtures("fixed_runtime")
def test_plan_for_a_board(capsys):
    arguments = ["--board", "raspberry-pi-4", "--examples", "300", "--epochs", "2"]
    assert main.main([*PLAN, *arguments, "--option", "channels=4,8,8"]) == 0
    out = capsys.readouterr().out
    assert "raspberry-pi-4 (emulated board)" in out
    assert "2 x 300 examples" in out
    assert [line.split("  ")[0] for line in out.splitlines() if line.endswith("yes")] == [
        "exit 1",
        "exit 2",
        "exit 3",
        "stage 2 alone",
        "stage 3 alone",
    ]
    assert out.endswith(
        "\nexit 3; deeper stages that fit alone: none; exit 3 is the deepest of the model\n"
    )
    # 300 examples * features (4, 4, 4) and (8, 2, 2) of 4 bytes: 76800 and 38400 bytes
    assert [line.split()[9] for line in out.splitlines() if " alone " in line] == ["0.1", "0.0"]
    # without --data 300 floats (1, 8, 8) and labels
    (words,) = (line.split() for line in out.splitlines() if line.startswith("exit 3 "))
    peak, error = words[4], words[7]
    assert 230 + 300 * 264 / MiB < float(peak) < 235
    assert error == "2.0"


@pytest.mark.usefixtures("fixed_runtime")
def test_plan_under_a_cap_says_why_nothing_fits(capsys):
    arguments = ["--board", "raspberry-pi-4", "--memory-cap", "200M", "--json"]
    assert main.main([*PLAN, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["choice"]["exit"] == 0
    assert found["choice"]["reason"].endswith("200.0 MiB available (cap)")
    assert len(found["costs"]) == 5
    # 1000 examples of 8 * 8 floats and a label: 1000 * (256 + 8)
    assert found["costs"][0]["runtime_bytes"] == 230 * MiB + 264_000


@pytest.mark.usefixtures("fixed_runtime")
def test_plan_takes_shape_and_classes_from_data(capsys):
    arguments = ["plan", "--model", "cnn", "--data", "digits", "--board", "generic"]
    assert main.main(arguments) == 0
    out = capsys.readouterr().out
    assert "input 1x8x8, 10 classes" in out
    assert "2 x 1797 examples" in out


def test_plan_predicts_the_training_of_a_run_without_flags(capsys, fixed_runtime):
    parser = Parser()
    add_serve_command(parser.add_subparsers(parser_class=CommandParser))
    run = parser.parse_args(["serve"])
    assert main.main([*PLAN, "--examples", "300"]) == 0
    predicted = f"training {run.epochs} x 300 examples, batch {run.batch_size}, {run.optimizer};"
    assert predicted in capsys.readouterr().out


def test_plan_measures_each_thing_once_and_says_what_it_does(capsys, monkeypatch):
    done = []
    trainer = {"runtime_bytes": 230 * MiB, "allowance": 1.1, "error": 0.1}
    monkeypatch.setattr(measure, "measure_gflops", lambda *_, **__: done.append("gflops") or 12.5)
    monkeypatch.setattr(measure, "measure_layer_s", lambda **_: done.append("layer") or 2.5e-5)
    monkeypatch.setattr(plan, "_trial_trainer", lambda: done.append("trial") or dict(trainer))
    assert main.main([*PLAN, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["choice"]["exit"] == 3
    assert [line for line in captured.err.splitlines() if "is busy" not in line] == [
        "edge-sdk: measuring compute here",
        "edge-sdk: starting a trial trainer, for the memory that one needs",
        "edge-sdk: counting what every part of the model takes",
    ]
    assert done == ["gflops", "layer", "trial"]
    for wrong in (["--option", "depth=3"], ["--model", "none"], ["--board", "pi"]):
        assert main.main([*PLAN, *wrong]) == 2
    assert len(done) == 3, "refused before anything is measured"


def test_the_trial_trainer_is_real():
    assert 100 * MiB < plan._trial_trainer()["runtime_bytes"] < 1024 * MiB


def test_a_trial_trainer_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(plan, "TRIAL", "raise SystemExit('no torch here')")
    with pytest.raises(TrainerError, match="status 1: no torch here"):
        plan._trial_trainer()


def test_a_busy_machine_is_told(capsys):
    tell_load(2.0, 2)
    assert capsys.readouterr().err == ""
    tell_load(7.94, 2)
    said = capsys.readouterr().err
    assert said.startswith("edge-sdk: this machine is busy, 7.9 programs want its 2 cores: ")
    assert said.count("\n") == 1


@pytest.mark.usefixtures("fixed_runtime")
def test_a_plan_of_which_nothing_fits_says_so(capsys):
    assert main.main([*PLAN, "--memory-cap", "1M"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("nothing fits: no exit can be trained here; deeper stages that fit alo")
    assert "exit 1 needs " in last
    assert "1.0 MiB available (cap)" in last


@pytest.mark.usefixtures("fixed_runtime")
def test_a_short_deadline_is_shown_as_it_was_given(capsys):
    assert main.main([*PLAN, "--deadline", "0.0001"]) == 0
    assert "the deadline is 0.0001 s" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.usefixtures("fixed_runtime", "fixed_speed")
def test_costs_are_those_of_the_narrower_or_factorised_model(capsys):
    weights = {}
    for flags in ((), ("--rank", "0.125"), ("--width", "0.5")):
        arguments = [*PLAN, "--exits", "2", "--option", "channels=16,16", *flags]
        assert main.main([*arguments, "--json"]) == 0
        costs = json.loads(capsys.readouterr().out)["costs"]
        weights[flags[:1]] = [cost["gradient_bytes"] // 4 for cost in costs[:2]]
    # of stage 2's 16 x 16 x 9 weights there are 2 x 3 x (16 + 16); stage 1 is whole
    whole, factors = weights[()], weights[("--rank",)]
    assert [a - b for a, b in zip(whole, factors, strict=True)] == [0, 2304 - 192]
    # conv 9c, 9cc, norms 4c, exit 40c + 10; then conv 9cc, norm 2c and another exit
    assert weights[("--width",)] == [1010, 1010 + 922]
    assert main.main([*PLAN, "--rank", "0.125"]) == 0
    assert "10 classes, 3 exits, rank 0.125\n" in capsys.readouterr().out


@pytest.mark.usefixtures("fixed_runtime")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*PLAN, "--board", "pi"], "unknown board 'pi'; known: generic"),
        ([*PLAN, "--batch-size", "1"], "--batch-size: '1', expected a whole number from 2"),
        ([*PLAN, "--exits", "0"], "--exits: '0', expected a whole number from 1 to"),
        (["plan", "--model", "none", "--input", "1x8x8", "--classes", "2"], "unknown model family"),
        ([*PLAN, "--option", "depth=3"], "has no option depth"),
        ([*PLAN, "--import", "no_such_module_here"], "--import no_such_module_here"),
    ],
)
def test_a_wrong_value_is_one_line_and_status_2(capsys, arguments, message):
    assert status_of(main.main, arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("edge-sdk")
    assert err.count("\n") == 1
    assert message in err


def test_a_module_that_raises_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "raising_of_this_test.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert main.main([*PLAN, "--import", "raising_of_this_test"]) == 2
    assert capsys.readouterr().err == (
        "edge-sdk: --import raising_of_this_test: it raises ZeroDivisionError: division by zero; "
        "mend the module\n"
    )


@pytest.mark.parametrize("at", [0, 1])
def test_debug_shows_the_traceback(at):
    arguments = [*PLAN, "--board", "pi"]
    arguments.insert(at, "--debug")
    with pytest.raises(ConfigError):
        main.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["plan", "--model", "cnn"], "give --input and --classes, or --data"),
        (["measure", "--memory-cap", "much"], "expected one such as 512M"),
        (["measure", "--link-mbit-s", "fast"], "'fast', expected Mbit/s such as 94"),
        (["measure", "--link-mbit-s", "-1"], "'-1', expected Mbit/s such as 94"),
        (["measure", "--link-mbit-s", "nan"], "'nan', expected Mbit/s such as 94"),
        ([*PLAN, "--input", "8,8"], "expected sizes such as 1x28x28"),
        ([*PLAN, "--input", "28x28x1"], "which looks like HxWxC; give 1x28x28"),
        ([*PLAN, "--input", "48x64x3"], "which looks like HxWxC; give 3x48x64"),
        ([*PLAN, "--option", "channels"], "expected KEY=VALUE"),
        ([*PLAN, "--examples", "2"], "at least 3"),
        ([*PLAN, "--deadline", "-1"], "'-1', expected seconds"),
        ([*PLAN, "--rank", "0"], "'0', expected a share above 0, at most 1"),
        ([*PLAN, "--width", "1.5"], "'1.5', expected a share above 0, at most 1"),
    ],
)
def test_wrong_usage_is_status_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("1048576", MiB), ("2k", 2048), ("512M", 512 * MiB), ("1.5G", 1536 * MiB)],
)
def test_sizes(text, num_bytes):
    assert parse_size(text) == num_bytes


@pytest.mark.parametrize("text", ["512", "1048575", "0M", "-1G", "M", "nanM", "10MB"])
def test_sizes_that_are_none_or_lack_a_unit(text):
    with pytest.raises(
        ConfigError, match=f"size '{text}', expected one such as 512M or 1.5G; M is"
    ):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("channels=16,32", (16, 32)),
        ("depth=3", 3),
        ("dropout=0.5", 0.5),
        ("wide=true", True),
        ("kind=slim", "slim"),
        ("kind=null", "null"),
    ],
)
def test_options(text, value):
    assert option_flag(text) == (text.split("=")[0], value)


@pytest.mark.parametrize("text", ["channels=16,", "channels=16,,32", "channels=a,1", "depth", "=3"])
def test_options_that_are_none(text):
    """A comma at the end is a number that is missing: one channel is channels=16."""
    with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r}, expected"):
        option_flag(text)


def test_shapes():
    assert shape_flag("1X28x28") == (1, 28, 28)
    assert shape_flag("64x4x4") == (64, 4, 4)
    for text in ("1x", "1,28", "0x3", "-1x3", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=f"{text!r}, expected sizes"):
            shape_flag(text)
