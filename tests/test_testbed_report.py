"""The report of a run: every figure worked out by hand from what was recorded."""

from __future__ import annotations

import csv
import json
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from coordinator.cli import main as coordinator
from coordinator.cohort import Absence, Client, ClientUpdate
from coordinator.config import RunConfig
from coordinator.methods.base import Metrics
from coordinator.store import Store
from edge_sdk.profile import DeviceProfile
from edge_sdk.wire import ExitResult, ModelSpec, Phase, Segment
from tools.testbed_report import (
    Accuracy,
    PhaseTime,
    Platform,
    Summary,
    Trained,
    main,
    nearest_rank,
    print_table,
    read_run,
    split_segments,
)

ROOT = Path(__file__).resolve().parent.parent
CONFIG = RunConfig(
    method="stage-rotation",
    model=ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=10, exit=3),
    rounds=5,
)


def client(name: str, platform: str, exit: int, scale: float = 0, link: float = 0) -> Client:
    """scale: cpu_scale of an emulated board; 0: a real one."""
    profile = DeviceProfile(
        platform=platform,
        memory_total_bytes=2**31,
        memory_available_bytes=2**30,
        cores=4.0,
        gflops=10.0,
        link_mbit_s=link or None,
        is_emulated=scale > 0,
        cpu_scale=scale or None,
    )
    return Client(name, exit, num_examples=10, profile=profile)


PI_4 = "raspberry-pi-4"
PI = client("pi", PI_4, 1, scale=2.5, link=20.0)
NANO = client("nano", "jetson-nano", 3, scale=0.5, link=80.0)
REAL = client("real", PI_4, 2)  # of PI's platform, to be kept apart from it


def segments(of: Client, stages: tuple[int, ...]) -> tuple[Segment, ...]:
    """The client's own prefix, then every deeper stage alone."""
    prefix = max((stage for stage in stages if stage <= of.exit), default=0)
    deeper = [Segment(first=stage, last=stage) for stage in stages if stage > of.exit]
    return (*([Segment(first=1, last=prefix)] if prefix else []), *deeper)


def absence(of: Client, outcome: str, code: str, detail: str, down: int = 0) -> Absence:
    return Absence(of, segments(of, (of.exit,)), outcome, code, detail, bytes_down=down)


def update(
    of: Client, stages: tuple[int, ...], down: int, up: int, memory: int, retries: int = 0, /,
    **times: tuple[float, float | None],
) -> ClientUpdate:  # fmt: skip
    """down, up: bytes. times: wall and CPU seconds by phase."""
    return ClientUpdate(
        client=of,
        tensors={},
        segments=segments(of, stages),
        num_examples=10,
        num_steps=1,
        exits=tuple(ExitResult(exit=stage, loss=1.0, accuracy=0.5) for stage in stages),
        phases={name: Phase(wall_s=wall, cpu_s=cpu) for name, (wall, cpu) in times.items()},
        peak_memory_bytes=memory,
        bytes_down=down,
        bytes_up=up,
        retries=retries,
    )


ROUNDS: tuple[tuple[ClientUpdate | Absence, ...], ...] = (
    (
        update(PI, (1, 3), 5_000_000, 2_500_000, 300, wait=(3.0, None), download=(0.01, 0.001),
               load=(0.2, 0.1), train=(2.0, 1.0), upload=(0.02, None)),
        update(NANO, (1, 2, 3), 10_000_000, 5_000_000, 0, download=(0.04, None),
               train=(4.0, None)),
        update(REAL, (1, 2), 1_000_000, 1_000_000, 700, 1, wait=(1.0, None), download=(0.5, 0.1),
               load=(0.3, 0.2), train=(8.0, 20.0), upload=(0.7, None)),
    ),
    (
        update(PI, (1, 2), 10_000_000, 5_000_000, 500, wait=(5.0, None), download=(0.03, 0.001),
               load=(0.4, 0.2), train=(3.0, 2.0), upload=(0.04, None)),
        absence(NANO, "straggler", "late", "did not return in time", 2_000_000),
        absence(REAL, "failed", "trainer", "killed", 1_000_000),
    ),
    (
        absence(PI, "failed", "gone", "said nothing"),
        absence(NANO, "failed", "gone", "said nothing", 4_000_000),
        update(REAL, (1, 2), 3_000_000, 3_000_000, 600, 2, train=(6.0, 18.0)),
    ),
)  # fmt: skip
# accuracy in rounds 1 and 3 only, as with eval_every = 2
VALUES: tuple[dict[str, float], ...] = (
    {"accuracy_exit_1": 0.2, "accuracy_served_exit_1": 0.2, "accuracy_exit_2": 0.3, "error": 9.0},
    {"error": 8.0},
    {"accuracy_exit_1": 0.5, "accuracy_served_exit_1": 0.4, "accuracy_exit_2": 0.7, "error": 0.25,
     "gap": float("nan")},
)  # fmt: skip


def commit(store: Store, round: int) -> None:
    phases = {"aggregate": Phase(wall_s=0.2 * round, cpu_s=0.1)}
    metrics = Metrics(values=dict(VALUES[round - 1]), phases=phases)
    store.commit(round, metrics, {"w": torch.zeros(1)}, "2026-01-01T00:00:00+00:00", 1.0, 3)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """Three finished rounds, a fourth in progress; the coordinator has it open."""
    store = Store.create(tmp_path / "run #1?", CONFIG, "serve")  # a folder with a URI's characters
    for round, results in enumerate(ROUNDS, 1):
        store.record_clients([PI, NANO, REAL])
        list(store.recording(round, results))
        commit(store, round)
    list(store.recording(4, ROUNDS[0]))
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
    assert nano.tally.peak_memory_bytes is None


def test_real_board_is_wall_clock(store: Store):
    _, real, _ = platforms(store)
    wait, download, _, train, _ = real.phases
    check(wait, [1.0, 1.0, 1.0], [1.0, 1.0, 1.0])
    check(download, [0.5, 0.5, 0.5], [0.5, 0.5, 0.5])
    check(train, [6.0, 8.0, 8.0], [6.0, 8.0, 8.0])  # its CPU seconds, 18 and 20, play no part
    assert {time.source for time in real.phases} == {"wall clock"}


def test_board_without_scale_and_link_has_no_seconds(tmp_path: Path):
    bare = Client("bare", 1, profile=DeviceProfile(
        platform="generic", memory_total_bytes=1, memory_available_bytes=1, cores=1.0, gflops=1.0,
        is_emulated=True,
    ))  # fmt: skip
    store = Store.create(tmp_path, CONFIG, "serve")
    store.record_clients([bare])
    list(store.recording(1, [update(bare, (1,), 8, 8, 1, download=(1.0, 1.0), train=(2.0, 2.0))]))
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
    nano, real, pi = (platform.tally for platform in platforms(store))
    everything = read_run(store.folder).tally
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


def test_accuracy_and_figures(store: Store):
    report = read_run(store.folder)
    assert report.accuracy == [
        Accuracy(exit=1, first_round=1, first=0.2, last_round=3, last=0.5, served_last=0.4),
        Accuracy(exit=2, first_round=1, first=0.3, last_round=3, last=0.7, served_last=None),
    ]
    assert report.figures == {"error": 0.25, "gap": None}  # of round 3


def test_run_in_progress(store: Store):
    """The writer has a transaction open: finished rounds are shown, then the next commit's."""
    report = read_run(store.folder)
    assert (report.run, report.kind, report.method) == (store.run, "serve", "stage-rotation")
    assert (report.rounds, report.rounds_planned) == (3, 5)
    store.commit(4, Metrics(), {"w": torch.zeros(1)}, "2026-01-01T00:00:00+00:00", 1.0, 3)
    assert read_run(store.folder).rounds == 4


def test_text_through_a_pipe(store: Store):
    script = ROOT / "tools" / "testbed_report.py"
    command = [sys.executable, str(script), str(store.folder)]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    cells = [line.split() for line in lines]
    clock, cpu, link = ["wall", "clock"], ["CPU", "x", "scale"], ["bytes", "/", "link"]
    begin = lines.index("raspberry-pi-4 (emulated), 1 client") + 1
    assert cells[begin : begin + 5] == [
        ["wait", "2", "3.000", "5.000", "5.000", "3.000", "5.000", "5.000", *clock],
        ["download", "2", "2.000", "4.000", "4.000", "0.010", "0.030", "0.030", *link],
        ["load", "2", "0.250", "0.500", "0.500", "0.200", "0.400", "0.400", *cpu],
        ["train", "2", "2.500", "5.000", "5.000", "2.000", "3.000", "3.000", *cpu],
        ["upload", "2", "1.000", "2.000", "2.000", "0.020", "0.040", "0.040", *link],
    ]
    assert ["train", "not", "measured", "4.000", "4.000", "4.000", *cpu] in cells  # NANO
    assert ["train", "2", "6.000", "8.000", "8.000", *clock] in cells  # REAL
    assert ["fit", "not", "measured", *clock] in cells
    assert ["all", "4.0", "MB", "1.8", "MB", "12.0", "MB", "5.5", "MB", "700", "B"] in cells
    assert ["all", "9", "5", "1", "3", "3", "(gone", "2,", "trainer", "1)"] in cells
    assert ["raspberry-pi-4", "(emulated)", "stage", "3", "alone", "1", "1"] in cells
    assert ["exit", "1", "1", "20.0", "3", "50.0", "40.0"] in cells
    assert "3 of 5 rounds finished, 3 clients." in lines
    assert "error = 0.25; gap = not a number" in text
    assert "EMULATED boards ran on this machine" in text


def test_json_has_the_same_content(store: Store, capsys: pytest.CaptureFixture[str]):
    assert main([str(store.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rounds"], found["figures"]) == (3, {"error": 0.25, "gap": None})
    nano = found["platforms"][0]
    assert nano["tally"]["bytes_down_each"] == 16e6 / 3  # not rounded
    nothing = {"count": 0, "p50_s": None, "p95_s": None, "max_s": None}
    wait = {"phase": "wait", "source": "wall clock", "board": nothing, "wall": nothing}
    assert nano["phases"][0] == wait


def test_csv_has_a_row_per_platform_and_phase(store: Store, tmp_path: Path):
    assert main([str(store.folder), "--csv", str(tmp_path / "phases.csv")]) == 0
    with (tmp_path / "phases.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 5  # three groups of boards and the server
    of_pi = [row for row in rows if (row["platform"], row["is_emulated"]) == (PI_4, "1")]
    assert [row["phase"] for row in of_pi] == ["wait", "download", "load", "train", "upload"]
    assert (of_pi[1]["p50_s"], of_pi[1]["wall_p50_s"]) == ("2.0", "0.01")
    assert (rows[0]["count"], rows[0]["p50_s"]) == ("0", "not measured")
    assert {row["platform"] for row in rows[15:]} == {"server"}


def test_in_process_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """fedavg-l gives every client the whole model, one prefix whatever its exit."""
    arguments = "emulate --data digits --examples 120 --test-examples 40 --rounds 2 --clients 3"
    arguments += " --groups 1,1,1 --batch-size 8 --split iid --threads 1 --method fedavg-l"
    assert coordinator([*arguments.split(), "--run-dir", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "No board is emulated" in text
    assert "In-process clients train by turns" in text
    report = read_run(tmp_path)
    assert [(p.platform, p.is_emulated, p.clients) for p in report.platforms] == [
        ("in-process", False, 3)
    ]
    counts = {time.phase: time.board.count for time in report.platforms[0].phases}
    assert counts == {"wait": 0, "download": 0, "load": 6, "train": 6, "upload": 0}
    assert report.platforms[0].trained == [Trained(3, False, 3, 6)]
    assert [accuracy.exit for accuracy in report.accuracy] == [1, 2, 3]
    with sqlite3.connect(f"file:{tmp_path / 'run.sqlite'}?mode=ro", uri=True) as db:
        (bytes_up,) = db.execute("SELECT SUM(bytes_up) FROM rounds").fetchone()
        (longest_s,) = db.execute("SELECT MAX(wall_s) FROM phases WHERE phase = 'train'").fetchone()
    db.close()
    assert report.tally.bytes_up_a_round == bytes_up / 2
    assert report.platforms[0].phases[3].board.max_s == longest_s


def test_control_characters_stay_off_the_terminal(capsys: pytest.CaptureFixture[str]):
    print_table("platform,count", [["pi\x1b[2J\n", "1"]])
    assert capsys.readouterr().out == "\nplatform  count\npi?[2J?       1\n"


def missing_folder(folder: Path) -> None:
    folder.rmdir()


def empty_folder(folder: Path) -> None:
    """Nothing in it."""


def other_file(folder: Path) -> None:
    (folder / "run.sqlite").write_text("not a database, but long enough to be read as one\n" * 9)


def empty_file(folder: Path) -> None:
    (folder / "run.sqlite").touch()


def other_database(folder: Path) -> None:
    db = sqlite3.connect(folder / "run.sqlite")
    db.execute("CREATE TABLE runs (version)")
    db.close()


def other_version(folder: Path) -> None:
    Store.create(folder, CONFIG, "serve").close()
    db = sqlite3.connect(folder / "run.sqlite")
    db.execute("UPDATE runs SET version = 7")
    db.commit()
    db.close()


def other_config(folder: Path) -> None:
    Store.create(folder, CONFIG, "serve").close()
    db = sqlite3.connect(folder / "run.sqlite")
    db.execute("UPDATE runs SET config = '{}'")
    db.execute("INSERT INTO rounds (round) VALUES (1)")
    db.commit()
    db.close()


def no_round(folder: Path) -> None:
    Store.create(folder, CONFIG, "serve").close()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (missing_folder, "is not a folder; give the --run-dir"),
        (empty_folder, "holds no run.sqlite; give the --run-dir"),
        (other_file, "cannot be read as a run's database: file is not a database"),
        (empty_file, "cannot be read as a run's database: no such table"),
        (other_database, "was written by run format unknown, this is format 2"),
        (other_version, "was written by run format 7, this is format 2"),
        (other_config, "missing required field `method`"),
        (no_round, "has no finished round yet"),
    ],
)
def test_bad_input_is_one_line(make, says: str, tmp_path: Path, capsys) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    make(folder)
    assert main([str(folder)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("testbed_report: ")
    assert says in output.err
    assert output.err.count("\n") == 1


def test_csv_that_cannot_be_written(store: Store, tmp_path: Path, capsys):
    assert main([str(store.folder), "--csv", str(tmp_path / "none" / "phases.csv")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
