"""The choice under a real memory limit: what is chosen trains, what is too large dies."""

import os
import sysconfig

import pytest
from msgspec.structs import replace

from tools.bench import choice
from tools.bench.choice import GROUPS, Bench

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    if os.geteuid() != 0 or not (GROUPS / "memory.limit_in_bytes").exists():
        pytest.skip("needs root and the memory controller of cgroup version 1")
    folder = tmp_path_factory.mktemp("choice")
    (folder / "site").symlink_to(sysconfig.get_path("purelib"))  # tools/bench/choice.py copies it
    return Bench(folder, patience_s=300.0)


@pytest.fixture(scope="module")
def task(bench):
    return bench.prepare("vgg", 32)


def test_a_device_with_room_trains_the_whole_model(bench, task):
    found = bench.run(task, None)
    assert found["trained"] == [[1, 3]]
    assert 0.8 <= found["predicted_bytes"] / found["peak_bytes"] <= 1.2


@pytest.mark.parametrize("limit_mb", [330, 400])
def test_what_is_chosen_under_a_limit_trains(bench, task, limit_mb):
    found = bench.run(task, limit_mb)
    assert "died" not in found
    assert found["available_bytes"] < limit_mb * choice.MB
    assert found["predicted_bytes"] <= found["available_bytes"]
    assert [1, 3] not in found["trained"]  # the whole does not fit
    assert not next(row for row in found["rows"] if row["last"] == 3)["is_feasible"]


def test_what_does_not_fit_dies_and_is_told(bench, task):
    told = bench.run(replace(task, forced=[(1, 3)]), 330)
    assert "signal 9" in told["died"] or "not done" in told["died"]


def test_no_group_is_left():
    assert not list(GROUPS.glob(f"edge-sdk-choice-{os.getpid()}-*"))
