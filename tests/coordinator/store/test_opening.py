"""A run that goes on: with more rounds, without what a kill left, never in another's folder."""

from __future__ import annotations

import os
import shutil

import pytest

from coordinator.config import AggregationOptions
from coordinator.store.database import DATABASE
from coordinator.store.opening import open_store
from coordinator.store.store import Store
from edge_sdk.data.contract import TrainedOn, scaling_of
from edge_sdk.errors import ConfigError, StoreError
from tests.coordinator.store.test_store import commit, update
from tests.support.examples import client, config


def settings(**changes):
    return config("owners-mean", **changes)


def finished_run(folder, rounds=2):
    store = open_store(folder, settings(rounds=rounds), "emulate", False)
    for number in range(1, rounds + 1):
        commit(store, number)
    store.close()


def test_a_finished_run_goes_on_with_more_rounds(tmp_path):
    finished_run(tmp_path)
    store = open_store(tmp_path, settings(rounds=5), "emulate", True)
    assert not store.is_finished
    assert store.next_round() == 3
    store.close()
    again = Store.resume(tmp_path)
    assert again.config.rounds == 5, "kept, also if it is killed now"
    again.close()


def test_what_refuses_updates_may_be_another(tmp_path):
    """A device that honestly moves far is let in without beginning anew."""
    finished_run(tmp_path)
    other = AggregationOptions(refuse_above=100.0)
    open_store(tmp_path, settings(rounds=2, aggregation=other), "emulate", True).close()
    again = Store.resume(tmp_path)
    assert again.config.aggregation.refuse_above == 100.0
    again.close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rounds": 1}, r"--rounds 2 \(now 1\)"),
        ({"rounds": 3, "lr": 0.5}, r"--lr 0.02 \(now 0.5\)"),
    ],
)
def test_nothing_else_may_differ(tmp_path, changes, said):
    finished_run(tmp_path)
    with pytest.raises(ConfigError, match=said):
        open_store(tmp_path, settings(**changes), "emulate", True)
    store = Store.resume(tmp_path)
    assert store.config.rounds == 2
    store.close()


def test_what_a_kill_left_is_deleted_at_resume(tmp_path):
    finished_run(tmp_path, rounds=3)
    left = ["round-000001.safetensors", "round-000004.safetensors", ".tmpA1b2C3"]
    for name in [*left, ".round-000004.safetensors.0.new", "mine.safetensors"]:
        (tmp_path / name).write_bytes(b"half")
    open_store(tmp_path, settings(rounds=3), "emulate", True).close()
    names = {path.name for path in tmp_path.iterdir()}
    kept = {"round-000002.safetensors", "round-000003.safetensors", "mine.safetensors"}
    assert {name for name in names if "round-" in name or "safetensors" in name} == kept
    assert ".tmpA1b2C3" not in names


@pytest.mark.parametrize("is_replaced", [False, True])
def test_nothing_is_written_into_a_folder_that_is_not_the_runs_any_more(tmp_path, is_replaced):
    folder = tmp_path / "run"
    store = open_store(folder, settings(rounds=5), "emulate", False)
    commit(store, 1)
    list(store.record_results(2, [update(client("a", 1))]))  # rows that are not committed yet
    shutil.rmtree(folder)
    other = None
    if is_replaced:
        other = open_store(folder, settings(rounds=5), "emulate", False)
        commit(other, 1)
        before = {path.name: path.stat().st_ino for path in folder.iterdir()}
        assert f"{DATABASE}-wal" in before
    for write in (
        lambda: commit(store, 2),
        lambda: store.begin(2, [client("a", 1)]),
        lambda: store.write_model(settings().model, {}),
        store.check_held,
    ):
        with pytest.raises(StoreError, match=f"{folder} was deleted or replaced"):
            write()
    store.close()
    if other is None:
        assert not folder.exists()
        return
    assert {path.name: path.stat().st_ino for path in folder.iterdir()} == before
    commit(other, 2)
    assert other.next_round() == 3
    other.close()
    assert os.listdir(folder)


PIXELS = TrainedOn(scaling=scaling_of(-1, 1, (127.5, 1.0)), class_names=("a", "b", "c"))


def test_a_run_of_a_version_that_did_not_note_its_data_goes_on(tmp_path):
    finished_run(tmp_path)
    store = open_store(tmp_path, settings(rounds=3, trained_on=PIXELS), "emulate", True)
    assert store.next_round() == 3
    store.close()


def test_a_run_whose_data_are_scaled_otherwise_now_does_not_go_on(tmp_path):
    open_store(tmp_path, settings(rounds=2, trained_on=PIXELS), "emulate", False).close()
    other = TrainedOn(scaling=scaling_of(0, 1, None), class_names=PIXELS.class_names)
    said = r"are integers / 127.5 - 1, those of its data now floats as given, 0 to 1; give the same"
    with pytest.raises(ConfigError, match=said):
        open_store(tmp_path, settings(rounds=2, trained_on=other), "emulate", True)


def test_what_the_data_hold_may_be_another_but_not_the_meaning_of_labels(tmp_path, caplog):
    open_store(tmp_path, settings(rounds=2, trained_on=PIXELS), "emulate", False).close()
    dark = TrainedOn(scaling=scaling_of(-1, -0.875, (127.5, 1.0)), class_names=PIXELS.class_names)
    open_store(tmp_path, settings(rounds=2, trained_on=dark), "emulate", True).close()
    assert "are 0 to 255, those of its data now 0 to 16; are they of one kind" in caplog.text
    again = Store.resume(tmp_path)
    assert again.config.trained_on == dark
    again.close()
    turned = TrainedOn(scaling=dark.scaling, class_names=PIXELS.class_names[::-1])
    with pytest.raises(ConfigError) as caught:
        open_store(tmp_path, settings(rounds=3, trained_on=turned), "emulate", True)
    told = (
        "class_names of --data (serve: --test) ('a', 'b', 'c') (now ('c', 'b', 'a')); resume with"
    )
    assert f"{tmp_path} was started with other settings: {told}" in str(caught.value)
