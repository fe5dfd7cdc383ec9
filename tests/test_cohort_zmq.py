"""The real Hub and ZmqCohort against devices that behave and devices that do not.

Most tests have a good device in the round with the bad one: it must not notice, and only what it
sent may count.
"""

from __future__ import annotations

import gc
import logging
import re
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from msgspec.structs import replace

from coordinator import cohort_zmq
from coordinator.admission import Admission
from coordinator.aggregate import OwnersMean
from coordinator.cohort import Absence, Assignment, ClientUpdate
from coordinator.cohort_zmq import Terms, ZmqCohort
from coordinator.hub import Hub, Received
from edge_sdk.errors import ConfigError
from edge_sdk.keys import make_keys
from edge_sdk.tensors import Receiver, Tensors, specs_of
from edge_sdk.wire import (
    MAX_CONTROL_BYTES,
    MAX_FRAME_BYTES,
    PART_BYTES,
    PROTOCOL,
    Accepted,
    Bye,
    ExitResult,
    Fault,
    Fetch,
    Heartbeat,
    Job,
    Message,
    Part,
    Plan,
    Ready,
    Segment,
    Update,
    encode,
)
from tests.helpers import client, cnn
from tests.scripted import WAIT_S, Coordinator, Result, ScriptedDevice, floats

FLOATS_PER_PART = PART_BYTES // 4
STAGE_2 = Plan(segments=(Segment(first=2, last=2),))
INF, NAN = float("inf"), float("nan")


def assignment(num_floats: int = 3) -> Assignment:
    """Train stage 2 over a frozen stage 1; stage 2 has num_floats weights."""
    tensors = {
        "stages.0.0.weight": floats(2, 2),
        "stages.1.0.weight": floats(num_floats, start=10.0),
        "stages.1.1.bias": floats(4, start=20.0),
        "exits.1.2.bias": floats(3, start=30.0),
    }
    returns = {name: t for name, t in tensors.items() if name != "stages.0.0.weight"}
    return Assignment(cnn(2), STAGE_2, tensors, specs_of(returns))


def work(*names: str, num_floats: int = 3) -> dict[str, Assignment]:
    return {name: assignment(num_floats) for name in names}


BOTH = ("good", "bad")


@pytest.fixture
def make_coordinator(tmp_path, monkeypatch):
    """Coordinators with CURVE, unless is_insecure; closed in the end."""
    monkeypatch.setattr(cohort_zmq, "FAREWELL_S", 0.0)  # the devices here do not answer a bye
    made: list[Coordinator] = []

    def make(*names: str, is_insecure: bool = False, **terms: Any) -> Coordinator:
        folder = None if is_insecure else tmp_path / str(len(made))
        made.append(Coordinator(folder, names or BOTH, **terms))
        return made[-1]

    yield make
    for coordinator in made:
        coordinator.close()
        coordinator.close_devices()


@pytest.fixture
def coordinator(make_coordinator):
    return make_coordinator(*BOTH)


@pytest.fixture
def devices(coordinator):
    """Good and bad, joined and ready."""
    return coordinator.gather()


def absence_of(results: list[Result], name: str, outcome: str, code: str) -> Absence:
    absences = [r for r in results if isinstance(r, Absence) and r.client.id == name]
    assert [(a.outcome, a.code) for a in absences] == [(outcome, code)]
    assert "\n" not in absences[0].detail
    assert absences[0].segments == STAGE_2.segments
    return absences[0]


def assert_only_these_count(results: list[Result], *devices: ScriptedDevice) -> None:
    """The mean of all that came is the mean of what these devices sent, with equal weights."""
    mean = OwnersMean()
    for result in results:
        if isinstance(result, ClientUpdate):
            mean.add_(result.tensors, result.num_examples)
    for name, tensor in mean.result(assignment().tensors).items():
        if name in devices[0].trained:
            want = np.mean([device.trained[name].numpy() for device in devices], axis=0)
            assert np.array_equal(tensor.numpy(), want), name
    counted = sorted(r.client.id for r in results if isinstance(r, ClientUpdate))
    assert counted == sorted(device.name for device in devices)


def assert_about_round(fault: Fault, code: str, round: int = 1) -> None:
    assert (fault.code, fault.round) == (code, round)
    assert "\n" not in fault.detail


def end(
    round: Future[list[Result]], good: ScriptedDevice, outcome: str, code: str, bad: str = "bad"
) -> Absence:
    """The good device finishes, the round ends, the bad one is absent for this reason."""
    good.return_update()
    results = round.result(WAIT_S)
    assert len(results) == 2
    assert_only_these_count(results, good)
    return absence_of(results, bad, outcome, code)


# -- a round as it should be -------------------------------------------------------------------


def test_round_of_two(coordinator, devices):
    round = coordinator.train(work(*BOTH, num_floats=FLOATS_PER_PART), deadline_s=60.0)
    for device in devices:
        job = device.take_job()
        assert (job.round, job.plan, job.model, job.deadline_s) == (1, STAGE_2, cnn(2), 60.0)
        # offsets 0, 16, 16 + 524288, + 16, and 12 bytes: one part and 44 bytes of another
        assert device.received == [0, 1]
    for device in devices:
        device.return_update()
    results = round.result(WAIT_S)
    assert_only_these_count(results, *devices)
    update = results[0]
    assert isinstance(update, ClientUpdate)
    assert update.bytes_down == 16 + 524288 + 16 + 12
    assert update.bytes_up == 524288 + 16 + 12
    assert list(update.phases) == ["train", "upload"]
    assert (update.num_examples, update.num_steps) == (10, 2)


def test_close_says_bye(coordinator, devices):
    coordinator.close("run finished", is_final=True)
    for device in devices:
        assert device.expect(Bye) == Bye(reason="run finished", is_final=True)


def test_close_waits_for_the_answers(coordinator, devices, monkeypatch):
    monkeypatch.setattr(cohort_zmq, "FAREWELL_S", WAIT_S)
    closing = coordinator.begin_close("run finished")
    good, bad = devices
    for device in devices:
        device.expect(Bye)
    good.send(Bye())
    bad.stays_quiet()
    assert not closing.done()
    bad.send(Bye())
    closing.result(WAIT_S / 2)


def test_stop_in_mid_round(coordinator, devices):
    round = coordinator.train(work(*BOTH))
    devices[0].finish()
    devices[1].take_job()
    coordinator.close("coordinator stopped")
    assert isinstance(round.exception(WAIT_S), cohort_zmq.Stopped)
    for device in devices:
        assert device.expect(Bye) == Bye(reason="coordinator stopped")


def test_port_in_use(coordinator):
    with pytest.raises(ConfigError, match="cannot listen on .* in use .*; is another coordinator"):
        Hub(coordinator.hub.endpoint, None, None)


def test_port_in_use_with_keys(coordinator, tmp_path):
    keys, admission = make_keys(tmp_path / "other", "server"), Admission(coordinator.clients_file)
    with pytest.raises(ConfigError, match="choose another --listen"):
        Hub(coordinator.hub.endpoint, keys, admission)


def test_no_memory_of_results_is_kept(coordinator, devices):
    def count_alive(cohort):
        alive, result = [], None
        for result in cohort.train(work(*BOTH), 1, 0.0):
            held = [weakref.ref(tensor) for tensor in result.tensors.values()]
            result = None  # as a caller that has added it to its mean
            gc.collect()
            alive.append(sum(ref() is not None for ref in held))
            alive.append(sum(type(o) is Receiver and o.is_complete for o in gc.get_objects()))
        return alive

    alive = coordinator.ask(count_alive)
    for device in devices:
        device.take_job()
    for device in devices:
        device.return_update()
    assert alive.result(WAIT_S) == [0, 0, 0, 0]


# -- identity ----------------------------------------------------------------------------------


def test_unknown_client_key(coordinator, devices, tmp_path, caplog):
    good, bad = devices
    stranger = make_keys(tmp_path / "stranger", "stranger")
    round = coordinator.train(work(*BOTH))
    refused = coordinator.device("stranger", keys=stranger)
    assert "does not know this device's key" in refused.refusal()
    assert f"unknown public key {stranger.public.decode()}" in caplog.text
    good.finish()
    bad.finish()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_wrong_server_key(coordinator, devices, tmp_path):
    good, bad = devices
    other = make_keys(tmp_path / "other", "server")
    round = coordinator.train(work(*BOTH))
    refused = coordinator.device("bad", server_key=other.public)
    assert "public key here is probably not the one" in refused.refusal()
    good.finish()
    bad.finish()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_client_without_keys_against_a_coordinator_with(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    refused = coordinator.device("bad", keys=None, server_key=None)
    assert "use keys on both or --insecure on both" in refused.refusal()
    good.finish()
    bad.finish()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_client_with_keys_against_a_coordinator_without(make_coordinator, tmp_path):
    coordinator = make_coordinator(*BOTH, is_insecure=True)
    good, bad = coordinator.gather()
    keys = make_keys(tmp_path / "keys", "bad")
    round = coordinator.train(work(*BOTH))
    refused = coordinator.device("bad", keys=keys, server_key=keys.public)
    assert "--insecure" in refused.refusal()
    good.finish()
    bad.finish()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_key_of_another_client(make_coordinator):
    coordinator = make_coordinator("good", "bad", "thief", min_clients=2)
    clients = coordinator.clients()
    good, bad, thief = (coordinator.device(name) for name in coordinator.names)
    good.join()
    bad.join()
    clients.result(WAIT_S)
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    thief.send(thief.make_hello(client_id="bad", round=1))
    fault = thief.expect(Fault)
    assert_about_round(fault, "admission", 0)
    assert fault.detail == "this is 'thief', hello says 'bad'"
    thief.send(Heartbeat(round=1))
    assert thief.expect(Fault).code == "hello"  # it has not become anybody
    bad.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_one_connection_is_one_client(make_coordinator):
    coordinator = make_coordinator(*BOTH, is_insecure=True)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(bad.make_hello(client_id="good", round=1))
    assert_about_round(bad.expect(Fault), "admission", 0)
    bad.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_revoked_admission_takes_effect_on_the_live_link(make_coordinator, monkeypatch):
    monkeypatch.setattr(cohort_zmq, "SILENCE_S", 1.0)
    coordinator = make_coordinator(*BOTH)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH))
    good.finish()
    bad.take_job()
    coordinator.clients_file.write_text(f"good {coordinator.keys['good'].public.decode()}\n")
    bad.send(bad.make_update())
    fault = bad.expect(Fault)
    assert_about_round(fault, "admission", 0)
    assert fault.detail == "this device is not admitted any more"
    results = round.result(WAIT_S)
    assert_only_these_count(results, good)
    assert "said nothing" in absence_of(results, "bad", "failed", "gone").detail


def test_key_that_was_given_another_name(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    text = coordinator.clients_file.read_text()
    coordinator.clients_file.write_text(text.replace("bad ", "renamed "))
    bad.send(bad.make_update())
    assert_about_round(bad.expect(Fault), "admission", 0)
    coordinator.clients_file.write_text(text)
    bad.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


# -- hello and ready ---------------------------------------------------------------------------


def test_other_protocol_version(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(bad.make_hello(protocol=99))
    fault = bad.expect(Fault)
    assert_about_round(fault, "version", 0)
    assert f"protocol 99, this side {PROTOCOL}" in fault.detail
    bad.send(Bye())
    end(round, good, "failed", "gone")


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"input_shape": (3, 8, 8)}, r"\(3, 8, 8\) with 3 classes, this run trains on \(1, 8, 8\)"),
        ({"input_shape": (1, 64)}, r"\(1, 64\) with 3"),
        ({"num_classes": 4}, "with 4 classes, this run trains on .* with 3"),
    ],
)
def test_data_of_another_shape(coordinator, changes, detail):
    good, bad = coordinator.device("good"), coordinator.device("bad")
    clients = coordinator.clients()
    bad.send(bad.make_hello(**changes))
    fault = bad.expect(Fault)
    assert_about_round(fault, "data", 0)
    assert re.search(detail, fault.detail), fault.detail
    good.join()
    bad.join()  # with other data
    assert [client.id for client in clients.result(WAIT_S)] == ["bad", "good"]


def test_message_before_hello(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.link.open()
    for message in (
        Ready(exit=3),
        Heartbeat(),
        bad.make_update(),
        Fetch(round=1, first=0, count=1),
    ):
        bad.send(message)
        assert_about_round(bad.expect(Fault), "hello", 0)
    bad.hello(round=1)
    bad.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_newer_connection_replaces_the_older(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    newer = coordinator.device("bad")
    newer.hello(session=bad.session, round=1)
    bad.send(bad.make_update())
    assert_about_round(bad.expect(Fault), "hello", 0)
    newer.job, newer.trained = bad.job, bad.trained
    newer.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


@pytest.mark.parametrize("ready", [Ready(exit=4), Ready(exit=1, stages=(2, 4))])
def test_ready_beyond_the_model(coordinator, devices, ready):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(ready)
    fault = bad.expect(Fault)
    assert_about_round(fault, "protocol", 0)
    assert fault.detail == "the model has 3 exits"
    bad.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)
    exits = {client.id: client.exit for client in coordinator.clients().result(WAIT_S)}
    assert exits == {"good": 3, "bad": 3}  # as before


def test_what_a_client_can_train_is_what_its_device_said(make_coordinator):
    coordinator = make_coordinator("good", "bad")
    clients = coordinator.clients()
    good, bad = coordinator.device("good"), coordinator.device("bad")
    good.hello()
    good.ready(1, stages=(2, 3), stage_s=(4.0, 5.0))
    bad.hello()
    bad.ready(2, stages=(3,), stage_s=(1.0, 2.0))
    fault = bad.expect(Fault)
    assert_about_round(fault, "protocol", 0)
    assert fault.detail == "2 stage_s for 1 stages"
    bad.ready(2, stages=(3,))
    told = {
        client.id: (client.exit, client.stages, client.prefix_s, client.stage_s)
        for client in clients.result(WAIT_S)
    }
    assert told == {"good": (1, (2, 3), 1.0, (4.0, 5.0)), "bad": (2, (3,), 1.0, ())}


def test_device_that_cannot_train_gets_no_job(make_coordinator):
    coordinator = make_coordinator("good", "bad", min_clients=1)
    clients = coordinator.clients()
    bad, good = coordinator.device("bad"), coordinator.device("good")
    bad.hello()
    bad.ready(0)
    bad.ping()
    good.join()
    assert [client.id for client in clients.result(WAIT_S)] == ["good"]


# -- frames that are no messages ---------------------------------------------------------------


def plain(tag: str, **fields: object) -> bytes:
    packed: bytes = msgpack.packb({"type": tag, **fields})
    return packed


BAD_FRAMES: dict[str, tuple[list[bytes], str]] = {
    "not msgpack": ([b"\xc1\xc1"], "is not msgpack"),
    "no map": ([msgpack.packb([1, 2])], "message refused"),
    "truncated": ([encode(Heartbeat(round=1))[:-3]], "is not msgpack"),
    "empty": ([b""], "is not msgpack"),
    "control frame too large": ([bytes(MAX_CONTROL_BYTES + 1)], "at most 1047552 are accepted"),
    "unknown type": ([plain("eval", code="1")], "eval"),
    "unknown field": ([plain("heartbeat", round=1, extra=1)], "extra"),
    "field missing": ([plain("ready")], "exit"),
    "part without its raw frame": ([plain("part", round=1, index=0)], "1 frames, expected 2"),
    "raw frame too many": ([plain("part", round=1, index=0), b"a", b"b"], "3 frames, expected 2"),
    "raw frame after a heartbeat": ([plain("heartbeat"), b"a"], "2 frames, expected 1"),
    "empty delimiter, as a REQ sends": ([b"", plain("heartbeat")], "is not msgpack"),
    "message for devices": ([plain("accepted", round=1)], "Accepted is not for coordinators"),
}


@pytest.mark.parametrize(("frames", "detail"), BAD_FRAMES.values(), ids=BAD_FRAMES)
def test_bad_frame_is_refused_and_the_device_may_go_on(coordinator, devices, frames, detail):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send_frames(*frames)
    fault = bad.expect(Fault)
    assert_about_round(fault, "protocol", 0)
    assert detail in fault.detail
    bad.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


@pytest.mark.parametrize(
    "frames",
    [[bytes(MAX_FRAME_BYTES + 1)], [encode(Part(round=1, index=0)), bytes(MAX_FRAME_BYTES + 1)]],
    ids=["control", "raw"],
)
def test_frame_beyond_the_limit_ends_the_connection(coordinator, devices, frames):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(bad.make_update())
    bad.expect(Fetch)
    bad.send_frames(*frames)
    bad.loses_connection()
    bad.reconnect()
    bad.expect(Fetch)
    bad.send_parts([0])
    bad.expect(Accepted)
    good.return_update()
    results = round.result(WAIT_S)
    assert_only_these_count(results, good, bad)
    update = next(r for r in results if isinstance(r, ClientUpdate) and r.client.id == "bad")
    assert update.bytes_up == 16 + 16 + 12  # nothing of the large frame


# -- updates that are not what was asked for ---------------------------------------------------


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def first_changed(device: ScriptedDevice, **changes: Any) -> Update:
    specs = specs_of(device.trained)
    return device.make_update(tensors=(replace(specs[0], **changes), *specs[1:]))


def results_of(*exits: int, loss: float = 0.5) -> tuple[ExitResult, ...]:
    return tuple(ExitResult(exit=exit, loss=loss, accuracy=0.5) for exit in exits)


BAD_UPDATES: dict[str, tuple[Callable[[ScriptedDevice], Update], str]] = {
    "missing": (
        lambda d: d.make_update(tensors=specs_of(without(d.trained, "stages.1.1.bias"))),
        "tensors missing: stages.1.1.bias; not expected: none",
    ),
    "extra": (
        lambda d: d.make_update(tensors=specs_of({"stages.0.0.weight": floats(4), **d.trained})),
        "tensors missing: none; not expected: stages.0.0.weight",
    ),
    "none": (lambda d: d.make_update(tensors=()), "named 0, expected 3"),
    "twice the same": (
        lambda d: d.make_update(tensors=(*specs_of(d.trained), *specs_of(d.trained)[:1])),
        "named 4, expected 3",
    ),
    "shape": (
        lambda d: first_changed(d, shape=(3, 1)),
        "stages.1.0.weight is (3, 1) float32 weight, expected (3,) float32 weight",
    ),
    "size": (lambda d: first_changed(d, shape=(2**40,)), "stages.1.0.weight is (1099511627776,)"),
    "dtype": (lambda d: first_changed(d, dtype="float64"), "is (3,) float64 weight, expected (3,)"),
    "role": (lambda d: first_changed(d, role="mask"), "float32 mask, expected (3,) float32 weight"),
    "order": (
        lambda d: d.make_update(tensors=specs_of(d.trained)[::-1]),
        "tensors are not in the order of the model",
    ),
    "infinite loss": (
        lambda d: d.make_update(exits=results_of(2, loss=INF)),
        "loss of exit 2 is inf",
    ),
    "loss NaN": (lambda d: d.make_update(exits=results_of(2, loss=NAN)), "loss of exit 2 is nan"),
    "exit not trained": (
        lambda d: d.make_update(exits=results_of(1, 2)),
        "results of exits [1, 2], trained were [2]",
    ),
    "exit twice": (lambda d: d.make_update(exits=results_of(2, 2)), "results of exits [2, 2]"),
    "more examples": (
        lambda d: d.make_update(num_examples=11),
        "11 examples, hello said 10",
    ),
}


@pytest.mark.parametrize(("make", "detail"), BAD_UPDATES.values(), ids=BAD_UPDATES)
def test_bad_update_is_refused(coordinator, devices, make, detail):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(make(bad))
    fault = bad.expect(Fault)
    assert_about_round(fault, "tensors")
    assert fault.detail.startswith("update from bad, round 1: ")
    assert detail in fault.detail
    absence = end(round, good, "failed", "tensors")
    assert (absence.detail, absence.bytes_up) == (fault.detail, 0)
    assert absence.bytes_down == 16 + 16 + 16 + 12


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_number_that_is_not_finite(coordinator, devices, value):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.trained["exits.1.2.bias"][2] = value
    bad.send(bad.make_update())
    fault = bad.upload()
    assert isinstance(fault, Fault)
    assert_about_round(fault, "tensors")
    assert "exits.1.2.bias holds NaN or infinite values" in fault.detail
    assert end(round, good, "failed", "tensors").bytes_up == 44


def test_update_of_another_round(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH), round=3)
    good.take_job()
    bad.take_job()
    for number in (2, 4):
        bad.send(bad.make_update(round=number))
        fault = bad.expect(Fault)
        assert_about_round(fault, "round", number)
        assert fault.detail == f"no update of round {number} is wanted from bad now"
    bad.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_update_twice_counts_once(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(bad.make_update())
    fetch = bad.expect(Fetch)
    bad.send(bad.make_update())  # the upload goes on
    bad.ping()
    bad.send_parts(range(1))
    assert fetch.first == 0
    assert bad.expect(Accepted).round == 1
    bad.send(bad.make_update())
    assert bad.expect(Accepted).round == 1
    bad.stays_quiet()
    good.return_update()
    results = round.result(WAIT_S)
    assert len(results) == 2
    assert_only_these_count(results, good, bad)


def test_update_before_the_job_was_fetched_is_not_of_this_job(coordinator, devices):
    # a coordinator that was killed and resumed gives a round's jobs anew
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.expect_job()
    bad.send(bad.make_update(num_examples=9))
    bad.ping(1)
    receiver = Receiver(bad.job.tensors)
    bad.fetch(receiver, 0, 1)
    bad.train(receiver)
    bad.return_update()
    good.return_update()
    results = round.result(WAIT_S)
    assert_only_these_count(results, good, bad)
    assert [result.num_examples for result in results] == [10, 10]


def test_update_after_failing_is_refused(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(Fault(code="trainer", detail="the training process was killed", round=1))
    bad.send(bad.make_update())
    fault = bad.expect(Fault)
    assert_about_round(fault, fault.code)
    assert fault.code in ("round", "twice")
    assert end(round, good, "failed", "trainer").detail == "the training process was killed"


def test_update_of_a_client_that_was_not_chosen(make_coordinator):
    coordinator = make_coordinator("good", "other", "bad")
    good, other, bad = coordinator.gather()
    round = coordinator.train(work("good", "other"))
    good.take_job()
    other.take_job()
    bad.job, bad.trained = other.job, other.trained
    bad.send(bad.make_update())
    fault = bad.expect(Fault)
    assert_about_round(fault, "round")
    assert fault.detail == "no update of round 1 is wanted from bad now"
    other.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, other)


def test_update_with_no_round_open(coordinator):
    clients = coordinator.clients()
    good, bad = coordinator.device("good"), coordinator.device("bad")
    bad.join()
    update = Update(
        round=7, num_examples=1, num_steps=1, exits=(), phases={}, peak_memory_bytes=0, tensors=()
    )
    bad.send(update)
    fault = bad.expect(Fault)
    assert_about_round(fault, "round", 7)
    assert fault.detail == "no update of round 7 is wanted now"
    bad.reconnect(round=7)
    assert_about_round(bad.expect(Fault), "round", 7)  # hello told of it too
    good.join()
    clients.result(WAIT_S)
    round = coordinator.train(work(*BOTH))
    good.finish()
    bad.finish()
    assert_only_these_count(round.result(WAIT_S), good, bad)


# -- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "size", "detail"),
    [
        (0, 43, "part 0 has 43 bytes, expected 44"),
        (0, 45, "part 0 has 45 bytes, expected 44"),
        (0, 0, "part 0 has 0 bytes, expected 44"),
        (0, PART_BYTES + 1, "part 0 has 524289 bytes, expected 44"),
        (1, 44, "part 1 has 44 bytes, expected 0"),
        (2**48, 44, "part 281474976710656 has 44 bytes, expected 0"),
    ],
)
def test_part_of_wrong_size_or_index(coordinator, devices, index, size, detail):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(bad.make_update())
    bad.expect(Fetch)
    bad.send(Part(round=1, index=index), bytes(size))
    fault = bad.expect(Fault)
    assert_about_round(fault, "protocol")
    assert detail in fault.detail
    assert end(round, good, "failed", "protocol").bytes_up == 0


def test_parts_out_of_order_and_twice(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH, num_floats=3 * FLOATS_PER_PART))
    good.take_job()
    bad.take_job()
    bad.send(bad.make_update())
    assert bad.expect(Fetch).count == 4  # three, and 28 bytes of another
    bad.send(Part(round=7, index=0), b"of another round")
    bad.send_parts([3, 1, 1, 3, 2])
    bad.stays_quiet()
    bad.send_parts([0])
    assert bad.expect(Accepted).round == 1
    good.return_update()
    results = round.result(WAIT_S)
    assert_only_these_count(results, good, bad)


def test_part_that_nobody_asked_for(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send_parts([0])  # before the update
    bad.return_update()
    bad.send_parts([0])  # after it
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_parts_that_do_not_exist_are_not_sent(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    for first, count in ((1, 1024), (2**48, 1)):
        bad.send(Fetch(round=1, first=first, count=count))
    bad.send(Fetch(round=2, first=0, count=1))
    bad.ping(1)
    bad.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_update_of_no_bytes(coordinator, devices):
    tensors = {"stages.0.0.weight": floats(2), "stages.1.0.weight": floats(0)}
    returns = specs_of({"stages.1.0.weight": floats(0)})
    empty = Assignment(cnn(2), STAGE_2, tensors, returns)
    round = coordinator.train(dict.fromkeys(BOTH, empty))
    for device in devices:
        device.finish()
    for result in round.result(WAIT_S):
        assert isinstance(result, ClientUpdate)
        assert result.tensors["stages.1.0.weight"].shape == (0,)


# -- devices that leave ------------------------------------------------------------------------


def test_bye_in_mid_round(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(Bye(reason="device stopped"))
    bad.send(bad.make_update())
    assert bad.expect(Fault).code == "hello"
    assert end(round, good, "failed", "gone").detail == "said bye"


def test_participant_that_left_before_its_job(coordinator, devices):
    good, _ = devices
    round = coordinator.train({**work("good"), "gone": assignment()})
    good.take_job()
    assert "before its job" in end(round, good, "failed", "gone", bad="gone").detail


def test_restart_in_mid_round(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.restart()
    bad.stays_quiet()  # no job
    end(round, good, "failed", "restarted")


def test_reconnect_in_mid_download_goes_on_at_the_missing_part(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH, num_floats=11 * FLOATS_PER_PART))
    good.take_job()
    job = bad.expect_job()
    receiver = Receiver(job.tensors)
    assert receiver.num_parts == 12
    bad.fetch(receiver, 0, 8, take=5)  # what else is under way is lost
    bad.reconnect()
    bad.stays_quiet()  # the job is not sent again
    bad.fetch(receiver, receiver.next_missing, 7)
    assert bad.received == list(range(12))  # each part once
    bad.train(receiver)
    bad.return_update()
    good.return_update()
    results = round.result(WAIT_S)
    assert_only_these_count(results, good, bad)
    for result in results:
        sent_parts = {"good": 12, "bad": 15}[result.client.id]  # 5, 6, 7 went out twice
        assert (result.bytes_down - 1) // PART_BYTES == sent_parts - 1, result.client.id


def test_reconnect_in_mid_upload_goes_on_at_the_missing_part(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH, num_floats=11 * FLOATS_PER_PART))
    good.take_job()
    bad.take_job()
    bad.send(bad.make_update())
    fetch = bad.expect(Fetch)
    assert (fetch.first, fetch.count) == (0, 8)
    bad.send_parts(range(4))
    fetch = bad.expect(Fetch)  # so the four have arrived
    assert (fetch.first, fetch.count) == (8, 4)
    bad.reconnect()
    fetch = bad.expect(Fetch)
    assert (fetch.first, fetch.count) == (4, 8)
    bad.send(bad.make_update(retries=1))  # as the trainer does on Resume
    bad.send_parts(range(4, 12))
    assert isinstance(bad.upload(), Accepted)
    assert bad.sent == list(range(12))
    good.return_update()
    results = round.result(WAIT_S)
    assert_only_these_count(results, good, bad)
    sizes = {result.bytes_up for result in results}
    assert sizes == {11 * PART_BYTES + 16 + 12}  # each byte once


def test_reconnect_after_being_accepted(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.finish()  # but say that accepted was lost
    bad.reconnect()
    assert bad.expect(Accepted).round == 1
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_reconnect_without_the_job_gets_it_again(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(bad.make_update())
    bad.expect(Fetch)
    bad.job = None  # the job was dropped while the link was down
    bad.reconnect()
    bad.take_job()
    bad.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_job_of_an_older_round_is_refused_on_return(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH), round=2)
    good.take_job()
    bad.take_job()
    bad.reconnect(round=1)
    assert_about_round(bad.expect(Fault), "round", 1)
    bad.finish()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


@pytest.mark.parametrize("code", ["trainer", "capacity", "data"])
def test_participant_that_reports_a_fault(coordinator, devices, code):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(Fault(code=code, detail="of another round", round=9))
    bad.send(Fault(code=code, detail="of no round"))
    bad.send(Fault(code=code, detail="that is it", round=1))
    assert end(round, good, "failed", code).detail == "that is it"


@pytest.mark.parametrize("code", ["protocol", "version"])
def test_participant_that_cannot_read_what_it_got(coordinator, devices, code):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.expect_job()
    bad.send(Fault(code=code, detail="message refused"))  # it cannot say of which round
    assert end(round, good, "failed", code).detail == "message refused"


def test_failed_device_gets_no_job_until_it_is_ready(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(Fault(code="trainer", detail="killed", round=1))
    end(round, good, "failed", "trainer")
    clients = coordinator.clients()
    bad.ping()
    bad.stays_quiet()
    assert not clients.done()  # two are needed
    bad.ready(2)
    assert [(c.id, c.exit) for c in clients.result(WAIT_S)] == [("bad", 2), ("good", 3)]


def test_ready_in_the_same_round_counts_for_the_next(coordinator, devices):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.send(Fault(code="capacity", detail="too large", round=1))
    bad.ready(1)
    bad.ping()
    end(round, good, "failed", "capacity")
    exits = {client.id: client.exit for client in coordinator.clients().result(WAIT_S)}
    assert exits == {"good": 3, "bad": 1}


def test_ready_that_waited_for_the_caller_counts(make_coordinator):
    coordinator = make_coordinator(*BOTH, quorum=0.5, grace_s=0.1)
    good, bad = coordinator.gather()
    is_over = threading.Event()
    round = coordinator.train(work(*BOTH), deadline_s=0.1, pause=lambda: is_over.wait(WAIT_S))
    bad.take_job()
    good.finish()
    coordinator.arrived.get(timeout=WAIT_S)
    bad.send(Fault(code="trainer", detail="killed", round=1))
    bad.ready(2)
    bad.stays_quiet(0.5)  # both wait, past deadline and grace
    is_over.set()
    absence_of(round.result(WAIT_S), "bad", "failed", "trainer")
    exits = {client.id: client.exit for client in coordinator.clients().result(WAIT_S)}
    assert exits == {"good": 3, "bad": 2}


def count_updates() -> int:
    gc.collect()
    return sum(type(held) is ClientUpdate for held in gc.get_objects())


def test_updates_that_waited_for_the_caller_come_one_at_a_time(make_coordinator):
    """Whole updates that the caller has not taken are in no budget."""
    names = ("a", "b", "c", "d")
    coordinator = make_coordinator(*names, quorum=0.25, grace_s=0.1)
    devices = coordinator.gather()
    is_over, alive = threading.Event(), [count_updates()]

    def pause():
        alive.append(count_updates())
        is_over.wait(WAIT_S)

    round = coordinator.train(work(*names), deadline_s=0.1, pause=pause)
    for device in devices:
        device.take_job()
        device.send(device.make_update())
        assert device.expect(Fetch).first == 0
    devices[0].send_parts([0])
    coordinator.arrived.get(timeout=WAIT_S)
    for device in devices[1:]:
        device.send_parts([0])
        device.stays_quiet(0.2)
    is_over.set()
    assert_only_these_count(round.result(WAIT_S), *devices)
    assert np.diff(alive).tolist() == [1, 1, 1, 1], "this test keeps what it was given"


# -- time --------------------------------------------------------------------------------------


class TalkingHub:
    """Two devices of which one says nothing after it is ready, and the other never stops."""

    def __init__(self) -> None:
        self.said: list[Received] = []
        for name in BOTH:
            hello = ScriptedDevice.make_hello(SimpleNamespace(name=name, session="1"))
            for message in (hello, Ready(exit=3)):
                self.said.append(Received(name.encode(), None, message, None))

    def receive(self, timeout_ms: int) -> tuple[bool, Received]:
        chatter = Received(b"bad", None, Heartbeat(), None)
        return True, self.said.pop(0) if self.said else chatter

    def send(self, route: bytes, message: object, payload: object = None) -> bool:
        return True


def test_silent_device_is_dropped_though_messages_never_end(monkeypatch):
    monkeypatch.setattr(cohort_zmq, "SILENCE_S", 0.2)
    until = time.monotonic() + WAIT_S
    terms = Terms("a run", cnn(), STAGE_2, 0.0, 600.0, 1.0, 2)
    cohort = ZmqCohort(TalkingHub(), terms, lambda: time.monotonic() > until)
    assert [client.id for client in cohort.clients()] == ["bad", "good"]
    results = list(cohort.train(work("good"), 1, 0.0))
    assert absence_of(results, "good", "failed", "gone").detail == "said nothing for 0 s"


def test_silent_device_is_dropped(coordinator, devices, monkeypatch):
    monkeypatch.setattr(cohort_zmq, "SILENCE_S", 1.0)
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    bad.take_job()
    good.finish()
    results = round.result(WAIT_S)
    assert_only_these_count(results, good)
    assert absence_of(results, "bad", "failed", "gone").detail == "said nothing for 1 s"


def test_silent_device_is_dropped_while_others_talk(coordinator, devices, monkeypatch):
    monkeypatch.setattr(cohort_zmq, "SILENCE_S", 1.0)
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    bad.take_job()
    good.take_job()
    until = time.monotonic() + WAIT_S / 3
    while coordinator.arrived.empty() and time.monotonic() < until:
        good.ping(1)
    assert end(round, good, "failed", "gone").client.id == "bad"


def test_long_pause_of_the_caller_drops_nobody(coordinator, devices, monkeypatch):
    monkeypatch.setattr(cohort_zmq, "SILENCE_S", 1.0)
    good, slow = devices
    is_over = threading.Event()
    round = coordinator.train(work(*BOTH), pause=lambda: is_over.wait(WAIT_S))
    slow.take_job()
    good.finish()
    coordinator.arrived.get(timeout=WAIT_S)
    slow.stays_quiet(1.5)  # nobody listens for longer than SILENCE_S
    is_over.set()
    slow.return_update()
    assert_only_these_count(round.result(WAIT_S), good, slow)


def test_upload_that_waited_for_the_caller_has_not_stalled(coordinator, devices, monkeypatch):
    monkeypatch.setattr(seats, "STALL_S", 1.0)
    good, slow = devices
    is_over = threading.Event()
    round = coordinator.train(work(*BOTH), pause=lambda: is_over.wait(WAIT_S))
    slow.take_job()
    slow.send(slow.make_update())
    slow.expect(Fetch)
    good.finish()
    coordinator.arrived.get(timeout=WAIT_S)
    good.send(Heartbeat())
    slow.send_parts([0])
    slow.stays_quiet(1.5)
    is_over.set()
    slow.expect(Accepted)  # not asked again
    assert_only_these_count(round.result(WAIT_S), good, slow)


def test_straggler_with_quorum_met(make_coordinator):
    coordinator = make_coordinator(*BOTH, quorum=0.5, grace_s=0.1)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH), deadline_s=0.1)
    bad.take_job()
    good.finish()
    fault = bad.expect(Fault)
    assert_about_round(fault, "late")
    results = round.result(WAIT_S)
    assert_only_these_count(results, good)
    absence_of(results, "bad", "straggler", "late")
    # the next round goes on without it, and does not take the old update
    assert [client.id for client in coordinator.clients().result(WAIT_S)] == ["good"]
    round = coordinator.train(work("good"), round=2)
    good.take_job()
    bad.send(bad.make_update())
    assert_about_round(bad.expect(Fault), "round")
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good)


def test_straggler_with_quorum_not_met(make_coordinator):
    coordinator = make_coordinator(*BOTH, quorum=0.5, grace_s=0.1)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH), deadline_s=0.1)
    bad.take_job()
    good.take_job()
    bad.stays_quiet(1.0)  # late already, but nobody has returned
    assert not round.done()
    good.return_update()
    assert_about_round(bad.expect(Fault), "late")
    results = round.result(WAIT_S)
    assert_only_these_count(results, good)
    absence_of(results, "bad", "straggler", "late")


def test_nobody_begins_to_upload_when_the_round_closes(monkeypatch):
    monkeypatch.setattr(seats, "UPLOAD_BUDGET_BYTES", 10)
    sent: list[tuple[str, Message]] = []
    desk = seats.RoundDesk(1, 0.0, lambda name, message, _: sent.append((name, message)) or True)
    job = assignment()
    for name in BOTH:
        device = SimpleNamespace(name=name, session="1")
        desk.give(client(name, 3), job, ScriptedDevice.make_hello(device))
        device.job = sent[-1][1]
        device.trained = {spec.name: job.tensors[spec.name] for spec in job.returns}
        desk.on_message(name, Fetch(round=1, first=0, count=1), None)
        desk.on_message(name, ScriptedDevice.make_update(device), None)
    sent.clear()
    desk.close_late()
    assert [(name, type(message)) for name, message in sent] == [("good", Fault), ("bad", Fault)]
    assert [type(result) for result in desk.finished] == [Absence, Absence]


def test_round_whose_quorum_is_out_of_reach_does_not_wait(make_coordinator):
    coordinator = make_coordinator(*BOTH, quorum=1.0, grace_s=0.1)
    late, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH), deadline_s=0.1)
    late.take_job()
    bad.take_job()
    bad.send(Fault(code="trainer", detail="killed", round=1))
    assert_about_round(late.expect(Fault), "late")
    results = round.result(WAIT_S)
    absence_of(results, "good", "straggler", "late")
    absence_of(results, "bad", "failed", "trainer")


def test_stalled_upload_is_asked_again_then_failed(coordinator, devices, monkeypatch):
    monkeypatch.setattr(seats, "STALL_S", 0.5)
    good, bad = devices
    round = coordinator.train(work(*BOTH, num_floats=FLOATS_PER_PART))
    bad.take_job()
    good.take_job()
    bad.send(bad.make_update())
    fetch = bad.expect(Fetch)
    assert (fetch.first, fetch.count) == (0, 2)
    bad.send_parts([0])
    again = bad.expect(Fetch)
    assert (again.first, again.count) == (1, 1)
    fault = bad.expect(Fault)
    assert_about_round(fault, "stalled")
    assert "after 524288 bytes" in fault.detail
    assert end(round, good, "failed", "stalled").bytes_up == 524288


def test_repeated_part_does_not_hold_the_budget(coordinator, devices, monkeypatch):
    monkeypatch.setattr(seats, "STALL_S", 0.5)
    monkeypatch.setattr(seats, "UPLOAD_BUDGET_BYTES", 10)
    good, bad = devices
    round = coordinator.train(work(*BOTH, num_floats=FLOATS_PER_PART))
    bad.take_job()
    good.take_job()
    bad.send(bad.make_update())
    assert bad.expect(Fetch).count == 2
    good.send(good.make_update())
    good.ping(1)  # announced, and not fetched
    heard: list[Message] = []
    until = time.monotonic() + WAIT_S / 3
    while not (heard and isinstance(heard[-1], Fault)) and time.monotonic() < until:
        bad.send_parts([0])
        bad.send(Heartbeat(round=1))
        message, _ = bad.receive()
        heard += [message] if not isinstance(message, Heartbeat) else []
    again, fault = heard
    assert again == Fetch(round=1, first=1, count=1)
    assert_about_round(fault, "stalled")
    assert isinstance(good.upload(), Accepted)
    results = round.result(WAIT_S)
    assert_only_these_count(results, good)
    assert absence_of(results, "bad", "failed", "stalled").bytes_up == PART_BYTES  # once


def test_stalled_upload_that_goes_on_counts(coordinator, devices, monkeypatch):
    monkeypatch.setattr(seats, "STALL_S", 0.5)
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    bad.take_job()
    good.take_job()
    bad.send(bad.make_update())
    bad.expect(Fetch)
    assert isinstance(bad.upload(), Accepted)  # of the second fetch
    assert bad.sent == [0]
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_lost_job_is_sent_again(coordinator, devices, monkeypatch):
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.expect(Job)  # but say that it was lost
    bad.ping()
    bad.stays_quiet()  # it may still be on its way
    monkeypatch.setattr(seats, "RESEND_S", 0.0)
    bad.ping()
    bad.take_job()
    bad.ping(1)
    bad.stays_quiet()  # it has it now
    bad.return_update()
    good.return_update()
    results = round.result(WAIT_S)
    assert len(results) == 2
    assert_only_these_count(results, good, bad)


def test_uploads_are_admitted_within_the_budget(make_coordinator, monkeypatch):
    monkeypatch.setattr(seats, "UPLOAD_BUDGET_BYTES", 44 + 43)  # one update of 44 bytes, not two
    coordinator = make_coordinator("a", "b", "c", "d")
    devices = coordinator.gather()
    round = coordinator.train(work("a", "b", "c", "d"))
    for device in devices:
        device.take_job()
    for device in devices:
        device.send(device.make_update())
        if device is devices[0]:
            assert device.expect(Fetch).first == 0
        else:
            device.ping(1)  # announced, and not fetched
    a, b, c, d = devices
    c.stays_quiet()
    a.send_parts([0])
    a.expect(Accepted)
    b.expect(Fetch)
    c.stays_quiet()
    b.send(Fault(code="trainer", detail="killed", round=1))  # frees the budget too
    assert isinstance(c.upload(), Accepted)
    assert isinstance(d.upload(), Accepted)
    results = round.result(WAIT_S)
    assert_only_these_count(results, a, c, d)
    absence_of(results, "b", "failed", "trainer")


def test_update_beyond_the_budget_gets_its_turn_alone(coordinator, devices, monkeypatch):
    monkeypatch.setattr(seats, "UPLOAD_BUDGET_BYTES", 10)
    round = coordinator.train(work(*BOTH))
    for device in devices:
        device.finish()
    assert_only_these_count(round.result(WAIT_S), *devices)


def test_job_has_one_line_of_log_per_event(coordinator, devices, caplog):
    caplog.set_level(logging.INFO)
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.take_job()
    bad.trained["exits.1.2.bias"] = torch.full((3,), NAN)
    bad.send(bad.make_update())
    bad.upload()
    end(round, good, "failed", "tensors")
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("coordinator")]
    assert [line for line in lines if line.startswith("round 1: bad failed: tensors: ")]
    assert all("\n" not in line for line in lines)
