"""Methods, rules and generators that users write, by --import and from Python: those of examples/,
and wrong ones."""

from __future__ import annotations

import json
import re

import pytest
import torch

from coordinator.aggregation.registry import RULES, make_kernel
from coordinator.cli.main import main
from coordinator.config import AggregationOptions, read_config
from coordinator.generators.registry import GENERATORS
from coordinator.methods.registry import METHODS, make_config, make_method
from coordinator.settings import checked
from edge_sdk.errors import ConfigError
from edge_sdk.helpers.imports import import_module
from tests.support.commands import status_of
from tests.support.examples import client, cnn, config
from tests.support.processes import ROOT, read_rows

SMALL = [
    "emulate",
    "--data",
    "digits",
    "--examples",
    "120",
    "--test-examples",
    "30",
    "--split",
    "iid",
    "--clients",
    "4",
    "--groups",
    "1,1,2",
    "--epochs",
    "1",
    "--option",
    "channels=4,4,4",
]
OWN = {  # by module: what it registers, its flag, a value and another
    "own_method": ("--method", "warm-up", "--shallow", "1", "3"),
    "own_rule": ("--aggregation", "geometric-median", "--steps", "2", "3"),
    "own_generator": ("--generator", "half-way", "--part", "0.25", "0.5"),
}


@pytest.fixture(autouse=True)
def registered(own_things):
    """In one test only."""


def flags_of(module):
    chosen, name, flag, value, _ = OWN[module]
    return ["--import", module, chosen, name, flag, value]


@pytest.mark.parametrize("module", OWN)
def test_what_is_imported_runs_and_goes_on(tmp_path, capsys, module):
    run = [*SMALL, *flags_of(module), "--rounds", "2", "--run-dir", str(tmp_path / "run")]
    flag, value, other = OWN[module][2:]
    assert main(run) == 0
    assert main([*run, "--resume"]) == 0
    assert main([*run, "--resume", flag, other]) == 1
    said = capsys.readouterr()
    assert [line.split(",")[0] for line in said.out.splitlines()] == [
        f"round {number}: 4 of 4 returned" for number in (1, 2)
    ]
    assert f"{flag} {value} (now {other})" in said.err


def test_own_options_are_kept_with_the_run_and_no_others(tmp_path):
    run = [*SMALL, "--rounds", "1", "--run-dir"]
    assert main([*run, str(tmp_path / "own"), *flags_of("own_method"), *flags_of("own_rule")]) == 0
    assert main([*run, str(tmp_path / "plain"), "--method", "owners-mean"]) == 0
    ((own,),) = read_rows(tmp_path / "own", "SELECT config FROM runs")
    ((plain,),) = read_rows(tmp_path / "plain", "SELECT config FROM runs")
    assert read_config(own, "run").own == {"shallow": 1}
    assert json.loads(own)["aggregation"]["own"] == {"steps": 2}
    assert json.loads(own)["server"]["momentum"] == 0.5, "a default of the method"
    assert '"own"' not in plain


@pytest.mark.parametrize("module", OWN)
def test_help_has_the_flags_of_what_is_named(capsys, module):
    chosen, name, flag, *_ = OWN[module]
    with pytest.raises(SystemExit) as ended:
        main(["emulate", "--help", "--import", module, chosen, name])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"  {flag} " in text
    assert re.search(rf"{{[a-z,\n -]*{name}", text), "among the choices"
    with pytest.raises(SystemExit):
        main(["emulate", "--help"])
    assert f"  {flag} " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shallow", "-1"], "--shallow: '-1', expected a whole number, at least 0"),
        (["--paper"], "method 'warm-up' has no settings of a paper; leave --paper out"),
        (
            ["--generator", "svd-mlp"],
            "method 'warm-up': --generator svd-mlp has no place there; leave it",
        ),
        (
            ["--rotation", "add"],
            "method 'warm-up': --rotation add has no place there; leave it out",
        ),
        (["--import", "no_such_module"], "--import no_such_module: No module named"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_one_line(capsys, flags, said):
    argv = [*SMALL, "--import", "own_method", "--method", "warm-up", *flags]
    assert status_of(main, argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("edge-coordinator")
    assert said in error
    assert error.count("\n") == 1


def test_flags_of_another_method_are_wrong_usage(capsys):
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, "--import", "own_method", "--shallow", "1"])
    assert ended.value.code == 2
    assert "unrecognized arguments: --shallow 1" in capsys.readouterr().err


def test_a_name_and_a_flag_that_are_taken_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    body = "from coordinator.methods.registry import register_method\n"
    (tmp_path / "taken_name.py").write_text(
        f"{body}@register_method('fedavg-s')\ndef mine(config, device): ...\n"
    )
    (tmp_path / "taken_flag.py").write_text(
        f"{body}from typing import Annotated\nfrom coordinator.config import Options, flag\n"
        "class Own(Options, frozen=True):\n    lr: Annotated[float, flag('of mine')] = 1.0\n"
        "@register_method('taken-flag', options=Own)\ndef mine(config, device, own): ...\n"
    )
    assert main([*SMALL, "--import", "taken_name"]) == 2
    assert "method 'fedavg-s' is registered already; choose another" in capsys.readouterr().err
    assert main([*SMALL, "--import", "taken_flag", "--method", "taken-flag"]) == 2
    assert "taken_flag.Own: argument --lr: conflicting option" in capsys.readouterr().err


def test_from_python_it_has_its_defaults_and_its_options():
    import_module("own_method")
    settings = make_config("warm-up", cnn(), rounds=3, own={"shallow": 2})
    assert (settings.server.momentum, settings.server.lr) == (0.5, 0.75)
    method = make_method(checked(settings))
    depths = [method.assign(client("a", 3), round).plan.segments[0].last for round in (1, 2, 3)]
    assert depths == [1, 1, 3]
    for wrong, said in [
        ({"deep": 1}, "method 'warm-up' has no option deep; known: shallow"),
        ({"shallow": -1}, "--shallow is -1, expected a whole number, at least 0"),
        ({"shallow": "two"}, "--shallow is 'two', expected a whole number, got text"),
    ]:
        with pytest.raises(ConfigError, match=said):
            make_method(make_config("warm-up", cnn(), rounds=3, own=wrong))
    with pytest.raises(
        ConfigError, match="method 'owners-mean' has no option shallow; known: none"
    ):
        make_method(config("owners-mean", own={"shallow": 1}))


def test_the_geometric_median_by_hand():
    """Of 0, 0 and 12 from 0 sent: the mean is 4, at distances 4, 4 and 8; then 12 has the weight
    (1/8) / (1/4 + 1/4 + 1/8) = 1/5, and the median is 2.4."""
    import_module("own_rule")
    kernel = make_kernel(AggregationOptions(rule="geometric-median", own={"steps": 2}))
    for value in (0.0, 0.0, 12.0):
        kernel.add_({"w": torch.tensor([value])}, 1.0)
    assert kernel.result({"w": torch.zeros(1)})["w"].item() == pytest.approx(2.4)


def test_half_of_the_way_by_hand():
    """Stage 3 has one owner of four; the others lack it and count with half of what it moved."""
    import_module("own_generator")
    make = GENERATORS["half-way"]
    generator = make.make({}, ["w"], None, 0, "cpu", make.options())
    sent, moved = {"w": torch.zeros(2)}, {"w": torch.full((2,), 8.0)}
    for tensors in (moved, {}, {}, {}):
        update = type("Update", (), {"tensors": tensors})()
        generator.observe(update, sent, 10.0)
    generator.fit(sent, 1)
    ((weight, made),) = generator.generate(sent, moved)
    assert (weight, made["w"].tolist()) == (30.0, [4.0, 4.0])
    assert list(generator.generate(sent, moved)) == [], "the round is forgotten"


def test_examples_are_registered_under_names_of_their_own():
    known = {*METHODS, *RULES, *GENERATORS}
    for module, (_, name, *_) in OWN.items():
        assert name not in known
        import_module(module)
    assert {*METHODS, *RULES, *GENERATORS} - known == {name for _, name, *_ in OWN.values()}
    assert all((ROOT / "examples" / f"{module}.py").exists() for module in OWN)
