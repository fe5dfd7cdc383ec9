"""The device side as ARM64 code on the CPU of a Raspberry Pi 4: installed by pip from the wheel,
then link, training, inference and whole rounds. Emulated, so nothing here says how fast it is."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from coordinator.admission.client_list import Admission
from coordinator.links.router import Router
from edge_sdk.data.loading import save_shard
from edge_sdk.infer.early_exit import EarlyExit
from edge_sdk.infer.export import export
from edge_sdk.models import initial_tensors
from edge_sdk.protocol.keys import read_keys
from edge_sdk.protocol.messages import Accepted, Hello, Part
from edge_sdk.version import __version__
from tests.support.devices import ANY_PORT
from tests.support.processes import ROOT, World
from tests.system import arm64_programs
from tests.system.arm64 import TORCH, VENV, Arm, CannotBuild, lacks

LACKS = lacks()
pytestmark = [
    pytest.mark.arm64,
    pytest.mark.root,
    pytest.mark.slow,
    pytest.mark.skipif(bool(LACKS), reason=f"no ARM64 code can be run: {LACKS}"),
]
EDGE_SDK = f"{VENV}/bin/edge-sdk"
PYTHON = f"{VENV}/bin/python"
PROGRAMS = "/srv/session/arm64_programs.py"
WORLD = "/srv/session/world"
PATIENCE_S = 900.0  # torch is imported in 15 s of a free core, and cores may be crowded


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> Arm:
    session = tmp_path_factory.mktemp("arm64")
    try:
        made = Arm(session)
    except CannotBuild as error:
        pytest.skip(f"no ARM64 system can be made: {error}")
    shutil.copy(ROOT / "tests/system/arm64_programs.py", session)
    return made


@pytest.fixture(scope="module")
def world(arm) -> Iterator[World]:
    """Two devices a and b with keys and data, which the emulated system sees as WORLD."""
    folder = arm.session / "world"
    folder.mkdir()
    with World(folder) as world:
        yield world


@pytest.fixture(scope="module")
def trained(arm, world) -> dict[str, Any]:
    """What a job gives on the emulated device, which is calibrated from then on."""
    write_job(arm.session / "emulated", world)
    words = (PROGRAMS, "train", "/srv/session/emulated")
    return json.loads(arm.run(PYTHON, *words, torch=True, timeout_s=PATIENCE_S))


def write_job(folder: Path, world: World) -> None:
    """A shard and the tensors that its training starts from."""
    folder.mkdir()
    save_shard(folder / "shard.npz", world.shards["a"])
    np.savez(folder / "start.npz", **start_tensors())


def start_tensors() -> dict[str, np.ndarray]:
    initial = initial_tensors(arm64_programs.SPEC, 0)
    return {name: tensor.numpy() for name, tensor in initial.items()}


def test_pip_takes_the_wheel_and_the_torch_that_is_there(arm):
    """Its markers on aarch64: a torch that works on this CPU, and none of CUDA's."""
    torch = TORCH[0].partition("==")[2]
    assert f"Successfully installed edge-sdk-{__version__}" in arm.installed
    assert re.search(r"satisfied: torch<2\.10,>=2\.1 in \S*/usr/local/lib/torch ", arm.installed)
    assert f"({torch})" in arm.installed
    assert "nvidia" not in arm.installed
    assert arm.run(EDGE_SDK, "--version").strip() == f"edge-sdk {__version__}"


def test_measure_without_torch(arm):
    found = json.loads(arm.run(EDGE_SDK, "measure", "--json"))
    assert (found["machine"], found["platform"], found["board"]) == ("aarch64", "generic", "")
    assert found["cores"] <= len(os.sched_getaffinity(0))
    assert found["memory_total_bytes"] == psutil.virtual_memory().total
    assert 0 < found["memory_available_bytes"] < found["memory_total_bytes"]
    assert found["gflops"] == 0


def test_parts_there_and_back_encrypted(arm, world):
    """2 MB in parts between the device's Link here as ARM64 code and the coordinator's Router."""
    rng = np.random.default_rng(0)
    parts = [rng.bytes(512 * 1024) for _ in range(4)]
    returned: dict[int, bytes] = {}
    hellos: list[Hello] = []
    router = Router(ANY_PORT, read_keys(world.keys, "server"), Admission(world.keys / "clients"))
    is_done = threading.Event()

    def serve() -> None:
        while not is_done.is_set():
            _, received = router.receive(100)
            if received is None:
                continue
            assert received.name == "a"
            if isinstance(received.message, Hello):
                hellos.append(received.message)
                for index, part in enumerate(parts):
                    assert router.send(received.route, Part(round=1, index=index), part)
            elif isinstance(received.message, Part):
                assert received.payload is not None
                returned[received.message.index] = bytes(received.payload)
                if len(returned) == len(parts):
                    assert router.send(received.route, Accepted(round=1))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        said = arm.run(PYTHON, PROGRAMS, "link", f"{WORLD}/a", router.endpoint)
    finally:
        is_done.set()
        thread.join()
        router.close()
    assert json.loads(said) == {"num_parts": 4}
    assert [hello.profile.machine for hello in hellos] == ["aarch64"]
    assert [returned[index] == part for index, part in enumerate(parts)] == [True] * 4


def test_a_job_gives_the_losses_and_weights_that_it_gives_here(arm, world, trained):
    write_job(arm.session / "native", world)
    native = arm64_programs.train_step(arm.session / "native")
    assert (trained["machine"], trained["torch"].partition("+")[0]) == (
        "aarch64",
        TORCH[0].partition("==")[2],
    )
    assert trained["num_steps"] == native["num_steps"]
    assert len(trained["losses"]) == 3  # one for each exit
    assert all(map(math.isfinite, trained["losses"]))
    assert trained["losses"] == pytest.approx(native["losses"], rel=1e-4)
    tensors = start_tensors()
    with (
        np.load(arm.session / "emulated/trained.npz") as ours,
        np.load(arm.session / "native/trained.npz") as theirs,
    ):
        assert sorted(ours.files) == sorted(theirs.files)
        for name in ours.files:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-3, atol=1e-4, err_msg=name)
            if name.endswith("weight"):
                assert not np.array_equal(ours[name], tensors[name]), f"{name} was not trained"


def test_inference_answers_as_here(arm, world):
    """onnxruntime's ARM64 kernels, without torch; the threshold lets half stop at exit 1."""
    model = arm.session / "model"
    export(arm64_programs.SPEC, initial_tensors(arm64_programs.SPEC, 1), model)
    x = world.test.x
    np.save(arm.session / "x.npy", x)
    threshold = float(np.median(EarlyExit.load(model, threshold=0).predict(x).confidence))
    arm.run(
        EDGE_SDK,
        "infer",
        "/srv/session/model",
        "--data",
        "/srv/session/x.npy",
        "--threshold",
        str(threshold),
        "--out",
        "/srv/session/predictions.csv",
    )
    here = EarlyExit.load(model, threshold=threshold).predict(x)
    with (arm.session / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["label"]) for row in rows] == here.label.tolist()
    assert [int(row["exit"]) for row in rows] == here.exit.tolist()
    assert (here.exit == 1).sum() == len(x) / 2
    confidences = [float(row["confidence"]) for row in rows]
    np.testing.assert_allclose(confidences, here.confidence, rtol=0, atol=1e-5)


def test_two_devices_and_a_coordinator_train_a_round(arm, world, trained):
    (calibration,) = (arm.session / ".cache" / "edge-sdk").glob("calibration-*.json")
    made = json.loads(calibration.read_text())
    coordinator = world.serve("--rounds", "1", "--option", "channels=4,6,8")
    devices = []
    for name in world.shards:
        folder = f"{WORLD}/{name}"
        command = arm.command(
            EDGE_SDK,
            "run",
            "--coordinator",
            world.endpoint,
            "--data",
            f"{folder}/data.npz",
            "--id",
            name,
            "--keys",
            folder,
            "--threads",
            "1",
            "--once",
            torch=True,
        )
        devices.append(world.start(name, command, program=()))
    try:
        world.wait_round(1, PATIENCE_S)
        assert [process.end(PATIENCE_S) for process in (coordinator, *devices)] == [0, 0, 0]
    except AssertionError as error:
        raise AssertionError(f"{error}\n{coordinator.text()}") from error
    assert world.outcomes("a") == world.outcomes("b") == {1: "ok"}
    profiles = [json.loads(text) for (text,) in world.rows("SELECT profile FROM clients")]
    assert [profile["machine"] for profile in profiles] == ["aarch64"] * 2
    assert all(min(profile["gflops"], profile["layer_s"]) > 0 for profile in profiles)
    assert not any(profile["is_emulated"] for profile in profiles)
    assert (made["allowance"], made["scratch_bytes"]) == (
        trained["allowance"],
        trained["scratch_bytes"],
    )
    assert json.loads(calibration.read_text()) == made, "the devices made another"
    (accuracy,) = world.rows("SELECT value FROM metrics WHERE name = 'accuracy_exit_3'")
    assert 0 <= accuracy[0] <= 1
    assert all("update accepted" in device.text() for device in devices)


def test_it_leaves_nothing_behind(arm):
    """Its handler for foreign programs and its mounts went with their namespaces."""
    mounts = subprocess.run(["mount"], capture_output=True, text=True, check=True).stdout
    assert str(arm.session) not in mounts
    assert "qemu-aarch64" not in " ".join(os.listdir("/proc/sys/fs/binfmt_misc"))
    left = [p for p in psutil.process_iter(["cmdline"]) if str(arm.session) in str(p.info)]
    assert not left
