"""`edge-coordinator serve` and `edge-sdk run` as real processes over ZeroMQ with CURVE: the same
model as in one process, bit by bit, whatever is killed, stopped or full on the way."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file

from coordinator.admission import Admission
from coordinator.cli import main as coordinate
from coordinator.cohort import Client, InProcessCohort
from coordinator.cohort_zmq import Terms, ZmqCohort
from coordinator.config import RunConfig, read_config
from coordinator.hub import Hub
from coordinator.methods import make_method
from coordinator.rounds import run_rounds
from coordinator.store import Store
from edge_sdk.keys import read_keys
from edge_sdk.tensors import Tensors
from edge_sdk.wire import ModelSpec
from tests.processes import World, frozen, read_rows, run_cli, wait_until

# 60 examples, one epoch, batch 16: predicted for exit 1, exit 2, exit 3, stage 3 alone, in ms
# Raspberry Pi 4: 15, 36, 107, 84; generic: 3.5, 8.0, 22, 17; Jetson Nano: 1.0, 1.8, 3.5, 2.2.
DEADLINE_S = 0.020
BOARDS = {"a": "raspberry-pi-4", "b": "generic", "c": "jetson-nano"}
CHOICES = {"a": (1, ()), "b": (2, (3,)), "c": (3, ())}
TRAIN_S = ["--epochs", "120"]  # a job of about a second, to be hit in the middle


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
    """The served model of a finished run, trained again in this process: the same clients with the
    choices they announced, the updates folded in the order in which they arrived."""
    ((text,),) = read_rows(run_dir, "SELECT config FROM runs")
    config = read_config(text, str(run_dir))
    stages = {
        name: tuple(int(stage) for stage in told.split(",") if stage)
        for name, told in read_rows(run_dir, "SELECT client_id, stages FROM clients")
    }
    cohort = InProcessCohort(shards, dict.fromkeys(shards, 1), config.model.exit)
    method = make_method(config)
    for (round,) in read_rows(run_dir, "SELECT round FROM rounds ORDER BY round"):
        arrived = read_rows(
            run_dir,
            "SELECT client_id, exit FROM participations WHERE round = ? AND outcome = 'ok'"
            " ORDER BY rowid",
            round,
        )
        work = {
            name: method.assign(Client(id=name, exit=exit, stages=stages[name]), round)
            for name, exit in arrived
        }
        method.aggregate(round, cohort.train(work, round, 0.0))
    return method.served()


def assert_same(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(got[name], expected[name])]
    assert not different, f"{len(different)} of {len(expected)} tensors differ: {different[:5]}"


def assert_every_round_once(world: World, num_rounds: int) -> None:
    rounds = [row[0] for row in world.rows("SELECT round FROM rounds ORDER BY round")]
    assert rounds == list(range(1, num_rounds + 1))


# -- the same model ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rounds"), [("stage-rotation", 1), ("hypemefed", 2), ("owners-mean", 2)]
)
def test_devices_give_the_model_that_one_process_gives(
    three_devices, tmp_path, one_thread, method, rounds
):
    world = three_devices
    config = RunConfig(
        method=method,
        model=ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=10, exit=3, options={}),
        rounds=rounds,
        batch_size=16,
        seed=7,
        deadline_s=DEADLINE_S,
    )
    store = Store.create(tmp_path / "run", config, "serve")
    made = make_method(config)
    terms = Terms(store.run, made.spec, config.plan(), DEADLINE_S, config.grace_s, config.quorum, 3)
    hub = Hub(world.endpoint, read_keys(world.keys, "server"), Admission(world.keys / "clients"))
    give_up = time.monotonic() + 90
    cohort = ZmqCohort(hub, terms, lambda: time.monotonic() > give_up)
    try:
        run_rounds(store, made, cohort, world.test)
    finally:
        store.close()
        cohort.close("run finished")
    announced = read_rows(tmp_path / "run", "SELECT client_id, exit, stages FROM clients")
    assert {name: (exit, stages) for name, exit, stages in announced} == {
        name: (exit, ",".join(map(str, stages))) for name, (exit, stages) in CHOICES.items()
    }
    segments = read_rows(
        tmp_path / "run", "SELECT client_id, segments, outcome FROM participations"
    )
    deeper = ",3-3" if method == "stage-rotation" else ""
    wanted = [("a", "1-1", "ok"), ("b", f"1-2{deeper}", "ok"), ("c", "1-3", "ok")]
    assert sorted(segments) == sorted(wanted * rounds)
    assert_same(made.served(), replay(tmp_path / "run", world.shards))


# -- killed -----------------------------------------------------------------------------------


def test_a_killed_device_costs_its_own_update_and_may_come_back(world, one_thread):
    server = world.serve("--rounds", "6", "--grace", "2", *TRAIN_S)
    a, b = world.device("a"), world.device("b", "--once")
    a.wait_said("round 2: job")
    orphan = a.trainer()
    a.signal(signal.SIGKILL)
    a.end()
    world.wait_round(2)  # closed without it after the grace
    wait_until(lambda: not orphan.is_running(), "the dead agent's trainer ends by itself")
    with frozen(b.trainer()):  # the run stays where it is until the device is back
        again = world.device("a", "--once")
        again.wait_said("training up to exit 3")
    assert (server.end(), b.end(), again.end()) == (0, 0, 0)
    assert_every_round_once(world, 6)
    assert world.outcomes("b") == dict.fromkeys(range(1, 7), "ok")
    outcomes = world.outcomes("a")
    assert (outcomes[1], outcomes[2], outcomes[6]) == ("ok", "straggler", "ok")
    assert set(outcomes.values()) == {"ok", "straggler"}
    assert list(outcomes.values()).count("straggler") == 1, "not chosen while it was away"
    assert_same(load_file(world.run_dir / "model.safetensors"), replay(world.run_dir, world.shards))


def test_a_killed_training_process_costs_one_update(world):
    server = world.serve("--rounds", "6", *TRAIN_S)
    a, b = world.device("a", "--once"), world.device("b", "--once")
    a.wait_said("round 2: job")
    a.trainer().kill()
    a.wait_said("training process was killed by signal 9")
    with frozen(b.trainer()):
        a.wait_said("training up to exit 2")  # one exit less: the kernel may have wanted memory
    assert (server.end(), a.end(), b.end()) == (0, 0, 0)
    assert_every_round_once(world, 6)
    assert world.outcomes("b") == dict.fromkeys(range(1, 7), "ok")
    taken = {
        round: (outcome, code, exit)
        for round, outcome, code, exit in world.rows(
            "SELECT round, outcome, code, exit FROM participations WHERE client_id = 'a'"
        )
    }
    assert taken[1] == ("ok", "", 3)
    assert taken[2] == ("failed", "trainer", 3)
    assert taken[6] == ("ok", "", 2)
    assert [code for _, code, _ in taken.values()].count("trainer") == 1
    assert server.said("was killed by signal 9"), "the device reported it"


def test_a_killed_coordinator_resumes_and_gives_the_undisturbed_model(world, one_thread):
    flags = ["--rounds", "5", *TRAIN_S]
    server = world.serve(*flags)
    a, b = world.device("a", "--once"), world.device("b", "--once")
    world.wait_round(1)
    trainer = b.trainer()
    with frozen(trainer):  # a round is open and cannot end
        last = world.last_round()
        a.wait_said(f"round {last + 1}: trained")
        server.signal(signal.SIGKILL)
        server.end()
    assert world.last_round() == last < 5, "killed in the middle of a round"
    pids = a.process.pid, b.process.pid, trainer.pid
    server = world.serve(*flags, "--resume")
    assert (server.end(), a.end(), b.end()) == (0, 0, 0)
    assert server.text().count("joined") == 2, "devices came back by themselves"
    assert (a.process.pid, b.process.pid, trainer.pid) == pids
    assert server.said(f"round {last + 1}: 2 of 2 returned")
    assert not server.said(f"round {last}: "), "a finished round is not run again"
    assert_every_round_once(world, 5)
    for name in "ab":
        assert world.outcomes(name) == dict.fromkeys(range(1, 6), "ok")
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
    assert b.end(15) == 0
    assert b.said("coordinator stopped")
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
    """A folder with room for a run's database and one checkpoint or two; grows on demand."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=900k", "none", str(folder)], check=False
        ).returncode
    ):
        pytest.skip("a tiny tmpfs cannot be mounted: needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.root
def test_a_full_disk_ends_the_run_at_its_last_round(tiny_disk, tmp_path):
    with World(tmp_path, num_devices=1) as world:
        world.run_dir = tiny_disk / "run"
        server = world.serve("--rounds", "8")
        a = world.device("a", "--once")
        assert server.end() == 1
        last_line = server.text().splitlines()[-1]
        print(server.text())
        print(os.listdir(world.run_dir))
        subprocess.run(["df", str(tiny_disk)], check=True)
        last = world.last_round()
        assert last >= 1
        assert last_line.startswith(f"edge-coordinator: round {last + 1} could not be saved")
        assert "free space" in last_line
        assert f"--resume at round {last + 1}" in last_line
