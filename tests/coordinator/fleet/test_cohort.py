"""The real Router and ZmqCohort against devices that behave and devices that do not.

Most tests have a good device in the round with the bad one: it must not notice, and only what it
sent may count. Who is who: test_cohort_identity.py; clocks: test_cohort_time.py; what is returned:
test_cohort_updates.py; who comes back: test_cohort_return.py; who is late: test_cohort_late.py.
"""

from __future__ import annotations

import gc
import logging
import weakref

import msgpack
import pytest
import torch

from coordinator.admission.client_list import Admission
from coordinator.cohorts.base import ClientUpdate
from coordinator.fleet import cohort as cohort_module
from coordinator.links.router import Router
from edge_sdk.errors import ConfigError
from edge_sdk.protocol.codec import MAX_CONTROL_BYTES, encode
from edge_sdk.protocol.keys import make_keys
from edge_sdk.protocol.messages import MAX_FRAME_BYTES, Accepted, Bye, Fault, Fetch, Heartbeat, Part
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import Receiver
from tests.support.devices import WAIT_S, asked_for
from tests.support.examples import cnn
from tests.support.jobs_and_results import (
    BOTH,
    FLOATS_PER_PART,
    STAGE_2,
    assert_only_these_count,
    end,
    end_well,
    ended,
    expect_fault,
    give_jobs,
    heard_until_now,
    update_of,
    work,
)

# -- a round as it should be -----------------------------------------------------------------------


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
    assert (update.num_examples, update.message.num_steps) == (10, 2)


def test_close_says_bye(coordinator, devices):
    coordinator.close("run finished", is_final=True)
    for device in devices:
        assert device.expect(Bye) == Bye(reason="run finished", is_final=True)


def test_close_waits_for_the_answers(coordinator, devices, monkeypatch):
    monkeypatch.setattr(cohort_module, "FAREWELL_S", WAIT_S)
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
    assert isinstance(round.exception(WAIT_S), cohort_module.Stopped)
    for device in devices:
        assert device.expect(Bye) == Bye(reason="coordinator stopped")


def test_port_in_use(coordinator):
    with pytest.raises(ConfigError, match="cannot listen on .* in use .*; is another coordinator"):
        Router(coordinator.router.endpoint, None, None)


def test_port_in_use_with_keys(coordinator, tmp_path):
    keys, admission = make_keys(tmp_path / "other", "server"), Admission(coordinator.clients_file)
    with pytest.raises(ConfigError, match="choose another --listen"):
        Router(coordinator.router.endpoint, keys, admission)


def test_no_memory_of_results_is_kept(coordinator, devices):
    def count_alive(cohort):
        alive, held = [], []
        for result in cohort.train(work(*BOTH), 1, 0.0):
            gc.collect()
            alive.append(sum(ref() is not None for ref in held))  # of the one before
            alive.append(sum(type(o) is Receiver and o.is_complete for o in gc.get_objects()))
            held = [weakref.ref(tensor) for tensor in result.tensors.values()]
            del result  # as a caller that has added it to its mean
        gc.collect()
        return [*alive, sum(ref() is not None for ref in held)]

    alive = coordinator.ask(count_alive)
    for device in devices:
        device.take_job()
    for device in devices:
        device.return_update()
    assert alive.result(WAIT_S) == [0, 0, 0, 0, 0]


def test_job_has_one_line_of_log_per_event(coordinator, devices, caplog):
    caplog.set_level(logging.INFO)
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.trained["exits.1.2.bias"] = torch.full((3,), torch.nan)
    bad.send(bad.make_update())
    bad.upload()
    end(round, good, "failed", "tensors")
    lines = [r.getMessage() for r in caplog.records if r.name.startswith("coordinator")]
    assert [line for line in lines if line.startswith("round 1: bad failed: tensors: ")]
    assert all("\n" not in line for line in lines)


# -- frames that are no messages -------------------------------------------------------------------


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
    round = give_jobs(coordinator, good, bad)
    bad.send_frames(*frames)
    assert detail in expect_fault(bad, "protocol", 0)
    end_well(round, bad, good)


@pytest.mark.parametrize(
    "frames",
    [[bytes(MAX_FRAME_BYTES + 1)], [encode(Part(round=1, index=0)), bytes(MAX_FRAME_BYTES + 1)]],
    ids=["control", "raw"],
)
def test_frame_beyond_the_limit_ends_the_connection(coordinator, devices, frames):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.announce()
    bad.send_frames(*frames)
    bad.loses_connection()
    bad.reconnect()
    bad.expect(Fetch)
    bad.send_parts([0])
    bad.expect(Accepted)
    good.return_update()
    results = round.result(WAIT_S)
    assert_only_these_count(results, good, bad)
    assert update_of(results, "bad").bytes_up == 16 + 16 + 12  # nothing of the large frame


# -- credit ------------------------------------------------------------------------------------


def test_parts_under_way_are_bounded_over_all_uploads(make_coordinator, quick_links):
    names = ("a", "b", "c", "d")
    coordinator = make_coordinator(*names, budget_bytes=4 * PART_BYTES)
    devices = coordinator.gather()
    round = coordinator.train(work(*names, num_floats=2 * FLOATS_PER_PART))  # 3 parts
    for device in devices:
        device.take_job()
    lacking: dict[str, list[int]] = {name: [] for name in names}

    def listen() -> None:
        for device in devices:
            for message in heard_until_now(device):
                if isinstance(message, Fetch):
                    lacking[device.name] += asked_for(message)

    for device in devices:
        device.send(device.make_update())
        listen()  # so theirs arrive in this order
    # each may have two under way of its three, so the first leave none to the others
    assert lacking == {"a": [0, 1], "b": [0, 1], "c": [], "d": []}
    for _ in range(4 * 3):
        device = next(device for device in devices if lacking[device.name])
        device.send_parts([lacking[device.name].pop(0)])
        accepted = len(device.sent) == 3
        if accepted:
            while not isinstance(message := device.receive()[0], Accepted):
                assert isinstance(message, Fetch)
                lacking[device.name] += asked_for(message)
        if sum(len(device.sent) for device in devices) < 4 * 3:  # the round goes on
            listen()
        assert sum(map(len, lacking.values())) <= 4
    assert_only_these_count(round.result(WAIT_S), *devices)


def test_failed_upload_leaves_its_credit_to_others(make_coordinator, quick_links):
    coordinator = make_coordinator(*BOTH, budget_bytes=2 * PART_BYTES)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, good, bad, num_floats=FLOATS_PER_PART)
    assert bad.announce().count == 2
    good.send(good.make_update())
    assert not heard_until_now(good)
    bad.send(Fault(code="trainer", detail="killed", round=1))
    assert isinstance(good.upload(), Accepted)
    ended(round, good, "failed", "trainer")
    told = coordinator.ask(lambda cohort: cohort.snapshot().clients).result(WAIT_S)
    failures = {client.name: client.failure for client in told}
    assert failures == {"bad": "round 1, bad: failed: trainer: killed", "good": ""}


def test_transfers_larger_than_the_budget_go_on(make_coordinator, quick_links):
    """Down and up, with a window that the budget does not hold."""
    coordinator = make_coordinator(*BOTH, budget_bytes=1)  # two parts are the least
    devices = coordinator.gather()
    round = coordinator.train(work(*BOTH, num_floats=5 * FLOATS_PER_PART))
    for device in devices:
        device.finish()
    assert_only_these_count(round.result(WAIT_S), *devices)
