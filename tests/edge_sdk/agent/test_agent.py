"""How the real agent joins, and how its link is lost and comes back; the coordinator is scripted.

Most tests share one device, as a training process takes seconds to start: see conftest.settled.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from coordinator.admission.client_list import Admission, add_client
from coordinator.links.router import Router
from edge_sdk.data.loading import Examples, save_shard
from edge_sdk.errors import DataError, LinkError
from edge_sdk.protocol.keys import make_keys
from edge_sdk.protocol.link import Link
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Accepted,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    InputScaling,
    Probe,
    Ready,
    Segment,
    Update,
    Welcome,
)
from edge_sdk.protocol.tensors import Sender
from tests.support.agent import (
    GIB,
    LONG,
    MODEL,
    WHOLE,
    Device,
    give,
    job_tensors,
    listening,
    running,
)
from tests.support.coordinator import ScriptedCoordinator
from tests.support.devices import ANY_PORT, WAIT_S
from tests.support.examples import examples

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
    coordinator.welcome(MODEL, LONG)
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
            coordinator.welcome(MODEL, LONG)
            coordinator.wait_for(Ready)
            coordinator.send(Bye(reason="coordinator stopped"))
            coordinator.wait_for(Bye)  # its answer
            coordinator.expect(Hello)  # the run goes on some day
            coordinator.welcome(MODEL, LONG)
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
            coordinator.welcome(MODEL, LONG)
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
    router = Router(ANY_PORT, keys["server"], Admission(tmp_path / "clients"))
    data = tmp_path / "shard.npz"
    save_shard(data, examples(24))
    with listening("does not know this device's key") as lines:
        device = Device(Link(router.endpoint, keys["device"], keys["server"].public), data)
        try:
            lines.wait_for_one()
            add_client(tmp_path / "clients", "device", keys["device"].public)
            _, received = router.receive(int(1000 * WAIT_S))
        finally:
            device.stop()
            router.close()
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


# 4 (64 x 1200 + 1200 x 1200 + ...) bytes are 12 parts of 524288.
TWELVE_PARTS = replace(MODEL, family="mlp", exit=2, options={"widths": (1200, 1200)})
WHOLE_OF_TWO = replace(WHOLE, segments=(Segment(first=1, last=2),))

# -- the link ----------------------------------------------------------------------------------


def give_twelve_parts(coordinator: ScriptedCoordinator) -> Sender:
    coordinator.welcome(TWELVE_PARTS, LONG)
    coordinator.wait_for(Ready, lambda ready: ready.exit == 2)
    tensors = job_tensors(WHOLE_OF_TWO, TWELVE_PARTS)
    sender = coordinator.give(1, TWELVE_PARTS, WHOLE_OF_TWO, tensors)
    assert sender.num_parts == 12
    return sender


def test_link_lost_in_mid_download(settled):
    coordinator, _ = settled
    sender = give_twelve_parts(coordinator)
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
    coordinator.welcome(TWELVE_PARTS, LONG)
    coordinator.expect(Ready)
    fetch = coordinator.expect(Fetch)
    assert (fetch.have, fetch.first, fetch.count) == (4, 4, 8)
    coordinator.send_parts(1, sender, range(4, 12))
    fetch = coordinator.wait_for(Fetch, lambda fetch: fetch.have == 12)
    assert fetch.count == 0  # nothing is lacking any more
    assert coordinator.expect(Update).retries == 1


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
    coordinator.welcome(MODEL, LONG)
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
    coordinator.welcome(MODEL, LONG)
    coordinator.expect(Ready)
    assert coordinator.expect(Update) == replace(update, retries=1)


def test_final_bye_drops_the_job_and_says_hello_again(settled, caplog):
    caplog.set_level(logging.INFO)
    coordinator, _ = settled
    give(coordinator, 1, LONG)
    coordinator.expect(Heartbeat)
    with listening("coordinator: run finished; waiting for the next run") as lines:
        coordinator.send(Bye(reason="run finished", is_final=True))
        coordinator.wait_for(Bye)
        hello = coordinator.expect(Hello)
    assert (hello.round, hello.job) == (0, None)
    assert lines.events == ["finished"]


def test_the_same_job_again_goes_on_and_another_begins_anew(settled):
    """A coordinator that was restarted gives what the device has in hand already."""
    coordinator, _ = settled
    sender = give_twelve_parts(coordinator)
    assert coordinator.expect(Fetch).count == 8
    coordinator.send_parts(1, sender, range(4))
    assert coordinator.wait_for(Fetch, lambda fetch: fetch.have == 4).count == 4
    coordinator.send(coordinator.job)
    fetch = coordinator.expect(Fetch)
    assert (fetch.have, fetch.first, fetch.count) == (4, 4, 8)
    coordinator.send(replace(coordinator.job, id="f" * 32))
    assert coordinator.expect(Ready).exit == 2  # the old one is dropped
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


def test_data_unlike_the_run_are_told(settled, caplog):
    """The device's data are floats of about -4 to 4."""
    coordinator, _ = settled
    coordinator.run += 1
    coordinator.welcome(MODEL, LONG, scaling=InputScaling(low=0.0, high=900.0, divisor=127.5))
    coordinator.wait_for(Ready)
    assert "the inputs of this run are integers / 127.5 - 0, those of this device" in caplog.text
