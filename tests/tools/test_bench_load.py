"""tools/bench/load.py: a real coordinator with three clients, and its arithmetic by hand."""

from __future__ import annotations

import csv
import os
import threading

import pytest

from tools.bench import load as bench
from tools.bench.load import Sample, Watch, check_counts, fast_s, model_width


@pytest.mark.parametrize("link", ["curve", "plain"])
def test_every_update_of_every_client_counts_once(tmp_path, capsys, link):
    target = tmp_path / "load.csv"
    flags = ["--clients", "3", "--megabytes", "1.2", "--rounds", "2", "--link", link]
    assert bench.main([*flags, "--csv", str(target), "--folder", str(tmp_path)]) == 0
    head, *lines = target.read_text().splitlines()
    assert head.startswith("# python -m tools.bench.load --clients 3 --megabytes 1.2 ")
    (row,) = csv.DictReader(lines)
    assert (row["clients"], row["link"], row["rounds"]) == ("3", link, "2")
    assert float(row["cpu_ms_per_update"]) >= 0 < float(row["round_s"])
    assert float(row["base_MB"]) <= float(row["peak_MB"])
    told = capsys.readouterr().err
    assert "'accepted': 6" in told
    assert "'models compared': 3, 'models wrong': 0" in told
    assert os.listdir(tmp_path) == ["load.csv"]  # nothing is left behind


def test_flags_after_two_dashes_go_to_the_coordinator(tmp_path):
    flags = ["--clients", "1", "--megabytes", "0.1", "--rounds", "1", "--folder", str(tmp_path)]
    with pytest.raises(SystemExit, match="does not listen"):
        bench.main([*flags, "--", "--no-such-flag"])


def test_a_model_is_as_large_as_asked_for():
    # 4 bytes x (1000 x 719 + 719 x 719 + 2 exits x 719 x 10) = 5,001,364
    assert model_width(5) == 719


def test_an_update_that_did_not_count_ends_the_bench():
    rounds = [{"round": 1, "wall_s": 1.0, "returned": 2, "phases": {}}]
    device = {"counts": {"accepted": 1}}
    check_counts([device, device], 2, 1, rounds)
    with pytest.raises(SystemExit, match=r"got \{'accepted': 1\}, expected 2 each"):
        check_counts([device, {"counts": {}}], 2, 1, rounds)
    with pytest.raises(SystemExit, match=r"got \{'models right': 1\}, expected 2 each"):
        check_counts([device, {"counts": {"accepted": 1, "models wrong": 1}}], 2, 1, rounds)


def test_cpu_seconds_between_samples_are_interpolated():
    watch = Watch.__new__(Watch)
    watch.thread = threading.Thread()
    watch.samples = [sample(10.0, 1.0), sample(11.0, 1.5), sample(13.0, 2.5)]
    # half way from 11 to 13: 1.5 + 0.5 x 1.0; before the first and after the last, their own
    assert [watch.cpu_at(at) for at in (9.0, 10.5, 12.0, 99.0)] == [1.0, 1.25, 2.0, 2.5]


def sample(utc_s: float, cpu_s: float) -> Sample:
    return Sample(utc_s, cpu_s, cpu_s / 2, 0, 0, 0)


def test_the_fast_ones_time_leaves_the_slow_and_the_first_round_out():
    given = {"1": 0.0, "2": 100.0, "3": 200.0}
    fast = {"is_slow": False, "given_at": given}
    devices = [
        fast | {"accepted_at": {"1": 50.0, "2": 104.0, "3": 203.0}},
        fast | {"accepted_at": {"1": 50.0, "2": 106.0, "3": 202.0}},
        {"is_slow": True, "given_at": given, "accepted_at": {"1": 9.0, "2": 190.0, "3": 209.0}},
    ]
    assert fast_s(devices, 1) == 3.0
    assert fast_s(devices, 0) == 6.0
