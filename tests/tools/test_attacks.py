"""The attack table over a real coordinator, for a few seconds."""

from __future__ import annotations

import os
import subprocess
import sys

from tools.attacks.peers import ATTACKS, WIDE
from tools.tables import ROOT, read_csv


def test_a_flood_is_borne_and_told_as_a_row(tmp_path):
    path = tmp_path / "attacks.csv"
    command = [sys.executable, "-m", "tools.attacks", "--only", "fault,join", "--seconds", "2"]
    done = subprocess.run(
        [*command, "--csv", str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    fault, join = read_csv(path)
    assert (fault["attack"], join["attack"]) == ("fault", "join")
    for row in (fault, join):
        assert float(row["rounds_per_s_without"]) > 0
        assert float(row["rounds_per_s"]) > 0
    assert float(fault["log_kB_per_s"]) < 100.0
    assert join["told"] == "the device is in"


def test_an_unknown_attack_is_said(tmp_path):
    command = [sys.executable, "-m", "tools.attacks", "--only", "nothing"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f"'nothing' is none of {', '.join(ATTACKS)}" in done.stderr


def test_the_wide_frame_is_one_that_is_decoded():
    assert 1_000_000 < len(WIDE) <= 1024 * 1023
