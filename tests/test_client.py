"""`edge_sdk.Client`: in one's own program against real coordinators."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset, TensorDataset

from edge_sdk import Client, Event, own_data
from edge_sdk.data import load_shard
from edge_sdk.errors import ConfigError, DataError, EdgeError
from edge_sdk.own_data import checked_source, shard_of
from edge_sdk.wire import Bye, Fault, Hello, Ready
from tests import scripted
from tests.helpers import examples
from tests.processes import PATIENCE_S, ROOT, World, environment
from tests.scripted_coordinator import ScriptedCoordinator
from tests.test_agent import MODEL, WHOLE

X, Y = examples(12).x, examples(12).y
NOWHERE = "tcp://127.0.0.1:9"  # the discard port, where nobody listens
FAMILY = """
from edge_sdk.models import register_family
from edge_sdk.models.mlp import build_mlp
from edge_sdk.wire import ModelSpec

def build(spec: ModelSpec):
    return build_mlp(spec)

register_family("mine", build)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Where shards go; none is left at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def client(data: object = (X, Y), coordinator: str = NOWHERE, **options: object) -> Client:
    return Client(coordinator, data=data, **{"insecure": True, "threads": 1, **options})


def one_line(error: Exception) -> str:
    assert "\n" not in str(error)
    return str(error)


def kinds(events: list[Event]) -> list[str]:
    """In order; what a device chose depends on the machine's memory, and may change."""
    return [event.kind for event in events if event.kind != "chosen"]


# -- whole runs ---------------------------------------------------------------------------------


@pytest.fixture
def world(tmp_path):
    with World(tmp_path, num_devices=1) as world:
        yield world


def home_of(world: World) -> dict[str, object]:
    return {"insecure": False, "id": "a", "keys": world.folder / "a"}


@pytest.mark.slow
def test_arrays_and_an_own_family_train_a_run(world, temporary, tmp_path, monkeypatch):
    """The module is found by sys.path alone in the training process."""
    modules = tmp_path / "modules"
    modules.mkdir()
    (modules / "family_of_test_client.py").write_text(FAMILY)
    monkeypatch.setenv("PYTHONPATH", f"{modules}{os.pathsep}{ROOT}")
    server = world.serve(
        "--rounds", "2", "--import", "family_of_test_client", "--model", "mine", "--exits", "2"
    )
    monkeypatch.delenv("PYTHONPATH")
    monkeypatch.syspath_prepend(modules)
    monkeypatch.syspath_prepend(ROOT)
    shard = world.shards["a"]
    events: list[Event] = []
    modes: set[int] = set()

    def on_event(event: Event) -> None:
        events.append(event)
        modes.update(stat.S_IMODE(path.stat().st_mode) for path in temporary.rglob("*"))

    client(
        (shard.x, shard.y), world.endpoint, **home_of(world),
        imports=["family_of_test_client"], on_event=on_event,
    ).run()  # fmt: skip
    assert server.end() == 0
    assert world.outcomes("a") == {1: "ok", 2: "ok"}
    one_round = ["job", "trained", "accepted"]
    assert kinds(events) == ["connected", *one_round, *one_round, "ended"]
    assert modes == {0o700, 0o600}
    first = {event.kind: event for event in reversed(events)}
    chosen, job, trained = first["chosen"], first["job"], first["trained"]
    assert (chosen.exit, job.round, trained.round) == (2, 1, 1)
    assert [(segment.first, segment.last) for segment in job.segments] == [(1, 2)]
    assert [result.exit for result in trained.exits] == [1, 2]
    assert trained.seconds > 0
    assert events[-1].detail == "coordinator: run finished"


@pytest.mark.slow
def test_a_dataset_trains_though_the_callback_raises(world, caplog):
    server = world.serve("--rounds", "1")
    shard = world.shards["a"]
    dataset = TensorDataset(torch.from_numpy(shard.x), torch.from_numpy(shard.y))
    heard = []

    def on_event(event: Event) -> None:
        heard.append(event)
        raise ValueError("of the program")

    client(dataset, world.endpoint, **home_of(world), on_event=on_event).run()
    assert server.end() == 0
    assert world.outcomes("a") == {1: "ok"}
    assert kinds(heard) == ["connected", "job", "trained", "accepted", "ended"]
    (record,) = [record for record in caplog.records if "on_event raised" in record.message]
    assert "at 'connected'" in record.message
    assert record.exc_info[0] is ValueError


@pytest.mark.slow
def test_the_example_in_the_readme(world):
    section = (ROOT / "README.md").read_text().split("## In your own program")[1]
    (example,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    assert example.count("\n") <= 15
    home = world.folder / "program"
    home.mkdir()
    shard = world.shards.pop("a")
    world.admit("pi-1", shard)
    shutil.copytree(world.folder / "pi-1", home / "keys")
    np.save(home / "x.npy", shard.x)
    np.save(home / "y.npy", shard.y)
    (home / "program.py").write_text(example.replace("tcp://HOST:5555", world.endpoint))
    server = world.serve("--rounds", "1")
    ended = subprocess.run(
        [sys.executable, "program.py"], capture_output=True, text=True, cwd=home, check=False,
        env=environment(world.mark) | {"PYTHONPATH": str(ROOT)}, timeout=3 * PATIENCE_S,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert server.end() == 0
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("connected 0 welcome to run")
    assert "accepted 1 update accepted" in lines
    assert any(
        re.fullmatch(r"  exit 1: loss \d\.\d{3}, accuracy [01]\.\d\d", line) for line in lines
    )
    assert lines[-1] == "ended 0 coordinator: run finished"


@pytest.mark.slow
def test_faults_and_a_lost_coordinator_are_told(monkeypatch):
    monkeypatch.setattr(scripted, "WAIT_S", PATIENCE_S)
    coordinator = ScriptedCoordinator()
    events: list[Event] = []

    def on_event(event: Event) -> None:
        events.append(event)
        if event.kind == "lost":
            device.stop()

    device = client(coordinator=coordinator.endpoint, on_event=on_event)
    thread = threading.Thread(target=device.run)
    thread.start()
    try:
        coordinator.expect(Hello)
        coordinator.welcome(MODEL, WHOLE)
        coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
        coordinator.send(Fault(code="round", detail="too late", round=7))
        coordinator.send(Bye(reason="back soon"))
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    finally:
        device.stop()
        thread.join(PATIENCE_S)
        coordinator.close()
    assert kinds(events) == ["connected", "failed", "lost", "ended"]
    failed, lost = events[-3:-1]
    assert (failed.code, failed.round, failed.detail) == (
        "round",
        7,
        "coordinator: round: too late",
    )
    assert (lost.detail, events[-1].detail) == ("coordinator: back soon", "device stopped")


# -- the end --------------------------------------------------------------------------------------


@pytest.fixture
def when_waiting(caplog):
    """Calls `then` in another thread when the agent waits for its coordinator."""
    caplog.set_level(logging.INFO, "edge_sdk")
    log = logging.getLogger("edge_sdk.agent")

    def call(then) -> None:
        def see(record: logging.LogRecord) -> bool:
            if "waiting for it" in record.getMessage():
                threading.Thread(target=then).start()
            return True

        log.addFilter(see)

    yield call
    log.filters.clear()


@pytest.mark.slow
def test_stop_from_another_thread(when_waiting):
    events: list[Event] = []
    device = client(on_event=events.append)
    again: list[EdgeError] = []

    def stop() -> None:
        try:
            device.run()
        except EdgeError as error:
            again.append(error)
        device.stop()

    when_waiting(stop)
    device.run()
    assert events == [Event("ended", "device stopped")]
    assert "runs already" in str(again[0])
    device.run()  # stopped for good
    assert len(events) == 1


@pytest.mark.slow
def test_ctrl_c_ends_run(when_waiting):
    """As a program gets it that has no handler of its own."""
    import _thread

    events: list[Event] = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        when_waiting(_thread.interrupt_main)
        client(on_event=events.append).run()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [event.kind for event in events] == ["ended"]


def test_no_shard_is_left_after_an_error(tmp_path, monkeypatch):
    """The training process fails: it imports the module, which is there and broken."""
    (tmp_path / "broken_of_test_client.py").write_text("import no_such_module_anywhere")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EdgeError, match="no_such_module_anywhere"):
        client(imports=["broken_of_test_client"]).run()


def test_a_file_is_read_by_the_training_process_only(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.npz"):
        client(tmp_path / "nowhere.npz").run()


# -- data -----------------------------------------------------------------------------------------


class Items:
    """A Dataset of what it is given."""

    def __init__(self, *items: object) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> object:
        return self._items[index]


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


def test_dataset_and_arrays_make_the_same_shard():
    arrays, items = (X, Y), Items(*zip(torch.from_numpy(X), Y.tolist(), strict=True))
    for source in (arrays, items):
        with shard_of(checked_source(source)) as path:
            found = load_shard(path)
            assert [file.name for file in Path(path).parent.iterdir()] == ["shard.npz"]
        np.testing.assert_array_equal(found.x, X)
        np.testing.assert_array_equal(found.y, Y)
        assert found.num_classes == 3


def test_bytes_are_scaled_as_in_a_file():
    x = np.full((3, 4, 4), 255, np.uint8)  # 255 / 127.5 - 1 = 1
    for source in ((x, np.arange(3)), Items(*zip(x, range(3), strict=True))):
        with shard_of(checked_source(source)) as path:
            found = load_shard(path)
        assert found.x.shape == (3, 1, 4, 4)
        assert (found.x == 1).all()


def spoilt(value: float) -> np.ndarray:
    x = X.copy()
    x[5, 0, 1, 1] = value
    return x


@pytest.mark.parametrize(("data", "said"), [
    ((X, Y, Y), "a tuple of 3"),
    (X, "got ndarray, expected a path, (x, y) arrays, or a Dataset"),
    (None, "got NoneType"),
    ({"x": X, "y": Y}, "got dict"),
    (Endless(), "got Endless, expected"),
    ((X[:, 0, 0], Y), "x of shape (12, 8), float32, expected (n, C, H, W)"),
    ((X.astype(int), Y), "x of dtype int64"),
    ((X, Y.astype(float)), "y of dtype float64, expected integers"),
    ((X, Y - 1), "labels from -1 to 1"),
    ((X, Y[:-1]), "y of shape (11,)"),
    ((spoilt(np.nan), Y), "first at 5"),
    ((spoilt(1.0).astype(float) * 1e300, Y), "NaN or infinite values in 12"),
    ((X[:0], Y[:0]), "empty data"),
    ((X[:2], Y[:2]), "2 examples, at least 3"),
    (([[1.0], [1.0, 2.0]], [0, 0]), "got ValueError"),
    (Items(), "a length of 0"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_data_are_checked_before_anything_runs(data, said):
    with pytest.raises(DataError) as caught:
        client(data)
    assert said in one_line(caught.value)


@pytest.mark.parametrize(("items", "said"), [
    ([(X[0], 0), (X[1], 1), (X[2, :, :4], 2)], "data[2]: got (1, 4, 8) of float32"),
    ([(X[0], 0), (X[1], 1), X[2]], "data[2]: got ValueError"),
    ([(X[0], 0), (X[1], 0.5), (X[2], 1)], "data[1]: got TypeError"),
    ([(X[0], 0), (X[1], -1), (X[2], 1)], "labels from -1 to 1"),
    ([(X[0, 0, 0], 0)] * 3, "x of shape (3, 8)"),
    ([(spoilt(np.inf)[5], 0)] * 3, "infinite values in 3 examples"),
    ([(X[0].astype(int), 0)] * 3, "data[0]: got an input of int64"),
    ([(X[0, :0], 0)] * 3, "data[0]: got an empty input"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_items_are_checked_before_anything_runs(items, said):
    with pytest.raises(DataError) as caught:
        client(Items(*items)).run()
    assert said in one_line(caught.value)


def test_a_full_disk_is_one_line():
    """Not SIGBUS, as it would be through a map of the file that is written."""
    items = checked_source(Items(*zip(X, Y, strict=True)))
    with pytest.raises(DataError, match=r"No space left on device.*free space, or set TMPDIR"):
        own_data._gathered(items, Path("/dev/full"))


# -- the other arguments --------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "said"), [
    ({"coordinator": "localhost:5555"}, 'coordinator: got "localhost:5555", expected the coordin'),
    ({"coordinator": None}, "coordinator: got"),
    ({"id": "a b"}, 'id: got "a b", expected a name'),
    ({"memory_cap": "much"}, 'memory_cap: got "much"'),
    ({"threads": -1}, "threads: got -1, expected a number from 0"),
    ({"device": "meta"}, 'device: got "meta"'), ({"ignore_conditions": 1}, "ns: got 1, expected"),
    ({"imports": "my_models"}, "imports: got \"my_models\", expected a list"),
    ({"imports": ["__main__"]}, "put the model family into a module of its own"),
    ({"imports": ["no_such_module_anywhere"]}, "no module 'no_such_module_anywhere'"),
    ({"imports": ["no_such_module.anywhere"]}, "no module 'no_such_module.anywhere'"),
    ({"insecure": False, "keys": "nowhere"}, "device.public cannot be read"),
], ids=lambda value: str(next(iter(value))) if isinstance(value, dict) else "")  # fmt: skip
def test_arguments_are_checked(options, said):
    with pytest.raises(ConfigError) as caught:
        client(**options)
    assert said in one_line(caught.value)


def test_a_program_that_imports_itself_does_not_start_itself_for_ever(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import numpy as np\nfrom edge_sdk import Client\nx = np.zeros((3, 1, 4))\n"
        f"Client('{NOWHERE}', data=(x, np.arange(3)), insecure=True, imports=['program']).run()\n"
    )
    ended = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, check=False, cwd=tmp_path,
        env=environment("self") | {"PYTHONPATH": str(ROOT)}, timeout=PATIENCE_S,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith("edge_sdk.errors.TrainerError: a module of")
