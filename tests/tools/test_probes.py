"""Probes: likeness of features and distributions of weights, from tiny models."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from coordinator.cli.main import main as coordinator
from coordinator.cohorts.population import Population
from coordinator.store.store import Store
from edge_sdk.data.loading import DataSet
from edge_sdk.models import build, initial_tensors
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.training.trainer import train
from tests.support.examples import client, client_update, cnn, config, examples
from tools.experiments.__main__ import main
from tools.experiments.probes import (
    BINS,
    cka_rows,
    deepest_convolution,
    first_features,
    generated,
    histogram,
    population_of,
)

PLAN = Plan(segments=(Segment(first=1, last=3),), batch_size=8, lr=0.01, seed=3)
DATA = DataSet("tiny", examples(24, 1), examples(12, 2))


def test_cka_of_every_pair_of_depths():
    """Exit 1 trains alike under both losses: it has one exit."""
    rows = cka_rows(cnn(), PLAN, DATA, is_same_start=True)
    assert [(row["loss"], row["exits"]) for row in rows] == [
        (loss, pair) for loss in ("joint", "deepest") for pair in ("1-2", "1-3", "2-3")
    ]
    assert all(0 < row["cka"] <= 1 for row in rows)
    one, other = (first_features(cnn(), PLAN, DATA, 1, loss, True) for loss in ("joint", "deepest"))
    assert torch.equal(one, other)


def test_features_are_of_the_trained_stage_in_evaluation_mode():
    """lr so small that nothing moves but BatchNorm's statistics: recomputed here by hand."""
    still = Plan(segments=PLAN.segments, batch_size=8, lr=1e-12, seed=3)
    got = first_features(cnn(), still, DATA, 3, "deepest", True)
    assert got.shape == (12, 4, 4, 4)  # 8 x 8 inputs, halved once
    own = first_features(cnn(), still, DATA, 3, "deepest", False)
    assert not torch.allclose(got, own, atol=1e-3)  # another start
    model = build(cnn())
    start = initial_tensors(cnn(), 3)
    model.load(train(cnn(), still, start, DATA.train).tensors)
    with torch.no_grad():
        mine = model.eval().stages[0](torch.from_numpy(DATA.test.x))
    assert torch.allclose(got, mine, atol=0.05)  # batches came in another order


def test_histogram_shares():
    """Range: the larger reach, here 1; two bins' edges are where they are expected."""
    edges, shares = histogram({"a": torch.tensor([-1.0, 1.0]), "b": torch.tensor([0.01, 0.02])})
    assert (len(edges), edges[0], edges[-1]) == (BINS + 1, -1.0, 1.0)
    assert np.flatnonzero(shares["a"]).tolist() == [0, BINS - 1]
    assert shares["a"][0] == 0.5
    assert shares["b"][BINS // 2] == 1.0  # from 0 to 2 / BINS = 0.025


def test_deepest_convolution():
    names = ("stages.1.0.weight", "stages.2.0.weight", "stages.2.3.weight", "exits.2.2.weight")
    shapes = ((2, 2, 3), (2, 2, 3), (2, 2, 3), (2, 2))
    tensors = {name: torch.zeros(shape) for name, shape in zip(names, shapes, strict=True)}
    assert deepest_convolution(tensors | {"stages.2.4.weight": torch.zeros(2)}) == names[2]
    spec = ModelSpec(family="vgg", input_shape=(3, 16), num_classes=3, exit=3)
    assert deepest_convolution(initial_tensors(spec, 0)) == "stages.2.3.weight"


def test_probe_cka_writes_its_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    flags = "--data digits --examples 60 --test-examples 30 --epochs 1 --seeds 0,1 --exits 2"
    assert main(["probe", "cka", *flags.split(), "--out", str(tmp_path)]) == 0
    assert "exits 1-2, joint loss: CKA 0." in capsys.readouterr().out
    with (tmp_path / "cka.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["loss"]) for row in rows] == [
        ("0", "joint"),
        ("0", "deepest"),
        ("1", "joint"),
        ("1", "deepest"),
    ]
    assert (tmp_path / "cka.png").exists()


@pytest.mark.parametrize("method", ["hypemefed --paper", "owners-mean"])
def test_probe_weights_goes_on_from_a_run(method: str, tmp_path: Path, capsys):
    """owners-mean has no networks: they are trained from new ones. The run stays as it was."""
    run, out = tmp_path / "run", tmp_path / "out"
    arguments = f"emulate --method {method} --examples 90 --test-examples 40 --rounds 1 --clients 3"
    arguments += " --groups 1,1,1 --batch-size 8 --split iid --option channels=4,5,6 --epochs 1"
    assert coordinator([*arguments.split(), "--run-dir", str(run)]) == 0
    capsys.readouterr()
    assert main(["probe", "weights", "--run-dir", str(run), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    # the deepest convolution has 6 x 5 x 3 x 3 = 270 weights: one owner, and one mean of what was
    # generated for the two clients without it
    assert "trained: 270 weights" in text
    assert "generated: 270 weights" in text
    assert "random: 270 weights" in text
    with (out / "weights.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == BINS
    for kind in ("trained", "generated", "random"):
        assert sum(float(row[kind]) for row in rows) == pytest.approx(1.0, abs=0.02)
    assert (out / "weights.png").exists()
    store = Store.resume(run)
    assert store.next_round() == 2
    store.close()


def test_probe_weights_refuses_what_it_cannot_compare(tmp_path: Path, capsys):
    arguments = "emulate --method owners-mean --examples 90 --test-examples 40 --rounds 1"
    arguments += (
        " --clients 3 --groups 0,0,3 --batch-size 8 --split iid --option channels=4,5,6 --epochs 1"
    )
    run = tmp_path / "run"
    assert coordinator([*arguments.split(), "--run-dir", str(run)]) == 0
    capsys.readouterr()
    probe = ["probe", "weights", "--run-dir", str(run), "--out", str(tmp_path / "out")]
    assert main(probe) == 1
    assert "has no generated weights in round 2" in capsys.readouterr().err
    assert main([*probe, "--tensor", "none"]) == 1
    assert "--tensor none is none of the model's: stages.0.0.weight" in capsys.readouterr().err
    assert main([*probe, "--rounds", "0"]) == 1
    assert "--rounds is 0, expected at least 1" in capsys.readouterr().err
    assert main([*probe, "--clients", "4"]) == 1
    assert "groups 0,0,3 need to sum to 4 clients" in capsys.readouterr().err


def test_probe_cka_needs_two_depths(tmp_path: Path, capsys):
    assert main(["probe", "cka", "--data", "digits", "--exits", "1", "--out", str(tmp_path)]) == 1
    assert "--exits is 1, expected at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(("weighting", "want"), [("examples", 25.0), ("equal", 20.0)])
def test_probe_weighs_clients_as_the_run_does(weighting: str, want: float):
    """The generator repeats the owners' mean of 10 and 30, seen in 1 and 3 examples."""
    strong = client("a", 3)
    sent = {"stages.2.0.weight": torch.zeros(2, 2)}
    updates = [
        client_update(
            strong,
            {"stages.2.0.weight": torch.full((2, 2), value)},
            (Segment(first=1, last=3),),
            num_examples=n,
        )
        for n, value in ((1, 10.0), (3, 30.0))
    ]
    (made,) = generated(Repeater(), updates, sent, 1, weighting)
    assert torch.equal(made["stages.2.0.weight"], torch.full((2, 2), want))


class Repeater:
    def observe(self, update, current, weight):
        assert weight in (1.0, 3.0)

    def fit(self, current, round):
        return {}

    def generate(self, current, mean):
        yield 1.0, mean


def test_probe_takes_the_runs_own_clients():
    asked = argparse.Namespace(clients=None, groups=None, split="iid", alpha=None)
    own = Population(clients=6, groups=(3, 3), split="dirichlet", alpha=0.1, holders=0.5)
    found = population_of(config("hypemefed", population=own.text()), asked)
    assert found == replace(own, split="iid")
    assert population_of(config("hypemefed"), asked).clients == 50
