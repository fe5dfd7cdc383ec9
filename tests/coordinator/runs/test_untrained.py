"""Exits that no device has trained are told, and left out of what is exported."""

from __future__ import annotations

import logging

import pytest

from coordinator.cli.main import main
from coordinator.methods.base import Metrics
from coordinator.runs.untrained import deepest_trained, tell_untrained, untrained_exits
from coordinator.store.store import Store
from edge_sdk.infer.model_folder import read_model
from edge_sdk.protocol.messages import Segment
from tests.support.examples import client, client_update, config

EMULATE = ["emulate", "--data", "digits", "--examples", "80", "--clients", "3", "--model", "mlp"]
SMALL = [*EMULATE, "--rounds", "1", "--epochs", "1", "--option", "widths=8,8,8"]
WEAK = ["--groups", "3,0,0", "--method", "owners-mean"]


@pytest.mark.parametrize(
    ("trained", "untrained", "deepest"),
    [
        ([(1, 1)], [2, 3], 1),
        ([(1, 2)], [3], 2),
        ([(1, 1), (3, 3)], [2], 3),
        ([(1, 3)], [], 3),
    ],
)
def test_exits_of_which_no_segment_was_counted(tmp_path, trained, untrained, deepest):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    segments = tuple(Segment(first=first, last=last) for first, last in trained)
    list(store.record_results(1, [client_update(client("a", 3), {}, segments)]))
    store.commit(1, Metrics(), {}, "2026-01-01T00:00:00", 1.0)
    assert untrained_exits(store, 3) == untrained
    assert deepest_trained(untrained, 3) == deepest
    store.close()


def test_nothing_is_told_where_all_were_trained(caplog):
    tell_untrained([], 3)
    assert not caplog.text


def test_a_run_of_weak_devices_says_so_and_exports_what_was_trained(tmp_path, caplog):
    out, run = tmp_path / "model", tmp_path / "run"
    with caplog.at_level(logging.WARNING):
        assert main([*SMALL, *WEAK, "--run-dir", str(run), "--export", str(out)]) == 0
    assert "no device trained exit 2, 3 of 3" in caplog.text
    assert "use exits 1 to 1" in caplog.text
    assert read_model(out).spec.exit == 1
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "later")]) == 0
    assert read_model(tmp_path / "later").spec.exit == 1
    whole = ["export", "--run", str(run), "--out", str(tmp_path / "all"), "--exit", "3"]
    assert main(whole) == 0, "who asks for it gets it"
    assert read_model(tmp_path / "all").spec.exit == 3


def test_a_run_from_given_weights_knows_nothing_of_its_exits(tmp_path, caplog):
    first = tmp_path / "first"
    assert main([*SMALL, *WEAK, "--run-dir", str(first)]) == 0
    caplog.clear()
    init = ["--init", str(first / "model.safetensors")]
    assert main([*SMALL, *WEAK, *init, "--export", str(tmp_path / "model")]) == 0
    assert "no device trained" not in caplog.text
    assert read_model(tmp_path / "model").spec.exit == 3
