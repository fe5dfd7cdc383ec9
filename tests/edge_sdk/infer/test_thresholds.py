"""Thresholds, latencies and the report, by numbers worked out by hand."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace

import numpy as np
import pytest

from edge_sdk.cli.calibrate import tell_doubts
from edge_sdk.cli.main import main
from edge_sdk.data.loading import save_shard
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.infer.early_exit import NEVER, EarlyExit
from edge_sdk.infer.export import export
from edge_sdk.infer.report import write_report
from edge_sdk.infer.thresholds import (
    GRID,
    Answers,
    answers_of,
    choose,
    choose_thresholds,
    curve,
    exit_seconds,
)
from edge_sdk.models import initial_tensors
from edge_sdk.tasks.base import of_softmax
from edge_sdk.tasks.metrics import METRICS
from tests.support.commands import status_of
from tests.support.examples import cnn, examples, two_exits

# Four examples of class 1. Exit 1 is right on the first two and sure of .9, .8, .6, .4; exit 2 is
# right on the first three. Stopping there takes 1 and 3 s.
RIGHT = np.array([[1, 1, 0, 0], [1, 1, 1, 0]], np.float64)
ANSWERS = Answers(
    task="classify",
    counts=np.stack([RIGHT, np.ones_like(RIGHT)], -1),
    confidences=np.array([[0.9, 0.8, 0.6, 0.4], [0.5, 0.5, 0.5, 0.5]], np.float32),
)
EXIT_S = (1.0, 3.0)
# threshold: accuracy, mean seconds, share that stops at exit 1
BY_HAND = {
    0.0: (2 / 4, 1.0, 1.0),
    0.5: (2 / 4, 1 + 2 / 4, 3 / 4),
    0.7: (3 / 4, 1 + 2 * 2 / 4, 2 / 4),
    0.85: (3 / 4, 1 + 2 * 3 / 4, 1 / 4),
    NEVER: (3 / 4, 3.0, 0.0),
}
POINTS = curve(ANSWERS, EXIT_S, tuple(BY_HAND))


def test_the_curve_counts_what_each_threshold_would_have_done():
    assert {p.threshold: (p.metric, p.latency_s, p.shares[0]) for p in POINTS} == BY_HAND
    assert all(sum(p.shares) == 1 for p in POINTS)
    assert ANSWERS.metrics() == [2 / 4, 3 / 4]


@pytest.mark.parametrize(
    ("wish", "threshold"),
    [
        ({"metric": 0.5}, 0.0),
        ({"metric": 0.75}, 0.7),  # 0.85 and never reach it too, later
        ({"metric_loss": 0.25}, 0.0),
        ({"metric_loss": 0.2}, 0.7),
        ({"latency_s": 1.0}, 0.0),
        ({"latency_s": 1.9}, 0.0),  # 0.5 is no better, and slower
        ({"latency_s": 2.0}, 0.7),
        ({"latency_s": 9.0}, 0.7),
    ],
    ids=str,
)
def test_the_best_threshold_for_a_wish(wish, threshold):
    every = {"metric": None, "metric_loss": None, "latency_s": None}
    point, _ = choose(POINTS, 0.75, METRICS["classify"], **(every | wish))
    assert point.threshold == threshold


@pytest.mark.parametrize("wish", [{"metric": 0.8}, {"latency_s": 0.9}], ids=str)
def test_what_nothing_reaches_says_what_is_reachable(wish):
    every = {"metric": None, "metric_loss": None, "latency_s": None}
    with pytest.raises(ConfigError) as refused:
        choose(POINTS, 0.75, METRICS["classify"], **(every | wish))
    assert "accuracy 0.5000 at 1000.000 ms, the best 0.7500 at 2000.000 ms" in str(refused.value)


def test_one_wish_at_a_time():
    for wishes in ((None, None, None), (0.5, None, 1.0)):
        with pytest.raises(ConfigError, match="give one of"):
            choose(POINTS, 0.75, METRICS["classify"], *wishes)


def test_the_grid_covers_everything():
    assert GRID[0] == 0
    assert GRID[-1] == NEVER
    assert sorted(set(GRID)) == list(GRID)


@pytest.fixture
def model(tmp_path):
    """helpers.two_exits: sure of 3/4 and 9/10 at exit 1, of 1/2 for the last."""
    spec, tensors = two_exits()
    export(spec, tensors, tmp_path / "model")
    return tmp_path / "model", np.array([[1, 0], [2, 0], [0, 1]], np.float32)


def test_calibration_is_kept_and_used(model):
    """Right at exit 1 are the first two, at exit 2 the third: all right needs a threshold above 1/2
    and at most 3/4; of those that are as fast the largest on the grid is taken."""
    folder, x = model
    found = choose_thresholds(folder, x, np.array([0, 0, 1]), metric=1.0)
    assert found.thresholds == (0.75,)
    assert (found.metric, found.deepest_metric) == (1.0, pytest.approx(1 / 3))
    assert found.exit_shares == pytest.approx((2 / 3, 1 / 3))
    assert found.latency_s > 0
    engine = EarlyExit.load(folder)
    assert engine.thresholds == (0.75,)
    assert engine.predict(x).label.tolist() == [0, 0, 1]


def test_a_refused_wish_keeps_the_calibration_there_was(model):
    folder, x = model
    choose_thresholds(folder, x, np.array([0, 0, 1]), metric=1.0)
    before = (folder / "calibration.json").read_bytes()
    with pytest.raises(ConfigError, match="not reachable"):
        choose_thresholds(folder, x, np.array([1, 1, 0]), metric=0.9)
    assert (folder / "calibration.json").read_bytes() == before


@pytest.mark.parametrize(
    ("y", "said"),
    [
        (np.array([0, 0]), "labels are (2,)"),
        (np.array([0.0, 0, 1]), "float64"),
        (np.array([0, 0, 2]), "the model knows 0 to 1"),
        (np.array([0, -1, 1]), "labels from -1"),
    ],
    ids=str,
)
def test_labels_that_do_not_fit_are_refused(model, y, said):
    folder, x = model
    with pytest.raises(DataError) as refused:
        choose_thresholds(folder, x, y, metric=0.5)
    assert said in str(refused.value)


def test_every_exit_is_timed_by_what_it_runs(model):
    """Here the second stage does its work a hundred times."""

    class Slow:
        def __init__(self, session):
            self.session = session

        def run(self, *arguments):
            return [self.session.run(*arguments) for _ in range(100)][-1]

    folder, x = model
    engine = EarlyExit.load(folder)
    slow = replace(engine, sessions=(engine.sessions[0], Slow(engine.sessions[1])))
    first_s, second_s = exit_seconds(slow, x, runs=5)
    assert 0 < 3 * first_s < second_s


def test_one_run_of_the_data_serves_every_measure(model, tmp_path):
    """Timing runs examples one by one; what runs all three at once is counted."""

    class Counted:
        def __init__(self, session):
            self.session, self.sizes = session, []

        def run(self, names, inputs):
            self.sizes.append(len(inputs["input"]))
            return self.session.run(names, inputs)

    folder, x = model
    engine, y = EarlyExit.load(folder), np.array([0, 0, 1])
    sessions = tuple(map(Counted, engine.sessions))
    write_report(replace(engine, sessions=sessions), x, y, tmp_path / "report", "three")
    assert [[size for size in one.sizes if size > 1] for one in sessions] == [[3], [3]]
    both = answers_of(engine, x, y, ["softmax", "entropy"])
    for measure, found in both.items():
        by_hand = [of_softmax(logits, measure) for logits in engine.all_exits(x)]
        assert np.array_equal(found.confidences, by_hand)
        assert found.counts[..., 0].tolist() == [[1, 1, 0], [0, 0, 1]]


# -- the command line --------------------------------------------------------------------------


@pytest.fixture
def labelled(tmp_path):
    data, spec = examples(30), cnn()
    export(spec, initial_tensors(spec, 0), tmp_path / "model", examples=data)
    save_shard(tmp_path / "held.npz", data)
    return [str(tmp_path / "model"), "--data", str(tmp_path / "held.npz")]


def test_calibrate_says_what_it_chose_and_infer_obeys(labelled, capsys):
    assert main(["calibrate", *labelled, "--accuracy", "0", "--measure", "entropy"]) == 0
    assert "accuracy 0: stop where entropy is at least" in capsys.readouterr().out
    assert main(["infer", *labelled]) == 0
    said = capsys.readouterr().out
    assert "where entropy is at least" in said
    assert "exit 1 100.0 %" in said, "the fastest of all"
    assert status_of(main, ["calibrate", *labelled, "--accuracy", "1.1"]) == 2
    err = capsys.readouterr().err
    assert "accuracy 1.1, expected a share from 0 to 1" in err
    assert err.count("\n") == 1


def test_report_has_a_row_per_threshold_and_a_plot(labelled, tmp_path, capsys):
    out = tmp_path / "report"
    assert main(["infer-report", *labelled, "--out", str(out)]) == 0
    assert [line.rsplit("/")[-1] for line in capsys.readouterr().out.split()] == [
        "curve.csv",
        "curve.md",
        "curve.png",
    ]
    with (out / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(GRID)
    by_hand = EarlyExit.load(labelled[0], threshold=NEVER).predict(examples(30).x)
    deepest = (by_hand.label == examples(30).y).mean()
    for measure in ("softmax", "entropy"):
        first, *_, last = [row for row in rows if row["measure"] == measure]
        assert (first["threshold"], first["share_exit_1"]) == ("0", "1.0000")
        assert (last["threshold"], last["share_exit_3"]) == ("never", "1.0000")
        assert float(last["accuracy"]) == pytest.approx(deepest, abs=1e-4)
        assert float(first["latency_ms"]) < float(last["latency_ms"])
    assert (out / "curve.md").read_text().count("\n| never |") == 2
    assert (out / "curve.png").read_bytes()[:4] == b"\x89PNG"


def test_report_without_matplotlib_is_a_table_and_one_line(labelled, tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["infer-report", *labelled, "--out", str(tmp_path / "report")]) == 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == [
        "curve.csv",
        "curve.md",
    ]
    (said,) = [record.message for record in caplog.records]
    assert said == "no curve.png: matplotlib is not installed; pip install matplotlib"


def test_few_examples_and_lacking_classes_are_told(capsys):
    tell_doubts(np.array([0, 3] * 50), 4)
    assert "chosen without examples of 2 of the 4 classes (1, 2)" in capsys.readouterr().err
    tell_doubts(np.array([0, 1]), 2)
    assert "chosen on 2 examples, which is few: give 100 or more" in capsys.readouterr().err
    tell_doubts(np.arange(100) % 4, 4)
    assert capsys.readouterr().err == ""
