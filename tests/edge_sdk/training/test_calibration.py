"""The calibration of a device: fit by hand, cache, and what it reads of this process."""

import logging
import subprocess
import sys

import msgspec
import pytest
import torch

from edge_sdk.capacity.counting import of_whole_step, segment_costs
from edge_sdk.hardware import process_memory
from edge_sdk.models import build
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.training import calibration
from edge_sdk.training.calibration import (
    MemoryCalibration,
    fit,
    made_with,
    memory_calibration,
    own_file,
)

MB = 10**6
# An agent's trainer again and again, with probes whose slope tells its number of threads.
AGENT = """
import sys, torch
from pathlib import Path
from edge_sdk.training import calibration
threads = int(sys.argv[2])
torch.set_num_threads(threads)
calibration._probe = lambda: iter([(0, 10**7), (10**7, 10**7 * (2 + threads))])
for _ in range(200):
    found = calibration.memory_calibration(Path(sys.argv[1]), "cpu", may_measure=True)
    assert round(found.allowance, 6) == 1 + threads, found
    assert f" {threads} threads" in found.made_with, found
    calibration.own_file(Path(sys.argv[1]), found.made_with).unlink(missing_ok=True)
"""
MiB = 1024**2


def test_fit_by_hand():
    # the line through both is 1.2 x + 8 MB: nothing is off
    assert fit([(10 * MB, 20 * MB), (20 * MB, 32 * MB)]) == pytest.approx((1.2, 8 * MB, 0.0))


def test_no_probe_lies_above_the_fitted_line():
    slope, scratch, error = fit([(10 * MB, 20 * MB), (20 * MB, 38 * MB), (30 * MB, 44 * MB)])
    # least squares: 1.2 x + 10 MB, of which the middle one is 4 MB above, the outer ones 2 below;
    # raised to 14 MB both are 6 below, of 50 for the largest
    assert (slope, scratch) == (pytest.approx(1.2), pytest.approx(14 * MB))
    assert error == pytest.approx(6 / 50)


def test_what_is_counted_is_there():
    slope, scratch, error = fit([(10 * MB, 25 * MB), (30 * MB, 35 * MB)])  # a slope of 0.5
    assert (slope, scratch) == (1.0, 15 * MB)
    assert error == pytest.approx(10 / 45)


def test_scratch_is_at_least_that_of_new_shapes():
    assert fit([(10 * MB, 10 * MB), (20 * MB, 20 * MB)])[1] == calibration.SCRATCH_BYTES


@pytest.fixture
def probes(monkeypatch):
    """Three probes of a slope of 1.2 and 8 MB; says how often they were made."""
    made = []

    def probe():
        made.append(1)
        return iter([(10 * MB, 20 * MB), (20 * MB, 32 * MB)])

    monkeypatch.setattr(calibration, "_probe", probe)
    return made


def test_made_once_and_kept_until_torch_or_board_change(tmp_path, probes, monkeypatch):
    cache = tmp_path / "cache" / "calibration.json"
    first = memory_calibration(cache, "cpu", may_measure=True)
    assert (first.allowance, first.scratch_bytes) == (pytest.approx(1.2), 8 * MB)
    assert memory_calibration(cache, "cpu", may_measure=True) == first
    assert memory_calibration(cache, "cpu", may_measure=False) == first  # a trainer started again
    assert len(probes) == 1
    monkeypatch.setattr(calibration.torch, "__version__", "9.9")
    assert "torch 9.9" in memory_calibration(cache, "cpu", may_measure=True).made_with
    assert len(probes) == 2
    monkeypatch.setattr(calibration, "board_name", lambda: ("raspberry-pi-4", "Pi 4 B"))
    assert "Pi 4 B" in memory_calibration(cache, "cpu", may_measure=True).made_with
    assert len(probes) == 3


def test_agents_with_one_folder_keep_their_own_figures(tmp_path):
    """Two by two with equal settings; each writes, reads and removes while the others do."""
    cache = tmp_path / "calibration.json"
    agents = [
        subprocess.Popen(
            [sys.executable, "-c", AGENT, str(cache), str(threads)], stderr=subprocess.PIPE
        )
        for threads in (1, 1, 2, 2)
    ]
    said = [agent.communicate(timeout=120)[1].decode() for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * 4, said
    assert not any("cannot be used" in text or "not kept" in text for text in said), said
    assert len({own_file(cache, name) for name in ("of one", "of another")}) == 2


def test_a_calibration_is_of_one_processor(tmp_path, probes, monkeypatch):
    """A home may lie on several machines that are alike but for it."""
    cache = tmp_path / "calibration.json"
    memory_calibration(cache, "cpu", may_measure=True)
    monkeypatch.setattr(calibration, "processor", lambda: "another one")
    assert "another one" in memory_calibration(cache, "cpu", may_measure=True).made_with
    assert len(probes) == 2
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2, "the first is not overwritten"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"made_with": "x", "allowance": 0.5}', b"[1]", b'{"made_with": "\xff"}'],
)
def test_a_file_that_cannot_be_used_is_replaced(tmp_path, probes, content, caplog):
    cache = tmp_path / "calibration.json"
    file = own_file(cache, made_with("cpu"))
    file.write_bytes(content)
    made = memory_calibration(cache, "cpu", may_measure=True)
    assert msgspec.json.decode(file.read_bytes(), type=MemoryCalibration) == made
    assert f"calibration {file} cannot be used and is made again" in caplog.text


def test_a_folder_that_cannot_be_written_costs_the_next_start_a_calibration(
    tmp_path, probes, caplog
):
    (tmp_path / "file").write_text("")
    made = memory_calibration(tmp_path / "file" / "calibration.json", "cpu", may_measure=True)
    assert made.scratch_bytes == 8 * MB
    assert "calibration not kept, the next start makes it again" in caplog.text


@pytest.mark.parametrize(("device", "may_measure"), [("cpu", False), ("cuda", True)])
def test_figures_from_elsewhere_where_nothing_is_measured(tmp_path, probes, device, may_measure):
    cache = tmp_path / "calibration.json"
    made = memory_calibration(cache, device, may_measure=may_measure)
    assert made == MemoryCalibration(made_with=made.made_with)
    assert not probes
    assert not list(tmp_path.iterdir())


def test_nothing_is_measured_where_memory_is_short(monkeypatch, caplog):
    monkeypatch.setattr(calibration, "memory", lambda: (0, 100 * MiB, "host"))
    made = memory_calibration(None, "cpu", may_measure=True)
    assert made.allowance == calibration.ALLOWANCE
    assert "too little free memory to calibrate" in caplog.text


def test_a_trial_trainer_needs_more_than_its_scratch(tmp_path, probes, caplog):
    caplog.set_level(logging.INFO)
    found = calibration.trainer_baseline(tmp_path / "calibration.json")
    assert found.allowance == pytest.approx(1.2)
    assert 50 * MB < found.runtime_bytes - 8 * MB <= process_memory.resident_bytes() + 50 * MB
    assert "calibrated: memory of a step is 1.20 of what is counted and 7.6 MiB" in caplog.text


SMAPS = """\
7f00-7f10 r-xp 00000000 08:01 42                         /lib/libtorch.so
Rss:                 100 kB
Referenced:           30 kB
Anonymous:            10 kB
VmFlags: rd ex mr
7f10-7f20 rw-p 00000000 00:00 0                          [heap]
Rss:                 500 kB
Referenced:            0 kB
Anonymous:           500 kB
7f20-7f30 r--p 00000000 08:01 43 /lib/lib with a blank.so
Rss:                  20 kB
Referenced:            0 kB
Anonymous:             0 kB
"""


def test_idle_library_bytes_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(process_memory, "SELF", tmp_path)
    done = []

    def work():
        assert (tmp_path / "clear_refs").read_text() == "3"  # forgotten before, not after
        done.append(1)

    (tmp_path / "smaps").write_text(SMAPS)
    # of 120 kB of files 10 are private copies and 30 were touched; the heap is no file
    assert process_memory.idle_library_bytes(work) == 80 * 1024
    assert done


def test_zeros_where_the_system_does_not_tell(tmp_path, monkeypatch):
    monkeypatch.setattr(process_memory, "SELF", tmp_path / "absent")
    assert process_memory.idle_library_bytes(pytest.fail) == 0
    assert (process_memory.peak_bytes(), process_memory.resident_bytes()) == (0, 0)
    process_memory.reset_peak()


def test_peak_of_a_block_that_is_gone():
    process_memory.reset_peak()
    before = process_memory.peak_bytes()
    if not before:
        pytest.skip("this kernel does not tell a process's peak memory")
    block = bytearray(64 * MiB)
    block[::4096] = b"x" * len(block[::4096])
    del block
    assert process_memory.peak_bytes() - before > 60 * MiB
    process_memory.reset_peak()
    assert process_memory.peak_bytes() - before < 30 * MiB


def test_a_probe_is_counted_like_a_job():
    spec = ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=2, exit=2)
    plan = Plan(segments=(Segment(first=1, last=2),), batch_size=32, optimizer="adam")
    cost = next(c for c in segment_costs(spec, plan, 32, 0) if (c.first, c.last) == (1, 2))
    held, step = of_whole_step(build(spec), plan, torch.zeros(32, 1, 8, 8))
    assert held == cost.parameter_bytes + cost.optimizer_bytes
    assert step == cost.gradient_bytes + max(moment.at(32, 1) for moment in cost.moments)
