"""From which checkpoint a run goes on: the newest of which that can be said."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import save_file

from coordinator.store.checkpoints import MOST, unsound
from coordinator.store.opening import open_store
from coordinator.store.store import SPOOL
from edge_sdk.errors import StoreError
from tests.coordinator.store.test_opening import finished_run, settings
from tests.support.processes import read_rows

INF = float("inf")


@pytest.mark.parametrize(
    ("name", "values", "is_sound"),
    [
        ("w", [1.0, -1.0], True),
        ("w", [MOST / 2], True),
        ("w", [2e18], False),  # a share of 1e20, which an earlier version let in
        ("w", [float("nan"), 1.0], False),
        ("w", [1.0, -INF], False),
        ("average/stages.0.1.running_var", [0.0, 1.0], True),
        ("average/stages.0.1.running_var", [1.0, -1e-9], False),
        ("average/stages.0.1.running_mean", [-1.0], True),
        ("empty", [], True),
    ],
)
def test_what_a_run_can_go_on_from(name, values, is_sound):
    why = unsound({"count": torch.tensor(2**62), name: torch.tensor(values)})
    assert (why == "") is is_sound
    assert is_sound or why.startswith(f"{name} reaches from ")


def test_norms_in_float64_may_be_large_and_half_precision_is_looked_at():
    assert unsound({"clip": torch.tensor([1e300], dtype=torch.float64)}) == ""
    assert unsound({"clip": torch.tensor([INF], dtype=torch.float64)})
    assert unsound({"basis": torch.tensor([INF], dtype=torch.float16)})


BAD = {
    "poisoned": lambda path: save_file({"w": torch.tensor([2e18])}, path),
    "cut short": lambda path: path.write_bytes(b"abc"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD)
def test_resume_goes_back_to_the_last_sound_checkpoint_and_says_so(tmp_path, caplog, spoil):
    finished_run(tmp_path, rounds=3)
    (tmp_path / SPOOL).mkdir()
    (tmp_path / SPOOL / "0000000003-a.json").write_text("{}")
    spoil(tmp_path / "round-000003.safetensors")
    with caplog.at_level(logging.INFO):
        store = open_store(tmp_path, settings(rounds=3), "emulate", True)
    assert store.next_round() == 3
    assert store.load_checkpoint()["w"].item() == 2.0
    store.close()
    assert "round-000003.safetensors" in caplog.text
    assert "round 3 and later are forgotten" in caplog.text
    assert "going on after round 2, from round-000002.safetensors" in caplog.text
    assert not list((tmp_path / SPOOL).iterdir())
    assert read_rows(tmp_path, "SELECT MAX(round) FROM participations") in ([(2,)], [(None,)])


def test_a_run_without_a_sound_checkpoint_says_so_and_is_left_as_it_is(tmp_path):
    finished_run(tmp_path, rounds=3)
    for number in (2, 3):
        save_file({"w": torch.tensor([2e18])}, tmp_path / f"round-00000{number}.safetensors")
    with pytest.raises(StoreError, match=r"000003.* is of no use: w .*000002.* start anot"):
        open_store(tmp_path, settings(rounds=3), "emulate", True)
    assert read_rows(tmp_path, "SELECT COUNT(*) FROM rounds") == [(3,)]


def test_a_sound_run_says_from_what_it_goes_on(tmp_path, caplog):
    finished_run(tmp_path, rounds=3)
    with caplog.at_level(logging.INFO):
        open_store(tmp_path, settings(rounds=5), "emulate", True).close()
    assert "going on after round 3, from round-000003.safetensors" in caplog.text
    assert "forgotten" not in caplog.text
