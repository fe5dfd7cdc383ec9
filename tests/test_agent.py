"""The real agent and its real training process against a scripted coordinator; the choice of depth.

Most tests share one device, as a training process takes seconds to start. settle() brings it back
to a known state: welcome, ready, no job.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from msgspec.structs import replace

from coordinator.admission import Admission, add_client
from coordinator.hub import Hub
from edge_sdk import agent as agent_module
from edge_sdk import agent_state
from edge_sdk.agent import Agent
from edge_sdk.agent_options import AgentOptions
from edge_sdk.capacity import Moment, SegmentCost, peak_bytes
from edge_sdk.chooser import Chooser
from edge_sdk.conditions import Conditions
from edge_sdk.data import Examples, save_shard
from edge_sdk.errors import DataError, EdgeError, LinkError
from edge_sdk.keys import make_keys
from edge_sdk.models import initial_tensors
from edge_sdk.models.staged import needed_names, trained_names
from edge_sdk.profile import DeviceProfile
from edge_sdk.tensors import Tensors, specs_of
from edge_sdk.transport import Link
from edge_sdk.wire import (
    PROTOCOL,
    Accepted,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    ModelSpec,
    Part,
    Plan,
    Probe,
    Ready,
    Segment,
    Update,
    Welcome,
)
from tests.helpers import cnn, examples
from tests.scripted import ANY_PORT, PROFILE, WAIT_S, floats
from tests.scripted_coordinator import ScriptedCoordinator

GIB = 1024**3
MODEL = cnn()  # three exits
WHOLE = Plan(segments=(Segment(first=1, last=3),), batch_size=8)
LONG = replace(WHOLE, epochs=100_000)  # hours
NAN = float("nan")


class Device:
    """An agent that runs in a thread. A test may change its `memory_bytes` and `conditions`."""

    def __init__(
        self, link: Link, data: Path, *, is_once: bool = False, notify_socket: str = ""
    ) -> None:
        self.data = data
        self.memory_bytes = 64 * GIB
        self.conditions = Conditions()
        self.error: EdgeError | None = None
        self.agent = Agent(
            link,
            AgentOptions(
                client_id="device",
                data=str(data),
                measure=self.measure,
                conditions=lambda: self.conditions,
                threads=1,
                measure_compute=False,
                is_once=is_once,
                notify_socket=notify_socket,
            ),
        )
        # Pauses that are seconds on a board, like those in quick_retries.
        self.agent._state.hello_pause_s = self.agent._state.refused_pause_s = 0.1
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def measure(self, own_bytes: int) -> DeviceProfile:
        return replace(PROFILE, memory_available_bytes=self.memory_bytes, memory_bound="cap")

    def trainer(self) -> psutil.Process:
        """Its training process."""
        children = psutil.Process().children()
        (found,) = [child for child in children if str(self.data) in child.cmdline()]
        return found

    def ends(self) -> EdgeError | None:
        """Wait for the end of run(); what it raised."""
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return self.error

    def stop(self) -> None:
        self.agent.stop()
        self.ends()

    def _run(self) -> None:
        try:
            self.agent.run()
        except EdgeError as error:
            self.error = error


class Lines(logging.Handler):
    """The agent's lines of log with this text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.count = 0
        self._text = text
        self._is_there = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        if self._text in record.getMessage():
            self.count += 1
            self._is_there.set()

    def wait_for_one(self) -> None:
        assert self._is_there.wait(WAIT_S), f"no line says {self._text!r}"


@contextmanager
def listening(text: str) -> Iterator[Lines]:
    lines = Lines(text)
    logger = logging.getLogger("edge_sdk.agent")
    logger.addHandler(lines)
    try:
        yield lines
    finally:
        logger.removeHandler(lines)


@contextmanager
def running(
    endpoint: str, data: Path, examples_there: Examples | None = None, **options: Any
) -> Iterator[Device]:
    """A device of its own for one test."""
    if examples_there is not None:
        save_shard(data, examples_there)
    device = Device(Link(endpoint, None, None), data, **options)
    try:
        yield device
    finally:
        device.stop()


@pytest.fixture(scope="module")
def quick_retries():
    """Pauses that are seconds on a board."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_module, "HELLO_S", 0.1)
        patch.setattr(agent_state, "HELLO_MAX_S", 0.5)
        patch.setattr(agent_module, "RESTART_S", 0.1)
        yield


@pytest.fixture(scope="module")
def pair(quick_retries, tmp_path_factory):
    """A coordinator and a device that has said hello to it."""
    coordinator = ScriptedCoordinator()
    data = tmp_path_factory.mktemp("shard") / "shard.npz"
    try:
        with running(coordinator.endpoint, data, examples(24)) as device:
            coordinator.expect(Hello)
            yield coordinator, device
    finally:
        coordinator.close()


@pytest.fixture
def settled(pair):
    """The same, welcome and ready without a job; whatever a test before has left is gone."""
    settle(*pair)
    return pair


def settle(coordinator: ScriptedCoordinator, device: Device) -> None:
    device.memory_bytes = 64 * GIB
    coordinator.drain()
    # says hello anyway if its link was lost
    coordinator.hub.send(coordinator.route, Fault(code="hello", detail="say it again"))
    coordinator.wait_for(Hello)
    coordinator.run += 1
    coordinator.welcome(MODEL, WHOLE)  # of another run: a job in hand is dropped
    coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
    coordinator.wait_for(Heartbeat, lambda heartbeat: heartbeat.round == 0)


def job_tensors(plan: Plan, spec: ModelSpec = MODEL) -> Tensors:
    initial = initial_tensors(spec, 0)
    return {name: initial[name] for name in needed_names(initial, plan.segments)}


def give(coordinator: ScriptedCoordinator, round: int, plan: Plan) -> None:
    """A job with all its parts."""
    sender = coordinator.give(round, MODEL, plan, job_tensors(plan))
    coordinator.serve_parts(round, sender)


def finish(coordinator: ScriptedCoordinator, round: int, plan: Plan = WHOLE) -> Update:
    """A whole job; the device is ready afterwards."""
    give(coordinator, round, plan)
    update = coordinator.expect(Update)
    assert update.round == round
    coordinator.fetch_update(update)
    coordinator.send(Accepted(round=round))
    coordinator.expect(Ready)
    return update


# -- joining -----------------------------------------------------------------------------------


def test_joins_and_says_what_it_can_train(pair):
    coordinator, _ = pair
    coordinator.send(Fault(code="hello", detail="who is this?"))
    hello = coordinator.wait_for(Hello)
    assert (hello.protocol, hello.client_id, hello.round) == (PROTOCOL, "device", 0)
    assert (hello.num_examples, hello.input_shape, hello.num_classes) == (24, (1, 8, 8), 3)
    assert hello.profile.memory_available_bytes == 64 * GIB
    again = coordinator.expect(Hello)  # until it is welcome
    assert again.session == hello.session
    coordinator.welcome(MODEL, WHOLE)
    ready = coordinator.wait_for(Ready)
    assert (ready.exit, ready.stages) == (3, ())
    assert ready.reason == "exit 3 is the deepest of the model"
    assert coordinator.expect(Heartbeat).round == 0


def test_coordinator_absent_at_first_and_over_in_the_end(quick_retries, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = tmp_path / "shard.npz"
    coordinator = ScriptedCoordinator()
    coordinator.hang_up()
    try:
        with (
            listening("not reached yet") as lines,
            running(coordinator.endpoint, data, examples(24), is_once=True) as device,
        ):
            lines.wait_for_one()
            coordinator.listen_again()
            coordinator.expect(Hello)
            coordinator.welcome(MODEL, WHOLE)
            coordinator.wait_for(Ready)
            coordinator.send(Bye(reason="coordinator stopped"))
            coordinator.wait_for(Bye)  # its answer
            coordinator.expect(Hello)  # the run goes on some day
            coordinator.welcome(MODEL, WHOLE)
            coordinator.send(Bye(reason="run finished", is_final=True))
            coordinator.wait_for(Bye)
            assert device.ends() is None
    finally:
        coordinator.close()
    assert lines.count == 1


def test_device_of_one_class_is_warned_about_and_leaves_with_bye(tmp_path):
    data = tmp_path / "shard.npz"
    coordinator = ScriptedCoordinator()
    try:
        with (
            listening("all 12 local examples have one label") as lines,
            running(coordinator.endpoint, data, replace_labels(examples(12), 2)),
        ):
            hello = coordinator.expect(Hello)
            assert (hello.num_examples, hello.num_classes) == (12, 3)
            lines.wait_for_one()
            coordinator.welcome(MODEL, WHOLE)
            coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
        assert coordinator.wait_for(Bye).reason == "device stopped"
    finally:
        coordinator.close()


def replace_labels(data: Examples, label: int) -> Examples:
    return Examples(x=data.x, y=np.full_like(data.y, label), num_classes=data.num_classes)


def test_refused_key_is_tried_again(tmp_path):
    names = ("server", "device", "other")
    keys = {name: make_keys(tmp_path, name) for name in names}
    add_client(tmp_path / "clients", "other", keys["other"].public)
    hub = Hub(ANY_PORT, keys["server"], Admission(tmp_path / "clients"))
    data = tmp_path / "shard.npz"
    save_shard(data, examples(24))
    with listening("does not know this device's key") as lines:
        device = Device(Link(hub.endpoint, keys["device"], keys["server"].public), data)
        try:
            lines.wait_for_one()
            add_client(tmp_path / "clients", "device", keys["device"].public)
            _, received = hub.receive(int(1000 * WAIT_S))
        finally:
            device.stop()
            hub.close()
    assert received is not None
    assert (received.name, type(received.message)) == ("device", Hello)


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "shard.npz"),
        (lambda path: write(path, b"PK\x03\x04 not a zip file"), "shard.npz"),
        (lambda path: write(path, b""), "shard.npz"),
    ],
    ids=["missing", "corrupt", "empty"],
)
def test_bad_data_file_is_one_clear_error(tmp_path, make, message):
    path = tmp_path / "shard.npz"
    make(path)
    with running("tcp://127.0.0.1:9", path) as device:
        error = device.ends()
    assert isinstance(error, DataError)
    assert message in str(error)
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (Fault(code="admission", detail="this is 'a'"), LinkError, "refused .*: this is 'a'"),
        (
            Welcome(protocol=99, run="r", model=MODEL, plan=WHOLE, deadline_s=0.0, heartbeat_s=1.0),
            LinkError,
            f"protocol 99, this side {PROTOCOL}",
        ),
    ],
    ids=["admission", "version"],
)
def test_refused_device_ends_with_the_reason(tmp_path, answer, kind, message):
    coordinator = ScriptedCoordinator()
    try:
        with running(coordinator.endpoint, tmp_path / "shard.npz", examples(24)) as device:
            coordinator.expect(Hello)
            coordinator.send(answer)
            error = device.ends()
        assert isinstance(error, kind)
        assert re.search(message, str(error))
    finally:
        coordinator.close()


# -- jobs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "segments",
    [
        (Segment(first=1, last=3),),
        (Segment(first=1, last=1),),
        (Segment(first=3, last=3),),
        (Segment(first=1, last=1), Segment(first=2, last=2)),
    ],
)
def test_update_has_exactly_what_was_trained(settled, segments):
    coordinator, _ = settled
    plan = replace(WHOLE, segments=segments, epochs=2)
    sent = job_tensors(plan)
    sender = coordinator.give(1, MODEL, plan, sent)
    coordinator.serve_parts(1, sender)
    update = coordinator.expect(Update)
    trained = trained_names(sent, segments)
    want = {name: sent[name] for name in trained}
    assert update.tensors == specs_of(want)
    got = coordinator.fetch_update(update)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in got.values())
    assert any(not torch.equal(got[name], want[name]) for name in trained)
    exits = [exit for g in segments for exit in range(g.first, g.last + 1)]
    assert [result.exit for result in update.exits] == exits
    # 24 examples in batches of 8, 2 epochs, each segment
    assert (update.num_examples, update.num_steps) == (24, 6 * len(segments))
    assert (update.round, update.retries) == (1, 0)
    assert list(update.phases) == ["wait", "download", "load", "train"]
    coordinator.send(Accepted(round=1))
    assert coordinator.expect(Ready).exit == 3


def test_job_goes_to_the_trainer_with_what_it_may_keep(settled):
    """Stage 3 of 24 examples keeps (5, 2, 2) features of 4 bytes where they fit, and trains alike
    where they do not."""
    coordinator, device = settled
    plan = replace(WHOLE, segments=(Segment(first=3, last=3),), epochs=2)
    coordinator.run += 1
    coordinator.welcome(MODEL, plan)  # of two epochs, or there is no use for a cache
    coordinator.wait_for(Ready, lambda ready: ready.exit == 3)
    kept = 24 * 5 * 2 * 2 * 4
    assert device.agent._chooser.cache_bytes(plan.segments) == kept
    (row,) = [c for c in device.agent._chooser.costs if (c.first, c.last) == (3, 3)]
    trained = []
    for round, memory_bytes in ((1, 64 * GIB), (2, peak_bytes(row) - 1)):
        device.memory_bytes = memory_bytes
        coordinator.wait_for(Heartbeat)
        coordinator.wait_for(Heartbeat)  # chosen anew for this memory
        sender = coordinator.give(round, MODEL, plan, job_tensors(plan))
        coordinator.wait_for(Fetch)
        coordinator.send_parts(round, sender, range(sender.num_parts))
        trained.append(coordinator.fetch_update(coordinator.wait_for(Update)))
        bound = device.agent._chooser.cache_bytes(plan.segments)
        assert bound == (kept if round == 1 else 0)
        coordinator.send(Accepted(round=round))
    for name, tensor in trained[0].items():
        assert torch.allclose(tensor, trained[1][name], rtol=0, atol=1e-6), name


def test_heartbeats_go_on_while_it_trains(settled):
    coordinator, _ = settled
    give(coordinator, 5, LONG)
    for _ in range(3):
        assert coordinator.expect(Heartbeat).round == 5
    coordinator.send(Fault(code="late", detail="closed", round=4))  # of another round
    assert coordinator.expect(Heartbeat).round == 5
    coordinator.send(Fault(code="late", detail="closed", round=5))
    assert coordinator.wait_for(Ready).exit == 3
    assert coordinator.expect(Heartbeat).round == 0
    finish(coordinator, 6)


def test_job_beyond_its_choice_is_refused(settled):
    coordinator, _ = settled
    plan = replace(WHOLE, segments=(Segment(first=2, last=3),))
    coordinator.give(1, MODEL, plan, job_tensors(plan))
    fault = coordinator.expect(Fault)
    assert (fault.code, fault.round) == ("capacity", 1)
    assert "stages 2-3 asked for, this device trains up to exit 3" in fault.detail
    assert coordinator.expect(Ready).exit == 3
    assert coordinator.expect(Heartbeat).round == 0


def test_newer_job_ends_the_older(settled):
    coordinator, _ = settled
    give(coordinator, 1, LONG)
    coordinator.expect(Heartbeat)
    sender = coordinator.give(2, MODEL, WHOLE, job_tensors(WHOLE))
    coordinator.wait_for(Fetch)
    coordinator.send_parts(2, sender, range(sender.num_parts))
    assert coordinator.wait_for(Update).round == 2


def nan_tensor() -> Tensors:
    tensors = job_tensors(WHOLE)
    return {**tensors, "exits.0.2.bias": torch.full_like(tensors["exits.0.2.bias"], NAN)}


@pytest.mark.parametrize(
    ("spec", "tensors", "code", "detail"),
    [
        (MODEL, nan_tensor(), "tensors", "job: exits.0.2.bias holds NaN"),
        (MODEL, {"stages.0.0.weight": floats(3)}, "tensors", "job lacks tensors exits.0.2.bias"),
        (
            MODEL,
            {**job_tensors(WHOLE), "exits.0.2.bias": floats(7)},
            "tensors",
            r"'exits.0.2.bias' is (7,)",
        ),
        (replace(MODEL, family="resnet"), job_tensors(WHOLE), "config", "resnet"),
        (replace(MODEL, input_shape=(1, 9, 9)), job_tensors(WHOLE), "data", "(1, 9, 9)"),
        (replace(MODEL, exit=2), job_tensors(WHOLE), "config", "exceeds exit 2"),
    ],
    ids=["NaN", "missing", "shape", "family", "data", "segments"],
)
def test_job_that_cannot_be_trained(settled, spec, tensors, code, detail):
    coordinator, _ = settled
    sender = coordinator.give(1, spec, WHOLE, tensors)
    coordinator.serve_parts(1, sender)
    fault = coordinator.expect(Fault)
    assert (fault.code, fault.round) == (code, 1)
    assert detail in fault.detail
    assert coordinator.expect(Ready).exit == 3
    finish(coordinator, 2)


def test_part_of_wrong_size_ends_the_job(settled):
    coordinator, _ = settled
    coordinator.give(1, MODEL, WHOLE, job_tensors(WHOLE))
    coordinator.expect(Fetch)
    coordinator.send(Part(round=1, index=0), b"short")
    fault = coordinator.expect(Fault)
    assert (fault.code, fault.round) == ("protocol", 1)
    assert "part 0 has 5 bytes" in fault.detail
    coordinator.expect(Ready)


def test_frame_that_is_no_message(settled):
    coordinator, _ = settled
    coordinator.hub.socket.send_multipart([coordinator.route, b"\xc1"])
    fault = coordinator.expect(Fault)
    assert (fault.code, fault.round) == ("protocol", 0)
    assert "not msgpack" in fault.detail
    finish(coordinator, 1)


def test_parts_and_fetches_of_other_rounds_are_ignored(settled):
    coordinator, _ = settled
    coordinator.send(Part(round=1, index=0), b"no job")
    coordinator.send(Fetch(round=1, have=0, first=0, count=1))
    sender = coordinator.give(2, MODEL, WHOLE, job_tensors(WHOLE))
    coordinator.send(Part(round=1, index=0), b"of the last round")
    coordinator.serve_parts(2, sender)
    update = coordinator.expect(Update)
    coordinator.send(Fetch(round=1, have=0, first=0, count=1))
    coordinator.send(Accepted(round=1))
    coordinator.fetch_update(update)


def test_welcome_to_another_run_drops_the_job(settled):
    coordinator, _ = settled
    give(coordinator, 1, LONG)
    assert coordinator.expect(Heartbeat).round == 1
    coordinator.run += 1
    coordinator.welcome(MODEL, WHOLE)
    assert coordinator.expect(Ready).exit == 3
    coordinator.wait_for(Heartbeat, lambda heartbeat: heartbeat.round == 0)
    finish(coordinator, 1)


def test_welcome_to_the_same_run_keeps_the_job(settled):
    coordinator, _ = settled
    give(coordinator, 1, LONG)
    coordinator.expect(Heartbeat)
    coordinator.send(Fault(code="hello", detail="who is this?"))
    assert coordinator.expect(Hello).round == 1
    coordinator.welcome(MODEL, WHOLE)
    assert coordinator.expect(Ready).exit == 3
    assert coordinator.expect(Heartbeat).round == 1


# -- the link ----------------------------------------------------------------------------------


def test_link_lost_in_mid_download(settled):
    coordinator, _ = settled
    twelve_parts = {"stages.0.0.weight": floats(12 * 131_072)}  # 12 * 524288 bytes
    sender = coordinator.give(1, MODEL, WHOLE, twelve_parts)
    fetch = coordinator.expect(Fetch)
    assert (fetch.first, fetch.count) == (0, 8)
    coordinator.send_parts(1, sender, range(4))
    for have in (1, 2, 3):
        fetch = coordinator.expect(Fetch)  # nothing more while over four are under way
        assert (fetch.have, fetch.count) == (have, 0)
    fetch = coordinator.expect(Fetch)
    assert (fetch.have, fetch.first, fetch.count) == (4, 8, 4)
    coordinator.hang_up()
    coordinator.listen_again()
    hello = coordinator.expect(Hello)
    assert (hello.round, hello.job) == (1, coordinator.job.id)
    coordinator.welcome(MODEL, WHOLE)
    coordinator.expect(Ready)
    fetch = coordinator.expect(Fetch)
    assert (fetch.have, fetch.first, fetch.count) == (4, 4, 8)
    coordinator.send_parts(1, sender, range(4, 12))
    fetch = coordinator.wait_for(Fetch, lambda fetch: fetch.have == 12)
    assert fetch.count == 0  # nothing is lacking any more
    fault = coordinator.expect(Fault)  # it is no model, but it arrived
    assert (fault.code, fault.round) == ("tensors", 1)


def test_link_lost_in_mid_upload(settled):
    coordinator, _ = settled
    give(coordinator, 1, WHOLE)
    update = coordinator.expect(Update)
    session = hang_up_and_come_back(coordinator)
    again = coordinator.expect(Update)
    assert again == replace(update, retries=1)
    first = coordinator.fetch_update(again)
    assert hang_up_and_come_back(coordinator) == session  # accepted was lost
    third = coordinator.expect(Update)
    assert third == replace(update, retries=2)
    second = coordinator.fetch_update(third)
    assert all(torch.equal(first[name], second[name]) for name in first)
    coordinator.send(Accepted(round=1))
    coordinator.expect(Ready)


def hang_up_and_come_back(coordinator: ScriptedCoordinator) -> str:
    coordinator.hang_up()
    coordinator.listen_again()
    hello = coordinator.expect(Hello)
    assert hello.round == 1
    coordinator.welcome(MODEL, WHOLE)
    coordinator.expect(Ready)
    return hello.session


def test_bye_of_a_coordinator_that_will_be_back_keeps_the_job(settled):
    coordinator, _ = settled
    give(coordinator, 1, WHOLE)
    update = coordinator.expect(Update)
    assert update.job == coordinator.job.id
    coordinator.send(Bye(reason="coordinator stopped"))
    assert coordinator.wait_for(Bye).reason == "bye"
    hello = coordinator.expect(Hello)
    assert (hello.round, hello.job) == (1, update.job)
    coordinator.welcome(MODEL, WHOLE)
    coordinator.expect(Ready)
    assert coordinator.expect(Update) == replace(update, retries=1)


def test_final_bye_drops_the_job_and_says_hello_again(settled):
    coordinator, _ = settled
    give(coordinator, 1, LONG)
    coordinator.expect(Heartbeat)
    coordinator.send(Bye(reason="run finished", is_final=True))
    coordinator.wait_for(Bye)
    hello = coordinator.expect(Hello)
    assert (hello.round, hello.job) == (0, None)


def test_the_same_job_again_goes_on_and_another_begins_anew(settled):
    """A coordinator that was restarted gives what the device has in hand already."""
    coordinator, _ = settled
    twelve_parts = {"stages.0.0.weight": floats(12 * 131_072)}
    sender = coordinator.give(1, MODEL, WHOLE, twelve_parts)
    assert coordinator.expect(Fetch).count == 8
    coordinator.send_parts(1, sender, range(4))
    assert coordinator.wait_for(Fetch, lambda fetch: fetch.have == 4).count == 4
    coordinator.send(coordinator.job)
    fetch = coordinator.expect(Fetch)
    assert (fetch.have, fetch.first, fetch.count) == (4, 4, 8)
    coordinator.send(replace(coordinator.job, id="f" * 32))
    assert coordinator.expect(Ready).exit == 3  # the old one is dropped
    fetch = coordinator.expect(Fetch)
    assert (fetch.have, fetch.first, fetch.count) == (0, 0, 8)


def test_probe_is_answered_at_once(settled):
    coordinator, _ = settled
    coordinator.run += 1
    coordinator.welcome(MODEL, WHOLE, heartbeat_s=3600.0)
    coordinator.wait_for(Ready)
    coordinator.drain()
    coordinator.send(Probe())
    assert coordinator.expect(Heartbeat).round == 0
    coordinator.give(7, MODEL, WHOLE, job_tensors(WHOLE))
    coordinator.expect(Fetch)
    coordinator.send(Probe())
    assert coordinator.expect(Heartbeat).round == 7


# -- memory ------------------------------------------------------------------------------------


def test_memory_too_small_for_exit_1_and_more_later(settled, caplog):
    coordinator, device = settled
    device.memory_bytes = 1024**2
    ready = coordinator.expect(Ready)
    assert ready.exit == 0
    assert "1.0 MiB available (cap)" in ready.reason
    lines = [line for line in caplog.messages if "too small for exit 1" in line]
    assert len(lines) == 1
    assert ready.reason in lines[0]
    coordinator.give(1, MODEL, WHOLE, job_tensors(WHOLE))
    fault = coordinator.expect(Fault)
    assert (fault.code, fault.round) == ("capacity", 1)
    assert coordinator.expect(Ready).exit == 0
    device.memory_bytes = 64 * GIB
    assert coordinator.expect(Ready).exit == 3
    finish(coordinator, 2)


def test_model_that_cannot_be_built(settled):
    coordinator, _ = settled
    coordinator.welcome(replace(MODEL, family="resnet"), WHOLE)
    ready = coordinator.expect(Ready)
    assert ready.exit == 0
    assert "resnet" in ready.reason


def test_trainer_killed_in_mid_job(settled):
    coordinator, device = settled
    give(coordinator, 1, LONG)
    assert coordinator.expect(Heartbeat).round == 1
    trainer = device.trainer()
    trainer.kill()
    fault = coordinator.expect(Fault)
    assert (fault.code, fault.round) == ("trainer", 1)
    assert "killed by signal 9" in fault.detail
    ready = coordinator.expect(Ready)
    assert (ready.exit, ready.reason) == (0, "costs are not counted yet")
    less = coordinator.expect(Ready)  # of the trainer that took its place
    assert less.exit
    assert "failed here before" in less.reason  # an exit or a lever less
    assert device.trainer().pid != trainer.pid
    plan = replace(WHOLE, segments=(Segment(first=1, last=less.exit),))
    finish(coordinator, 2, plan)
    device.memory_bytes *= 2
    assert coordinator.expect(Ready).exit == 3


def test_trainer_killed_while_idle(settled):
    coordinator, device = settled
    device.trainer().kill()
    assert coordinator.expect(Ready).exit == 0
    assert coordinator.expect(Ready).exit == 3  # nothing was tried, so nothing was too large
    finish(coordinator, 1)


# -- the choice, without processes -------------------------------------------------------------


def cost(first: int, last: int, mebibytes: float, flops: float = 1e9) -> SegmentCost:
    """A segment whose peak is so much: parameters only, which count once."""
    return SegmentCost(
        first=first,
        last=last,
        parameter_bytes=int(mebibytes * 1024**2),
        gradient_bytes=0,
        optimizer_bytes=0,
        moments=(Moment(),),
        cache_bytes=0,
        runtime_bytes=0,
        allowance=1.45,
        flops_per_example=flops,
        frozen_flops_per_example=0.0,
        upload_bytes=0,
        download_bytes=0,
    )


# Prefixes take 100, 200, 300 MiB and 1, 2, 3 GFLOP per example; stages alone 110 and 120.
COSTS = (
    cost(1, 1, 100, 1e9),
    cost(1, 2, 200, 2e9),
    cost(1, 3, 300, 3e9),
    cost(2, 2, 110, 1e9),
    cost(3, 3, 120, 1e9),
)


def welcome(deadline_s: float = 0.0, epochs: int = 1) -> Welcome:
    plan = replace(WHOLE, epochs=epochs)
    return Welcome(
        protocol=PROTOCOL, run="r", model=MODEL, plan=plan, deadline_s=deadline_s, heartbeat_s=1.0
    )


def with_memory(mebibytes: float) -> DeviceProfile:
    return replace(PROFILE, memory_available_bytes=int(mebibytes * 1024**2))


@pytest.fixture
def chooser():
    made = Chooser()
    made.costs = COSTS
    return made


def choose(chooser: Chooser, mebibytes: float, **terms: Any) -> tuple[int, tuple[int, ...]]:
    chooser.choose(with_memory(mebibytes), welcome(**terms), num_examples=10)
    assert chooser.choice is not None
    return chooser.choice.exit, chooser.choice.stages


def segments(*pairs: tuple[int, int]) -> list[Segment]:
    return [Segment(first=first, last=last) for first, last in pairs]


@pytest.mark.parametrize(
    ("mebibytes", "exit", "stages"),
    [
        (99, 0, ()),
        (100, 1, ()),
        (110, 1, (2,)),
        (120, 1, (2, 3)),
        (200, 2, (3,)),
        (299, 2, (3,)),
        (300, 3, ()),
    ],
)
def test_choice_by_memory(chooser, mebibytes, exit, stages):
    assert choose(chooser, mebibytes) == (exit, stages)


def test_choice_by_deadline(chooser):
    # 10 examples, 2 epochs, 10 GFLOP/s: 2 s to exit 1, 4 s to exit 2, 6 s to exit 3, 2 s a stage
    assert choose(chooser, 1000, deadline_s=6.0, epochs=2) == (3, ())
    assert choose(chooser, 1000, deadline_s=5.9, epochs=2) == (2, (3,))
    assert choose(chooser, 1000, deadline_s=1.9, epochs=2) == (0, ())
    assert "the deadline is 1.9 s" in chooser.choice.reason


def test_seconds_are_told_when_they_change(chooser):
    # as above: exit 1 in 2 s, a stage in 2 s
    assert choose(chooser, 120, deadline_s=4.0, epochs=2) == (1, (2, 3))
    assert (chooser.choice.prefix_s, chooser.choice.stage_s) == (2.0, (2.0, 2.0))
    longer = welcome(deadline_s=40.0, epochs=4)
    assert chooser.choose(with_memory(120), longer, num_examples=10)
    assert (chooser.choice.prefix_s, chooser.choice.stage_s) == (4.0, (4.0, 4.0))
    assert not chooser.choose(with_memory(120), longer, num_examples=10)


def test_features_are_kept_as_predicted(chooser):
    # stage 2 keeps 20 MiB beside the 120 of the model up to stage 3: 140; stage 3 keeps 5: 125
    kept = {2: 20 * 1024**2, 3: 5 * 1024**2}
    chooser.costs = tuple(
        replace(c, cache_bytes=kept[c.first]) if c.first > 1 else c for c in COSTS
    )
    assert chooser.cache_bytes(segments((2, 2))) == 0  # nothing chosen yet
    assert choose(chooser, 140) == (1, (2, 3))
    assert chooser.cache_bytes(segments((1, 1))) == 0
    assert chooser.cache_bytes(segments((1, 1), (2, 2))) == kept[2]
    assert chooser.cache_bytes(segments((3, 3))) == kept[3]
    assert chooser.cache_bytes(segments((2, 2), (3, 3))) == kept[2]
    assert choose(chooser, 139) == (1, (2, 3))
    assert chooser.cache_bytes(segments((1, 1), (2, 2))) == 0
    assert chooser.cache_bytes(segments((1, 1), (3, 3))) == kept[3]
    assert chooser.cache_bytes(segments((2, 2), (3, 3))) == 0  # those of stage 2 must not be kept


def test_choose_tells_whether_the_choice_changed(chooser):
    def told(mebibytes: float) -> bool:
        return bool(chooser.choose(with_memory(mebibytes), welcome(), num_examples=10))

    assert told(200)
    assert not told(250)
    assert told(300)
    assert told(110)
    assert told(120)  # the same exit, another stage


def test_nothing_is_chosen_before_the_costs_are_counted():
    chooser = Chooser()
    assert "has not chosen" in chooser.refusal(segments((1, 1)))
    assert choose(chooser, 1000) == (0, ())
    assert chooser.choice is not None
    assert chooser.choice.reason == "costs are not counted yet"
    assert "costs are not counted yet" in chooser.refusal(segments((1, 1)))


def test_prefix_that_failed_is_not_tried_until_memory_grows(chooser):
    assert choose(chooser, 400) == (3, ())
    line = chooser.failed(segments((1, 3)), 400 * 1024**2)
    assert line == (
        "training stages 1-3 failed for memory, predicted 300.0 MiB; at most 270.0 MiB from now on"
    )
    assert choose(chooser, 400) == (2, (3,))  # stage 3 alone takes 120
    assert chooser.choice.reason.endswith("; more than 270.0 MiB failed here before")
    assert choose(chooser, 500) == (2, (3,))  # 1.25 times 400 is not more than that
    assert choose(chooser, 501) == (3, ())
    assert choose(chooser, 400) == (3, ())  # forgotten


def test_every_failure_takes_one_exit_more(chooser):
    # exit 1 first beside the weights of stage 3, 120 in all, then without
    for exit, stages in [(3, ()), (2, (3,)), (1, (2, 3)), (1, ())]:
        assert choose(chooser, 400) == (exit, stages)
        chooser.failed(segments((1, exit)), 400 * 1024**2)
    assert choose(chooser, 400) == (0, ())
    assert "needs 100.0 MiB, 90.0 MiB available" in chooser.choice.reason
    assert choose(chooser, 501) == (3, ())


def test_stage_that_failed_leaves_what_takes_less(chooser):
    assert choose(chooser, 120) == (1, (2, 3))
    chooser.failed(segments((1, 1), (3, 3)), 120 * 1024**2)  # 120, so 108 from now on
    assert choose(chooser, 120) == (1, ())
    assert chooser.choice.stage_s == ()
    assert choose(chooser, 151) == (1, (2, 3))


def with_levers(first: int, last: int, saved_mebibytes: int) -> SegmentCost:
    """100 MiB of parameters, so many saved for a batch of 32; a fifth of it, and half as many
    operations again, where stages are run again."""
    saved = saved_mebibytes * 1024**2
    return replace(
        cost(first, last, 100), batch_size=32, recompute_flops_per_example=0.5e9,
        moments=(Moment(example_bytes=saved / 32),),
        recompute_moments=(Moment(example_bytes=saved / 5 / 32),),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mebibytes", "micro_batch", "recompute"),
    [
        (390, 0, False),  # 100 + 1.45 * 200
        (389, 16, False),  # 100 + 145
        (244, 8, False),  # 100 + 72.5
        (172, 0, True),  # 100 + 1.45 * 40
        (157, 16, True),  # 100 + 29
        (115, 8, True),  # 100 + 14.5
    ],
)
def test_levers_in_order(chooser, mebibytes, micro_batch, recompute):
    chooser.costs = (with_levers(1, 1, 200),)
    assert choose(chooser, mebibytes) == (1, ())
    plan = replace(WHOLE, segments=(Segment(first=1, last=1),))
    adapted = chooser.adapted(plan)
    assert (adapted.micro_batch, adapted.recompute) == (micro_batch, recompute)
    assert replace(adapted, micro_batch=0, recompute=False) == plan


def test_a_job_takes_the_levers_of_its_neediest_segment(chooser):
    chooser.costs = (with_levers(1, 1, 10), with_levers(2, 2, 200))
    assert choose(chooser, 250) == (1, (2,))
    both = replace(WHOLE, segments=tuple(segments((1, 1), (2, 2))))
    assert chooser.adapted(both).micro_batch == 16
    alone = replace(WHOLE, segments=tuple(segments((1, 1))), micro_batch=12, recompute=True)
    assert chooser.adapted(alone) == alone  # the coordinator's own


def test_a_failure_pulls_the_next_lever_first(chooser):
    chooser.costs = (with_levers(1, 1, 200),)
    plan = replace(WHOLE, segments=(Segment(first=1, last=1),))
    found = []
    while choose(chooser, 400)[0]:
        adapted = chooser.adapted(plan)
        found.append((adapted.micro_batch, adapted.recompute))
        chooser.failed(plan.segments, 400 * 1024**2)
    # at most 0.9 of what failed: 390, 245, 172.5, (158 is more than 155) 129, 114.5
    assert found == [(0, False), (16, False), (8, False), (16, True), (8, True)]


def test_levers_cost_time(chooser):
    # 10 examples, 10 GFLOP/s: 1 s, with half as many operations again 1.5 s
    chooser.costs = (with_levers(1, 1, 200),)
    assert choose(chooser, 172, deadline_s=1.5) == (1, ())
    assert choose(chooser, 172, deadline_s=1.4) == (0, ())
    assert "takes 1.5 s (stages run again), the deadline is 1.4 s" in chooser.choice.reason


@pytest.mark.parametrize(
    ("asked", "is_refused"),
    [
        ([(1, 1)], False),
        ([(1, 2)], False),
        ([(2, 2)], False),  # within the prefix, alone
        ([(3, 3)], False),  # one of its stages
        ([(1, 2), (3, 3)], False),
        ([(1, 3)], True),
        ([(2, 3)], True),
        ([(1, 2), (4, 4)], True),
    ],
)
def test_refusal_of_what_is_more_than_chosen(chooser, asked, is_refused):
    assert choose(chooser, 200) == (2, (3,))
    refusal = chooser.refusal(segments(*asked))
    assert bool(refusal) == is_refused
    if is_refused:
        assert "this device trains up to exit 2 and stages [3] alone: exit 3 needs" in refusal
