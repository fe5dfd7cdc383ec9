"""tools/bench/generators.py on a tiny model: rows are measured, or computed where large."""

from __future__ import annotations

import csv

import pytest
import torch

from coordinator.config import GeneratorOptions
from tools.bench import generators as bench
from tools.bench.generator_updates import MODELS, Round, make_updates


@pytest.fixture(scope="module")
def updates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("updates")
    make_updates(MODELS["tiny"], folder / "tiny", 2)
    return folder


@pytest.mark.slow
def test_rows_are_measured_and_written(updates, tmp_path, capsys):
    target = tmp_path / "generators.csv"
    bench.main(
        [
            "--models",
            "tiny",
            "--rounds",
            "2",
            "--generators",
            "naive-mlp,update-regression",
            "--updates",
            str(updates),
            "--csv",
            str(target),
        ]
    )
    head, *lines = target.read_text().splitlines()
    assert head.startswith("# python -m tools.bench.generators --rounds 2; commit ")
    naive, linear = csv.DictReader(lines)
    assert naive["how"] == linear["how"] == "run"
    assert int(naive["parameters"]) > 0 == int(linear["parameters"])
    assert float(linear["times_faster"]) > 0
    assert 0 < float(linear["error_3"]) < 1
    assert "| tiny | update-regression | run |" in capsys.readouterr().out


def test_what_does_not_fit_is_computed(updates, capsys):
    bench.main(
        [
            "--models",
            "tiny",
            "--rounds",
            "2",
            "--generators",
            "svd-mlp",
            "--updates",
            str(updates),
            "--memory-gb",
            "0.0001",
        ]
    )
    assert "| tiny | svd-mlp | computed, not run |" in capsys.readouterr().out


def test_computed_size_by_hand():
    # matrices 12 x 12 (stage 1), 12 x 15, 15 x 18: from stage 1 to 2 at hidden 2
    # (144*2+2 + 2*180+180) = 830 numbers, to 3 (180*2+2 + 2*270+270) = 1172
    sizes = bench.size_of(MODELS["tiny"], GeneratorOptions(name="naive-mlp", hidden=2))
    assert sizes["parameters"] == 830 + 1172
    # all weights; gradients and two moments of the larger; a temporary of its largest tensor
    assert sizes["peak_MB"] == pytest.approx(4 * (2002 + 3 * 1172 + 540) / 1e6, abs=0.05)


def test_error_is_of_what_stands_for_the_lacking():
    """Stage 3 has 3 owners of 10. Generated 5 at weight 7 stands for itself; at weight 3 the rest
    is the owners' mean 1: (3 * 1 + 3 * 5) / 6 = 3 = (3 * 1 + 7 E) / 10, so E = 27 / 7."""
    name = "stages.2.0.weight"
    one = {name: torch.ones(1, 1, 1, 1)}
    true = {name: torch.full((1, 1, 1, 1), 4.0)}
    sent = {name: torch.full((1, 1, 1, 1), 2.0)}
    for weight, stands in ((7.0, 5.0), (3.0, 27 / 7)):
        errors = bench.Errors()
        round_ = Round(sent, one, true)
        errors.add_(round_, weight, {name: torch.full((1, 1, 1, 1), 5.0)})
        row = errors.row(round_, stages=(3,))
        assert row["error_3"] == pytest.approx(abs(stands - 4) / 4, abs=1e-5)
        assert row["moved_3"] == pytest.approx(abs(stands - 4) / 2, abs=1e-5)
        assert row["mean_moved_3"] == pytest.approx(3 / 2, abs=1e-5)
