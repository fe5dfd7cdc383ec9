"""Why participants returned nothing: in the log, the error, --out and what status tells."""

from __future__ import annotations

import json

import pytest

from coordinator.cli.main import main
from coordinator.cli.status import described, look
from coordinator.cohorts.base import Absence
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.methods.registry import make_method
from coordinator.runs.asking import Reasons
from coordinator.runs.rounds import run_rounds
from coordinator.store.store import Store
from edge_sdk.errors import TrainerError
from edge_sdk.protocol.messages import Segment
from tests.support.examples import client, client_update, config, examples

FIRST = (Segment(first=1, last=1),)
EMULATE = [
    *("emulate", "--data", "digits", "--examples", "90", "--rounds", "2", "--epochs", "1"),
    *(
        "--clients",
        "3",
        "--groups",
        "1,1,1",
        "--lr",
        "1e6",
        "--optimizer",
        "sgd",
        "--batch-size",
        "4",
    ),
]


def absence(name, detail, code="trainer"):
    return Absence(client(name, 1), FIRST, "failed", code, detail)


def run_of(folder, shards):
    store = Store.create(folder, config("owners-mean", rounds=1), "emulate")
    store.lock()
    cohort = InProcessCohort(shards, dict.fromkeys(shards, 1), 3)
    try:
        run_rounds(store, make_method(store.config), cohort, None)
        return store.failures()
    finally:
        store.close()


def test_the_first_failure_of_each_kind_is_logged_and_all_are_counted(tmp_path, caplog):
    """b and c have too few examples, 1 and 0; d has other ones."""
    few = {"b": examples(1), "c": examples(0), "d": examples(9, shape=(1, 5, 5))}
    found = run_of(tmp_path, {"a": examples(12), **few})
    told = [r for r in caplog.records if getattr(r, "event", "") == "update_failed"]
    assert [(r.client, r.code) for r in told] == [("b", "data"), ("d", "data")]
    assert told[0].getMessage().startswith("round 1: b failed: data: this device's data holds 1 ")
    assert "local examples are (1, 5, 5), the model takes (1, 8, 8)" in told[1].getMessage()
    assert [(f.round, f.code, f.clients, f.client_id) for f in found] == [(1, "data", 3, "b")]


def test_a_run_of_which_nothing_came_says_why_and_keeps_it(tmp_path):
    with pytest.raises(TrainerError, match="3 times in a row; 2 failed: data: this device's data"):
        run_of(tmp_path, {"a": examples(1), "b": examples(0)})
    view = look(tmp_path)
    assert [(f.round, f.client_id, f.outcome, f.code) for f in view.failures] == [
        (1, "a", "failed", "data"),
        (1, "b", "failed", "data"),
    ]
    (line,) = (line for line in described(view, tmp_path) if line.startswith("round 1, b: "))
    assert line.startswith("round 1, b: failed: data: this device's data holds 0 examples")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_emulate_says_why(tmp_path, capsys, caplog, processes):
    out, folder = tmp_path / "out.json", tmp_path / "run"
    flags = ["--processes", processes, "--out", str(out), "--run-dir", str(folder)]
    assert main([*EMULATE, *flags]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert "none of 3 participants returned an update, 3 times in a row; " in said
    assert "holds NaN or infinite values" in said or "is not finite" in said
    assert any(getattr(record, "event", "") == "update_failed" for record in caplog.records)
    content = json.loads(out.read_text())
    assert content["rounds"] == []
    assert sum(kind["clients"] for kind in content["failures"]) >= 3
    assert content["error"] in said
    assert len(look(folder).failures) == 3


def test_details_that_differ_in_figures_or_by_the_clients_name_are_one_kind():
    reasons = Reasons(1)
    assert reasons.note(absence("a", "loss of a is 1.5 after 3 steps"))
    assert not reasons.note(absence("b", "loss of b is 2 after 11 steps"))
    assert reasons.note(absence("c", "loss of c is 2 after 11 steps", code="data"))
    for name in "def":
        reasons.note(absence(name, f"{name * 3}!", code=name))
    assert str(reasons) == (
        "2 failed: trainer: loss of a is 1.5 after 3 steps; "
        "1 failed: data: loss of c is 2 after 11 steps; 1 failed: d: ddd!; and 2 other reasons"
    )
    assert str(Reasons(1)) == "no reason was told"


def test_of_a_round_that_is_not_finished_only_absences_are_kept(tmp_path):
    """The update is asked for again, and must not be there twice."""
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    store.lock()
    update = client_update(client("a", 1), {}, FIRST, num_examples=10)
    list(store.record_results(1, [update, absence("b", "why")]))
    store.close()
    again = Store.resume(tmp_path)
    assert again.next_round() == 1
    assert again.trained() == []
    assert again._db.execute("SELECT COUNT(*) FROM phases").fetchone() == (0,)
    assert [(f.client_id, f.detail) for f in again.failures()] == [("b", "why")]
    list(again.record_results(1, [update, client_update(client("b", 1), {}, FIRST)]))
    assert len(again.trained()) == 2
    assert again.failures() == [], "b returned after all"
    again.close()
