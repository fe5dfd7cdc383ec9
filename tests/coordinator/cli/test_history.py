"""`edge-coordinator history`: a run's rounds and participations, whole, as they were recorded."""

from __future__ import annotations

import csv
import io
import math
from xml.etree import ElementTree

import pytest

from coordinator.cli.main import main
from coordinator.cohorts.base import Absence
from coordinator.methods.base import Metrics
from coordinator.store.store import Store
from edge_sdk.protocol.messages import ExitResult, Holdout, Phase, Segment
from tests.support.examples import client, client_update, config
from tests.support.other_user import not_allowed_to_write

PREFIX = (Segment(first=1, last=1),)


@pytest.fixture
def run(tmp_path):
    """Two rounds: in the first b failed, the second was not evaluated."""
    folder = tmp_path / "run"
    store = Store.create(folder, config("owners-mean"), "serve")
    results = (
        ExitResult(exit=1, loss=0.75, metric=0.5),
        ExitResult(exit=2, loss=0.25, metric=0.875),
    )
    done = {"num_examples": 10, "exits": results, "phases": {"train": Phase(wall_s=2.5)}}
    told = [
        client_update(client("a", 2), {}, PREFIX, **done),
        Absence(client("b", 1), PREFIX, "failed", "training", "=1+1, and it diverged"),
    ]
    first = {"accuracy_exit_1": 0.5, "accuracy_exit_2": 0.75, "loss_exit_1": 0.75}
    second = {"loss_exit_1": math.nan, "loss_exit_10": 0.5}
    for round, (results_of, values) in enumerate(((told, first), ([], second)), 1):
        list(store.record_results(round, results_of))
        store.commit(round, Metrics(values), {}, "2026-01-01T00:00:00+00:00", 1.5)
    store.close()
    return folder


def table(text):
    return list(csv.DictReader(io.StringIO(text)))


def test_rounds_as_csv(run, capsys):
    with not_allowed_to_write(run):
        assert main(["history", str(run), "--csv"]) == 0
    first, second = table(capsys.readouterr().out)
    assert first["round"] == "1"
    assert first["wall_s"] == "1.5"
    assert first["failures"] == "1"
    assert (first["accuracy_exit_1"], first["accuracy_exit_2"]) == ("0.5", "0.75")
    assert second["accuracy_exit_1"] == "", "not evaluated"
    assert (second["loss_exit_1"], second["loss_exit_10"]) == ("", "0.5")
    assert [name for name in first if name.startswith("loss")] == [
        f"loss_exit_{exit}" for exit in range(1, 11)
    ]


def test_clients_as_csv_begin_no_formula(run, capsys):
    assert main(["history", str(run), "--csv", "--clients"]) == 0
    a, b = table(capsys.readouterr().out)
    assert (a["client_id"], a["outcome"], a["train_s"]) == ("a", "ok", "2.5")
    assert (a["loss_exit_2"], a["train_accuracy_exit_2"]) == ("0.25", "0.875")
    assert (b["outcome"], b["code"], b["loss_exit_1"]) == ("failed", "training", "")
    assert b["detail"] == "'=1+1, and it diverged"


def test_a_table_for_people(run, capsys):
    assert main(["history", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert lines[1].endswith("50.0 / 75.0         -"), "accuracy, and none served"
    assert main(["history", str(run), "--clients"]) == 0
    head, a, b = capsys.readouterr().out.splitlines()
    assert "0.75 / 0.25" in a
    assert b.endswith("=1+1, and it diverged")
    assert head.index("outcome") + len("outcome") == a.index("ok") + 2, "under its head"


def test_a_picture_has_a_line_for_each_exit(run, tmp_path, capsys):
    path = tmp_path / "new.svg"
    assert main(["history", str(run), "--plot", str(path)]) == 0
    assert str(path) in capsys.readouterr().out
    ElementTree.parse(path)
    text = path.read_text()
    assert text.count("<!-- exit 1 -->") == 2, "accuracy and loss"
    assert text.count("<!-- exit 2 -->") == 1
    assert text.count("<!-- exit 10 -->") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nowhere"], "nowhere holds no run; give the --run-dir"),
        (["RUN", "--plot", "x.txt"], "--plot x.txt, expected a name that ends in"),
        (["RUN", "--plot", "x.svg", "--clients"], "leave --clients out"),
        (
            ["RUN", "--plot", "/proc/x.svg"],
            "/proc/x.svg cannot be written: No such file",
        ),
    ],
)
def test_what_cannot_be_shown_is_one_line(run, flags, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["history", *(str(run) if flag == "RUN" else flag for flag in flags)]) in (1, 2)
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_run_without_rounds_says_so(tmp_path, capsys):
    Store.create(tmp_path, config("owners-mean"), "serve").close()
    assert main(["history", str(tmp_path)]) == 1
    assert "has no finished round yet" in capsys.readouterr().err


def test_holdouts_have_columns_where_some_client_had_one(tmp_path, capsys):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    held = Holdout(num_examples=8, metric=5 / 8, loss=0.5)
    told = [
        client_update(client(name, 1), {}, PREFIX, holdout=h)
        for name, h in (("a", held), ("b", None))
    ]
    list(store.record_results(1, told))
    values = {"holdout_accuracy": 0.625, "personal_accuracy": 0.0}
    store.commit(1, Metrics(values), {}, "2026-01-01T00:00:00+00:00", 1.5)
    store.close()
    assert main(["history", str(tmp_path)]) == 0
    head, row = capsys.readouterr().out.splitlines()
    assert head.split("  ")[-2:] == ["hold-out %", "own %"]
    assert row.split()[-2:] == ["62.5", "0.0"]
    assert main(["status", "--run-dir", str(tmp_path)]) in (0, 3, 4)
    assert "hold-out %  own %" in capsys.readouterr().out
    assert main(["history", str(tmp_path), "--csv", "--clients"]) == 0
    a, b = table(capsys.readouterr().out)
    names = ("holdout_accuracy", "holdout_num_examples", "holdout_loss")
    assert [a[name] for name in names] == ["0.625", "8", "0.5"]
    assert b["holdout_accuracy"] == ""
