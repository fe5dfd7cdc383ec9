"""tools/bench/infer.py on a tiny model that a real run has trained."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch

from coordinator.cli.main import main as coordinator
from edge_sdk.data.loading import load_dataset, save_shard
from edge_sdk.infer.export import read_weights
from edge_sdk.models import build
from tools.bench.infer import LAST, THRESHOLDS, main


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder and the test data, which trained nothing."""
    folder = tmp_path_factory.mktemp("run")
    flags = "emulate --method fedavg-l --serve last --data digits --examples 200"
    flags += " --test-examples 40 --rounds 2 --clients 2 --groups 0,0,2 --split iid --epochs 2"
    assert coordinator([*flags.split(), "--run-dir", str(folder / "run")]) == 0
    save_shard(folder / "test.npz", load_dataset("digits", 0, 200, 40).test)
    return folder


def test_every_way_is_measured_on_the_same_examples(run, tmp_path, capsys):
    weights, data = run / "run" / "model.safetensors", run / "test.npz"
    target = tmp_path / "infer.csv"
    flags = ["--weights", str(weights), "--data", str(data), "--repeats", "1"]
    assert main([*flags, "--csv", str(target)]) == 0
    head, *lines = target.read_text().splitlines()
    assert head.startswith("# python -m tools.bench.infer --repeats 1; commit ")
    assert "20 examples to calibrate, 20 predictions" in head
    rows = list(csv.DictReader(lines))
    by_way = {row["way"]: row for row in rows}
    shares = [[float(row[f"share_exit_{exit}"]) for exit in (1, 2, 3)] for row in rows]
    assert np.allclose(np.sum(shares, axis=1), 1, atol=2e-3)
    assert shares[0] == [1, 0, 0]
    assert by_way[LAST]["share_exit_3"] == "1.000"
    assert by_way[LAST]["of_last"] == "1.000"
    early = [row for row in rows if row["way"] == "early exit"]
    assert [float(row["threshold"]) for row in early] == [*THRESHOLDS]
    stopped = [float(row["share_exit_1"]) for row in early]
    assert stopped == sorted(stopped, reverse=True)
    assert all(float(row["cpu_ms"]) > 0 < float(row["wall_ms"]) for row in rows)
    assert "early exit, as calibrated" in capsys.readouterr().out
    assert [by_way[f"up to exit {e}"]["accuracy"] for e in (1, 2)] == accuracies(run)[:2]
    assert by_way[LAST]["accuracy"] == by_way["one graph, last exit"]["accuracy"]
    assert by_way[LAST]["accuracy"] == accuracies(run)[2]


def accuracies(run) -> list[str]:
    """By torch, of each exit on the half that is predicted."""
    spec, tensors = read_weights(run / "run" / "model.safetensors")
    model = build(spec)
    model.load(tensors)
    with np.load(run / "test.npz") as data:
        tried = np.random.default_rng(0).permutation(len(data["y"]))[20:]
        x, y = torch.from_numpy(data["x"][tried]), torch.from_numpy(data["y"][tried])
    with torch.inference_mode():
        found = [(logits.argmax(1) == y).float().mean() for logits in model.eval()(x)]
    return [f"{share:.4f}" for share in found]


def test_what_cannot_be_measured_is_one_line(run, tmp_path, capsys):
    (tmp_path / "other").write_text("no weights")
    data = str(run / "test.npz")
    assert main(["--weights", str(tmp_path / "other"), "--data", data]) == 1
    said = capsys.readouterr().err
    assert said.startswith("bench.infer: ")
    assert "expected a model.safetensors" in said
    assert said.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["--weights", "one", "--data", data, "--data", data])
    assert "1 --weights for 2 --data" in capsys.readouterr().err
