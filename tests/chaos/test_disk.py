"""The run folder's disk is full, read-only, or gives up under the coordinator."""

from __future__ import annotations

from pathlib import Path

from tests.chaos.bed import Bed, bed_of
from tests.chaos.conftest import Scenario


def test_disk_full(tmp_path: Path, scenario: Scenario) -> None:
    """A small tmpfs is filled up in the middle of an upload. The coordinator stops and says why;
    with space again it goes on, and what had been accepted counts."""
    with bed_of(tmp_path, 2, "--epochs", "6", mount="tmpfs", mount_mib=64) as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.forget()
        round = bed.wait_phase("a", "upload", is_cut=False)
        bed.fill_disk()
        said = stopped_cleanly(bed)
        assert "No space left" in said or "full" in said, said
        bed.free_disk()
        bed.serve_until_listening()
        scenario.checked.append(said)
        scenario.check(bed, round, round + 1)
        assert bed.outcomes("a")[round] == "ok"


def test_disk_becomes_read_only(tmp_path: Path, scenario: Scenario) -> None:
    """An error of the file system, after which the kernel lets nothing be written, as with a worn
    SD card. Then the disk is mounted again, as after a repair."""
    with bed_of(tmp_path, 2, "--epochs", "6", mount="ext4", mount_mib=64) as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.forget()
        round = bed.wait_phase("a", "upload", is_cut=False)
        bed.remount("abort")
        scenario.checked.append(stopped_cleanly(bed))
        bed.mount_again()
        bed.serve_until_listening()
        scenario.check(bed, round, round + 1)


def test_start_on_a_read_only_disk(tmp_path: Path, scenario: Scenario) -> None:
    """Nothing is begun, and devices wait."""
    with bed_of(tmp_path, 2, "--epochs", "6", mount="tmpfs", mount_mib=64) as bed:
        bed.start_all()
        bed.wait_round(1)
        bed.kill_server()
        bed.remount("ro")
        bed.serve()
        scenario.checked.append(stopped_cleanly(bed))
        bed.remount("rw")
        bed.serve_until_listening()
        round = bed.last_round() + 1
        scenario.check(bed, round, round + 1)


def stopped_cleanly(bed: Bed) -> str:
    """What the coordinator said as it ended by itself: one line, with the place, no traceback."""
    assert bed.server is not None
    status = bed.server.end()
    lines = bed.server.text().splitlines()
    assert status == 1, lines
    assert not bed.server.said("Traceback"), lines
    assert lines[-1].startswith("edge-coordinator: "), lines
    assert str(bed.run_dir) in lines[-1], lines
    assert all(agent.is_alive for agent in bed.agents.values()), "a device ended as well"
    return lines[-1].replace(f"{bed.run_dir}/", "RUN/").replace(str(bed.run_dir), "RUN")
