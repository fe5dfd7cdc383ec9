"""What is read from a run's database: every figure worked out by hand from what was recorded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace

from coordinator.cohorts.base import Client
from coordinator.methods.base import Metrics
from coordinator.store.store import Store
from edge_sdk.protocol.messages import DeviceProfile
from tests.support.recorded_run import CONFIG, commit, record_run, update
from tools.testbed.progress import rounds_after
from tools.testbed.run_report import (
    Figure,
    Levers,
    PhaseTime,
    Platform,
    Summary,
    Trained,
    nearest_rank,
    read_run,
    split_segments,
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = record_run(tmp_path / "run #1?")  # a folder with a URI's characters
    yield store
    store.close()


def platforms(store: Store) -> tuple[Platform, Platform, Platform]:
    nano, real, pi = read_run(store.folder).platforms  # by name, real before emulated
    assert (nano.platform, nano.is_emulated) == ("jetson-nano", True)
    assert (real.platform, real.is_emulated) == ("raspberry-pi-4", False)
    assert (pi.platform, pi.is_emulated) == ("raspberry-pi-4", True)
    return nano, real, pi


def check(time: PhaseTime, board: list[float], wall: list[float]) -> None:
    """board, wall: p50, p95 and max, or nothing."""
    for summary, figures in ((time.board, board), (time.wall, wall)):
        found = [v for v in (summary.p50_s, summary.p95_s, summary.max_s) if v is not None]
        assert found == pytest.approx(figures), time.phase


def test_nearest_rank():
    five = [50.0, 15.0, 40.0, 20.0, 35.0]  # sorted: 15 20 35 40 50
    assert nearest_rank(five, 5) == 15.0  # ceil(0.25) = 1st
    assert nearest_rank(five, 30) == 20.0  # ceil(1.5) = 2nd
    assert nearest_rank(five, 40) == 20.0  # 2 exactly
    assert nearest_rank(five, 50) == 35.0  # ceil(2.5) = 3rd
    assert nearest_rank(five, 95) == 50.0  # ceil(4.75) = 5th
    assert nearest_rank(five, 0) == 15.0
    assert nearest_rank([7.0], 95) == 7.0
    assert nearest_rank(range(1, 21), 95) == 19  # 0.95 x 20 = 19 exactly, not the 20th
    assert nearest_rank(range(1, 101), 95) == 95


def test_split_segments():
    assert split_segments("1-2") == (2, [])
    assert split_segments("1-1,3-3") == (1, [3])
    assert split_segments("1-1,2-2") == (1, [2])  # next to the prefix, yet trained alone
    assert split_segments("2-3") == (0, [2, 3])
    assert split_segments("") == (0, [])


def test_emulated_board_seconds(store: Store):
    _, _, pi = platforms(store)
    wait, download, load, train, upload = pi.phases
    # of two values the median by nearest rank is the lower: ceil(0.5 x 2) = 1st
    check(wait, [3.0, 5.0, 5.0], [3.0, 5.0, 5.0])
    # 5e6 bytes x 8 / 20e6 = 2 s, 10e6 bytes: 4 s
    check(download, [2.0, 4.0, 4.0], [0.01, 0.03, 0.03])
    check(load, [0.25, 0.5, 0.5], [0.2, 0.4, 0.4])  # CPU 0.1 and 0.2 s x 2.5
    check(train, [2.5, 5.0, 5.0], [2.0, 3.0, 3.0])  # CPU 1 and 2 s x 2.5
    check(upload, [1.0, 2.0, 2.0], [0.02, 0.04, 0.04])  # 2.5e6 and 5e6 bytes
    sources = ["wall clock", "bytes / link", "CPU x scale", "CPU x scale", "bytes / link"]
    assert [time.source for time in pi.phases] == sources
    assert [time.board.count for time in pi.phases] == [2, 2, 2, 2, 2]


def test_not_measured_is_never_zero(store: Store):
    """NANO's trainer gave no CPU seconds; it never waited, loaded or uploaded on record."""
    nano, _, _ = platforms(store)
    wait, download, load, train, upload = nano.phases
    assert wait.board == load.board == upload.board == Summary(0, None, None, None)
    check(download, [1.0, 1.0, 1.0], [0.04, 0.04, 0.04])  # 10e6 x 8 / 80e6; absences: no phases
    check(train, [], [4.0, 4.0, 4.0])
    assert (train.board.count, train.wall.count) == (0, 1)
    assert nano.totals.peak_memory_bytes is None


def test_real_board_is_wall_clock(store: Store):
    _, real, _ = platforms(store)
    wait, download, _, train, _ = real.phases
    check(wait, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    check(download, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    check(train, [6.0, 8.0, 8.0], [6.0, 8.0, 8.0])  # its CPU seconds, 18 and 20, play no part
    assert {time.source for time in real.phases} == {"wall clock"}


def test_board_without_scale_and_link_has_no_seconds(tmp_path: Path):
    bare = Client(
        "bare",
        1,
        profile=DeviceProfile(
            platform="generic",
            memory_total_bytes=1,
            memory_available_bytes=1,
            cores=1.0,
            gflops=1.0,
            is_emulated=True,
        ),
    )
    store = Store.create(tmp_path, CONFIG, "serve")
    store.record_clients([bare])
    list(
        store.record_results(
            1, [update(bare, (1,), 8, 8, 1, download=(1.0, 1.0), train=(2.0, 2.0))]
        )
    )
    commit(store, 1)
    store.close()
    _, download, _, train, _ = read_run(tmp_path).platforms[0].phases
    check(download, [], [1.0, 1.0, 1.0])
    check(train, [], [2.0, 2.0, 2.0])


def test_server_phases(store: Store):
    fit, generate, aggregate, evaluate, checkpoint = read_run(store.folder).server
    check(aggregate, [0.4, 0.6, 0.6], [0.4, 0.6, 0.6])  # of 0.2 0.4 0.6: 2nd and 3rd
    assert fit.board.count == generate.board.count == evaluate.board.count == 0
    assert checkpoint.board.count == 3  # the store's own


def test_counts_bytes_and_memory(store: Store):
    nano, real, pi = (platform.totals for platform in platforms(store))
    everything = read_run(store.folder).totals
    assert [t.participations for t in (nano, real, pi, everything)] == [3, 3, 3, 9]
    assert [t.returned for t in (nano, real, pi, everything)] == [1, 2, 2, 5]
    assert [t.stragglers for t in (nano, real, pi, everything)] == [1, 0, 0, 1]
    assert [t.retries for t in (nano, real, pi, everything)] == [0, 3, 0, 3]
    assert (nano.failures, real.failures, pi.failures) == ({"gone": 1}, {"trainer": 1}, {"gone": 1})
    assert everything.failures == {"gone": 2, "trainer": 1}
    # down: PI 5 + 10 + 0, NANO 10 + 2 + 4, REAL 1 + 1 + 3 MB; 3 participations, 3 rounds
    assert pi.bytes_down_each == pi.bytes_down_a_round == 5e6
    assert nano.bytes_down_each == pytest.approx(16e6 / 3)
    assert everything.bytes_down_each == 4e6  # 36 MB / 9
    assert everything.bytes_down_a_round == 12e6  # 36 MB / 3
    # up: PI 2.5 + 5, NANO 5, REAL 1 + 3 MB
    assert pi.bytes_up_each == 2.5e6
    assert everything.bytes_up_each == pytest.approx(16.5e6 / 9)
    assert everything.bytes_up_a_round == 5.5e6
    assert (real.peak_memory_bytes, pi.peak_memory_bytes) == (700, 500)


def test_who_trained_what(store: Store):
    nano, real, pi = platforms(store)
    # stage, is_alone, clients, updates; absences trained nothing
    assert pi.trained == [
        Trained(1, False, 1, 2),
        Trained(2, True, 1, 1),  # round 2: exit 1 and stage 2
        Trained(3, True, 1, 1),  # round 1: exit 1 and stage 3
    ]
    assert nano.trained == [Trained(3, False, 1, 1)]
    assert real.trained == [Trained(2, False, 1, 2)]


def test_who_saved_memory(store: Store):
    """An absence tells nothing; round 4 is not finished."""
    nano, real, pi = platforms(store)
    assert pi.levers == [Levers("pi", 2, in_parts=2, smallest_part=8, recomputed=1)]
    assert nano.levers == [Levers("nano", 1, in_parts=0, smallest_part=None, recomputed=0)]
    assert real.levers == [Levers("real", 2, in_parts=0, smallest_part=None, recomputed=1)]


def test_accuracy_and_figures(store: Store):
    report = read_run(store.folder)
    assert report.tested == [
        Figure("exit 1", first_round=1, first=0.2, last_round=3, last=0.5, served_last=0.4),
        Figure("exit 2", first_round=1, first=0.3, last_round=3, last=0.7, served_last=None),
    ]
    assert report.figures == {"error": 0.25, "gap": None}  # of round 3


def test_a_method_without_a_model_for_all_has_the_accuracy_of_holdouts(store: Store):
    values = {"holdout_accuracy": 0.75}
    store.commit(4, Metrics(values), {"w": torch.zeros(1)}, "2026-01-01T00:00:00+00:00", 1.0)
    own = Figure("hold-outs, as received", 4, 0.75, 4, 0.75, None)
    assert read_run(store.folder).tested[-1] == own
    assert rounds_after(store.folder, 3) == [(4, "on hold-outs 75.0 %")]
    (last,) = rounds_after(store.folder, 2)[:1]
    assert last == (3, "served accuracy per exit 40.0 %")


def test_the_metric_is_that_of_the_runs_task(tmp_path: Path):
    """An error has no per cent."""
    config = replace(CONFIG, model=replace(CONFIG.model, task="regress", num_classes=1))
    store = Store.create(tmp_path / "run", config, "serve")
    values = {"rmse_exit_1": 2.5, "rmse_served_exit_1": 2.25, "holdout_rmse": 3.0}
    store.begin(1, [])
    store.commit(1, Metrics(values), {"w": torch.zeros(1)}, "2026-01-01T00:00:00+00:00", 1.0)
    assert read_run(store.folder).tested == [
        Figure("exit 1", 1, 2.5, 1, 2.5, 2.25),
        Figure("hold-outs, as received", 1, 3.0, 1, 3.0, None),
    ]
    said = "served RMSE per exit 2.25, on hold-outs 3"
    assert rounds_after(store.folder, 0) == [(1, said)]
    store.close()


def test_run_in_progress(store: Store):
    """The writer has a transaction open: finished rounds are shown, then the next commit's."""
    report = read_run(store.folder)
    assert (report.run, report.kind, report.method) == (store.run, "serve", "stage-rotation")
    assert (report.rounds, report.rounds_planned) == (3, 5)
    store.commit(4, Metrics(), {"w": torch.zeros(1)}, "2026-01-01T00:00:00+00:00", 1.0)
    assert read_run(store.folder).rounds == 4
