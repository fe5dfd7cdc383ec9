"""`edge-coordinator serve` and `edge-sdk run` as real processes over ZeroMQ with CURVE: the same
model as in one process, bit by bit, whatever is killed, stopped or full on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coordinator.admission.client_list import Admission
from coordinator.cli.main import main as coordinate
from coordinator.cohorts.base import Client
from coordinator.cohorts.budget import Variant
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.config import RotationOptions, RunConfig, read_config
from coordinator.fleet.cohort import ZmqCohort
from coordinator.fleet.spool import Spool
from coordinator.links.router import Router
from coordinator.methods.base import Method
from coordinator.methods.registry import make_method
from coordinator.runs.rounds import run_rounds
from coordinator.store.store import SPOOL, Store
from edge_sdk.protocol.keys import read_keys
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.protocol.tensors import Tensors
from tests.support.examples import one_line
from tests.support.processes import World, has_ended, mapped_libraries, read_rows, wait_until

# 60 examples, one epoch, batch 16: predicted for exit 1, exit 2, exit 3, stage 3 alone, in ms
# Raspberry Pi 4: 15, 36, 107, 84; generic: 3.5, 8.0, 22, 17; Jetson Nano: 1.0, 1.8, 3.5, 2.2.
DEADLINE_S = 0.020
BOARDS = {"a": "raspberry-pi-4", "b": "generic", "c": "jetson-nano"}
CHOICES = {"a": (1, ()), "b": (2, (3,)), "c": (3, ())}
TRAIN = ["--epochs", "20"]  # a job of 0.2 s or more, to be hit in the middle


@pytest.fixture
def world(tmp_path):
    with World(tmp_path) as world:
        yield world


@pytest.fixture(scope="module")
def three_devices(tmp_path_factory):
    """Devices that choose 1, 2 and 3 exits, up before any coordinator; they serve several runs."""
    with World(tmp_path_factory.mktemp("three"), num_devices=3) as world:
        for name, board in BOARDS.items():
            world.device(name, "--board", board)
        yield world


@pytest.fixture
def one_thread():
    """As the devices are started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def replay(run_dir: Path, shards: dict) -> Tensors:
    """The served model of a finished run, trained again in this process."""
    return replayed(run_dir, shards).served()


def replayed(run_dir: Path, shards: dict) -> Method:
    """The method of a finished run after training again in this process: the same clients with the
    choices they announced, the updates folded in the order in which they arrived."""
    ((text,),) = read_rows(run_dir, "SELECT config FROM runs")
    config = read_config(text, str(run_dir))
    told = {
        name: {
            "variant": variant,
            "stages": tuple(int(stage) for stage in stages.split(",") if stage),
            "prefix_s": prefix_s,
            "stage_s": tuple(float(taken_s) for taken_s in stage_s.split(",") if taken_s),
        }
        for name, variant, stages, prefix_s, stage_s in read_rows(
            run_dir, "SELECT client_id, variant, stages, prefix_s, stage_s FROM clients"
        )
    }
    method = make_method(config)
    variants = None
    if offered := method.offer().variants:
        chosen = {name: told[name]["variant"] for name in told}
        variants = {name: Variant(n, offered[n - 1].exit, 0) for name, n in chosen.items()}
    cohort = InProcessCohort(shards, dict.fromkeys(shards, 1), config.model.exit, variants=variants)
    for (round,) in read_rows(run_dir, "SELECT round FROM rounds ORDER BY round"):
        arrived = read_rows(
            run_dir,
            "SELECT client_id, exit FROM participations WHERE round = ? AND outcome = 'ok'"
            " ORDER BY rowid",
            round,
        )
        work = {
            name: method.assign(Client(id=name, exit=exit, **told[name]), round)
            for name, exit in arrived
        }
        method.aggregate(round, cohort.train(work, round, 0.0))
    return method


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:5]}"


def assert_every_round_once(world: World, num_rounds: int) -> None:
    rounds = [row[0] for row in world.rows("SELECT round FROM rounds ORDER BY round")]
    assert rounds == list(range(1, num_rounds + 1))


# -- the same model ---------------------------------------------------------------------------


def run_in(world: World, folder: Path, **settings: Any) -> Method:
    """A run with the world's three devices, its coordinator in this process."""
    config = RunConfig(
        model=ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=10, exit=3, options={}),
        batch_size=16,
        seed=7,
        deadline_s=DEADLINE_S,
        min_clients=3,
        late="drop",
        **settings,
    )
    store = Store.create(folder, config, "serve")
    made = make_method(config)
    router = Router(
        world.endpoint, read_keys(world.keys, "server"), Admission(world.keys / "clients")
    )
    give_up = time.monotonic() + 90
    cohort = ZmqCohort(
        router,
        Spool(store.folder / SPOOL),
        config,
        made.offer(),
        run=store.run,
        should_stop=lambda: time.monotonic() > give_up,
    )
    try:
        run_rounds(store, made, cohort, world.test)
    finally:
        store.close()
        cohort.close("run finished", is_final=False)
    return made


@pytest.mark.parametrize(
    ("method", "rounds"), [("stage-rotation", 1), ("hypemefed", 2), ("owners-mean", 2)]
)
def test_devices_give_the_model_that_one_process_gives(
    three_devices, tmp_path, one_thread, method, rounds
):
    world = three_devices
    made = run_in(
        world,
        tmp_path / "run",
        method=method,
        rounds=rounds,
        rotation=RotationOptions(mode="add" if method == "stage-rotation" else "off"),
    )
    announced = read_rows(tmp_path / "run", "SELECT client_id, exit, stages FROM clients")
    assert {name: (exit, stages) for name, exit, stages in announced} == {
        name: (exit, ",".join(map(str, stages))) for name, (exit, stages) in CHOICES.items()
    }
    segments = read_rows(
        tmp_path / "run", "SELECT client_id, segments, outcome FROM participations"
    )
    # b has time for one of prefix and stage 3
    turns = {"1-2", "3-3"} if method == "stage-rotation" else {"1-2"}
    assert {trained for name, trained, _ in segments if name == "b"} <= turns
    others = [row for row in segments if row[0] != "b"]
    assert sorted(others) == sorted([("a", "1-1", "ok"), ("c", "1-3", "ok")] * rounds)
    assert {outcome for _, _, outcome in segments} == {"ok"}
    assert_same(made.served(), replay(tmp_path / "run", world.shards))
    for device in world.running[:3]:
        libraries = mapped_libraries(device.process.pid)
        assert not [name for name in libraries if "torch" in name or "numpy" in name]


def test_each_device_trains_the_largest_variant_that_it_has_time_for(
    three_devices, tmp_path, one_thread, by_variant
):
    """By the deadline, of widths 1/4, 1/2 and 1."""
    made = run_in(three_devices, tmp_path / "run", method="by-variant", rounds=1)
    announced = read_rows(tmp_path / "run", "SELECT client_id, exit, variant FROM clients")
    assert sorted(announced) == [("a", 3, 1), ("b", 3, 2), ("c", 3, 3)]
    assert_same(made.state_dict(), replayed(tmp_path / "run", three_devices.shards).state_dict())


# -- killed -----------------------------------------------------------------------------------


def test_a_killed_device_costs_its_own_update_and_may_come_back(world, one_thread):
    server = world.serve("--rounds", "6", "--grace", "3", *TRAIN)
    a, b = world.device("a"), world.device("b", "--once")
    a.wait_said("round 1: job")
    with a.held_in_training() as lost:
        orphan = a.trainer()
        a.signal(signal.SIGKILL)
        a.end()
    wait_until(lambda: has_ended(orphan), "the dead agent's trainer ends by itself")
    world.wait_round(lost)  # closed without it after the grace
    with b.held_in_training() as held:  # the run stays where it is until the device is back
        again = world.device("a", "--once")
        again.wait_said("training up to exit 3")
    assert (server.end(), b.end(), again.end()) == (0, 0, 0)
    assert_every_round_once(world, 6)
    assert world.outcomes("b") == dict.fromkeys(range(1, 7), "ok")
    expected = {round: "ok" for round in range(1, 7) if round < lost or round > held}
    assert world.outcomes("a") == expected | {lost: "straggler"}
    assert lost < held < 6, "away in some rounds, back in later ones"
    assert_same(load_file(world.run_dir / "model.safetensors"), replay(world.run_dir, world.shards))


def test_a_killed_training_process_costs_one_update(world):
    server = world.serve("--rounds", "6", *TRAIN)
    a, b = world.device("a", "--once"), world.device("b", "--once")
    a.wait_said("round 1: job")
    with a.held_in_training() as lost:
        a.trainer().kill()
    a.wait_said("trainer was killed by signal 9")
    with b.held_in_training() as held:
        chosen = "training up to exit 3"  # as before: memory was not short
        wait_until(lambda: a.text().count(chosen) == 2, "a is ready again")
    assert (server.end(), a.end(), b.end()) == (0, 0, 0)
    assert server.said("a reports trainer: the trainer was killed by signal 9")
    assert_every_round_once(world, 6)
    assert world.outcomes("b") == dict.fromkeys(range(1, 7), "ok")
    taken = {
        round: (outcome, code, exit, bool(is_saving))
        for round, outcome, code, exit, is_saving in world.rows(
            "SELECT round, outcome, code, exit, micro_batch OR recompute"
            " FROM participations WHERE client_id = 'a'"
        )
    }
    before = dict.fromkeys(range(1, lost), ("ok", "", 3, False))
    after = dict.fromkeys(range(held + 1, 7), ("ok", "", 3, False))
    assert taken == before | {lost: ("failed", "trainer", 3, False)} | after
    assert after


def test_a_killed_coordinator_resumes_and_gives_the_undisturbed_model(
    three_devices, tmp_path, one_thread
):
    world = three_devices
    world.run_dir = tmp_path / "run"
    a, b, c = devices = world.running[:3]
    for device in devices:
        device.forget()
    flags = ["--rounds", "30", "--deadline", str(DEADLINE_S)]
    server = world.serve(*flags)
    world.wait_round(1)
    with b.held_in_training() as broken:  # a round is open and cannot end
        a.wait_said(f"round {broken}: update accepted")
        c.wait_said(f"round {broken}: update accepted")
        server.signal(signal.SIGKILL)
        server.end()
    assert 1 <= world.last_round() == broken - 1 < 30, "killed in the middle of a round"
    server = world.serve(*flags, "--resume")
    assert server.end() == 0
    assert server.text().count(" joined from ") == 3, "devices came back by themselves"
    for device in devices:
        assert device.is_alive
        device.wait_said("run finished")
    assert server.said(f"round {broken}: 3 of 3 returned")
    assert not server.said(f"round {broken - 1}: "), "a finished round is not run again"
    assert_every_round_once(world, 30)
    ((longest_s,),) = world.rows("SELECT MAX(wall_s) FROM rounds")
    assert longest_s < 25, "an update of the broken round was not taken for one of the new round"
    for name in world.shards:
        assert world.outcomes(name) == dict.fromkeys(range(1, 31), "ok")
    assert_same(load_file(world.run_dir / "model.safetensors"), replay(world.run_dir, world.shards))


# -- stopped, late ----------------------------------------------------------------------------


def test_sigterm_ends_either_side_in_order(world):
    server = world.serve("--rounds", "1000")
    a, b = world.device("a"), world.device("b", "--once")
    world.wait_round(2)
    a.signal(signal.SIGTERM)
    assert a.end(15) == 0
    server.wait_said("a is gone: said bye")
    last = world.last_round()
    world.wait_round(last + 3)
    assert world.outcomes("b")[last + 3] == "ok"
    assert last + 3 not in world.outcomes("a")
    server.signal(signal.SIGTERM)
    assert server.end(30) == 0
    next_round = world.last_round() + 1
    assert server.said(f"round {next_round} is next, go on with --resume")
    b.wait_said("coordinator stopped")
    assert b.is_alive, "--once is for the end of the run: this one can be resumed"
    b.signal(signal.SIGTERM)
    assert b.end(15) == 0
    assert "Traceback" not in a.text() + b.text() + server.text()


def test_a_device_waits_for_its_coordinator_and_says_so_once(world):
    a = world.device("a", "--once")
    a.wait_said("waiting for it")
    server = world.serve("--rounds", "1", "--min-clients", "1")
    assert (server.end(), a.end()) == (0, 0)
    assert a.text().count("waiting for it") == 1
    assert world.outcomes("a") == {1: "ok"}


# -- a full disk ------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path):
    """A folder with room for the database and two checkpoints of 244 KB, not for a third."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("a tiny tmpfs cannot be mounted: needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def disk_left(folder: Path) -> int:
    stat = os.statvfs(folder)
    return stat.f_bavail * stat.f_frsize


@pytest.mark.root
def test_a_full_disk_ends_the_run_at_its_last_round(tiny_disk, tmp_path, capsys, one_thread):
    with World(tmp_path, num_devices=1) as world:
        world.run_dir = tiny_disk / "run"
        server = world.serve("--rounds", "6")
        a = world.device("a")
        assert server.end() == 1
        last = world.last_round()
        assert 1 <= last < 6
        message = server.text().splitlines()[-1]
        assert message.startswith(f"edge-coordinator: round {last + 1} could not be saved")
        assert f"free space or make it writable; go on with --resume at round {last + 1}" in (
            message
        )
        assert "Traceback" not in server.text()
        load_file(world.run_dir / f"round-{last:06d}.safetensors")
        assert not list(world.run_dir.glob("*.new")), "what was half written is gone"
        a.wait_said("coordinator stopped")

        (tiny_disk / "filler").write_bytes(bytes(disk_left(tiny_disk)))
        (world.run_dir / "endpoint").unlink()
        (tiny_disk / "last page").write_bytes(bytes(disk_left(tiny_disk)))
        assert coordinate(world.serve_flags("--rounds", "6", "--resume")) == 1
        assert "free space" in one_line(capsys.readouterr().err, "edge-coordinator")

        subprocess.run(["mount", "-o", "remount,size=8m", str(tiny_disk)], check=True)
        server = world.serve("--rounds", "6", "--resume")
        assert server.end() == 0
        assert_every_round_once(world, 6)
        assert_same(
            load_file(world.run_dir / "model.safetensors"), replay(world.run_dir, world.shards)
        )
