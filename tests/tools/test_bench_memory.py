"""tools/bench/memory.py on a tiny model: real processes, and a bound added up by hand."""

from __future__ import annotations

import csv
import os

import pytest

from tools.bench import memory as bench
from tools.bench.memory_programs import footprint


@pytest.mark.slow
def test_every_process_is_measured(tmp_path, capsys):
    target = tmp_path / "memory.csv"
    flags = ["--models", "tiny", "--batches", "4", "--exits", "2", "--runs", "1"]
    assert bench.main([*flags, "--csv", str(target)]) == 0
    head, *lines = target.read_text().splitlines()
    assert head.startswith("# python -m tools.bench.memory --models tiny --batches 4 ")
    rows = list(csv.DictReader(lines))
    by_process = {row["process"]: row for row in rows}
    assert len(rows) == len(by_process) == 8
    peak = {name: float(row["peak_mb"]) for name, row in by_process.items()}
    assert all(float(row["start_cpu_s"]) > 0 for row in rows)
    idle = by_process["agent, waiting for its coordinator"]
    assert float(idle["uss_mb"]) <= float(idle["pss_mb"]) <= float(idle["rss_mb"])
    assert peak["agent, waiting for its coordinator"] < peak["import torch"] / 2  # no torch in it
    # torch.optim imports torch._dynamo
    assert peak["import torch"] < peak["trainer"] < peak["torch.optim loop"]
    onnx = peak["inference: edge_sdk.infer, onnxruntime"]
    assert peak["inference: numpy only"] < onnx < peak["inference: torch"]
    trainer, loop = by_process["trainer"], by_process["torch.optim loop"]
    assert float(trainer["of_loop"]) == pytest.approx(
        float(trainer["peak_mb"]) / float(loop["peak_mb"]), abs=2e-3
    )
    assert trainer["bound_mb"] == loop["bound_mb"]
    assert float(trainer["count_cpu_s"]) > 0
    assert "of_bound" in capsys.readouterr().out


@pytest.mark.slow
def test_the_bound_by_hand(tmp_path):
    """Channels 2 and 3, exit 1 only, 1 x 8 x 8, 2 classes, batch 4. Parameters: convolutions 18 and
    36, two norms of 2 + 2, an exit of 8 * 2 + 2: 80, and 8 running statistics; gradients and two
    moments of the 80. Saved, of 4 bytes: the input, 64 an example; both convolutions' outputs and
    the first ReLU's, 128 each; the pool's output is the second ReLU's, 32, and its indices 32 of 8
    bytes; the exit's flat input, 8; ..., in all at least 4 * (4 * (64 + 3 * 128 + 32) + 8 * 32).
    Beside them lies the gradient of one of the 128."""
    spec = bench.msgspec.structs.replace(bench.MODELS["tiny"], exit=1)
    plan = bench.Plan(segments=(bench.Segment(first=1, last=1),), batch_size=4)
    bench.save_shard(tmp_path / "data.npz", bench.examples(spec, 12))
    found = bench.trainer_job(spec, plan, tmp_path / "data.npz")
    held = 4 * (80 + 8 + 3 * 80)
    saved = 4 * (4 * (64 + 3 * 128 + 32) + 8 * 32)
    gradient = 4 * 4 * 128
    assert held + saved + gradient <= 1e6 * found["needed_mb"] <= held + 1.3 * saved + gradient
    assert len(found["losses"]) == 1


def test_a_footprint_is_in_mb():
    own = footprint(os.getpid())
    assert 0 < own["uss_mb"] <= own["rss_mb"] <= own["peak_mb"] < 10_000


def test_different_training_is_refused():
    bench.check_same([1.0, 2.0], [1.01, 1.99])
    with pytest.raises(RuntimeError, match="trainer and loop differ"):
        bench.check_same([1.0, 2.0], [1.0, 2.1])


def test_a_program_that_fails_says_why():
    with pytest.raises(RuntimeError, match="(?s)torch.optim loop failed: .*field `segments`"):
        bench.program("torch.optim loop", "{}", "{}", "none.npz")


def test_unknown_models_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--models", "none"])
    assert "known are cnn, vgg, tiny" in capsys.readouterr().err
