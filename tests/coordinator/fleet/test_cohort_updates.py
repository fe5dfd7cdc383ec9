"""Updates and parts that are not what was asked for: refused, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from msgspec.structs import replace

from coordinator.cohorts.base import Assignment, ClientUpdate
from edge_sdk.protocol.messages import Accepted, ExitResult, Fault, Fetch, Part, Update
from edge_sdk.protocol.stream import PART_BYTES
from edge_sdk.protocol.tensors import Sender, Tensors, specs_of
from tests.support.devices import WAIT_S, ScriptedDevice, floats
from tests.support.examples import cnn
from tests.support.jobs_and_results import (
    BOTH,
    FLOATS_PER_PART,
    STAGE_2,
    assert_about_round,
    assert_only_these_count,
    end,
    end_well,
    expect_fault,
    give_jobs,
    heard_until_now,
    update_of,
    work,
)

INF, NAN = float("inf"), float("nan")


# -- updates that are not what was asked for -------------------------------------------------------


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in tensors.items() if key != name}


def first_changed(device: ScriptedDevice, **changes: Any) -> Update:
    specs = specs_of(device.trained)
    return device.make_update(tensors=(replace(specs[0], **changes), *specs[1:]))


def results_of(*exits: int, loss: float = 0.5) -> tuple[ExitResult, ...]:
    return tuple(ExitResult(exit=exit, loss=loss, metric=0.5) for exit in exits)


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
    round = give_jobs(coordinator, good, bad)
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
    round = give_jobs(coordinator, good, bad)
    bad.trained["exits.1.2.bias"][2] = value
    bad.send(bad.make_update())
    fault = bad.upload()
    assert isinstance(fault, Fault)
    assert_about_round(fault, "tensors")
    assert "exits.1.2.bias holds NaN or infinite values" in fault.detail
    assert end(round, good, "failed", "tensors").bytes_up == 44


def test_update_of_another_round(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad, round=3)
    for number in (2, 4):
        bad.send(bad.make_update(round=number))
        detail = expect_fault(bad, "round", number)
        assert detail == f"no update of round {number} is wanted from bad now"
    end_well(round, bad, good)


def test_update_twice_counts_once(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    fetch = bad.announce()
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


def test_update_of_a_job_that_was_not_fetched_counts(coordinator, devices):
    # a coordinator that was killed and resumed gives a round's jobs anew
    good, bad = devices
    round = coordinator.train(work(*BOTH))
    good.take_job()
    bad.expect_job()
    bad.trained = {name: tensor + 1 for name, tensor in good.trained.items()}
    bad.send(bad.make_update(num_examples=10))
    assert isinstance(bad.upload(), Accepted)
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_update_of_another_job_is_refused_and_the_job_given_again(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    job = bad.job
    bad.send(bad.make_update(job="0" * 32))
    assert expect_fault(bad, "round") == "round 1 has another job now"
    bad.ready()  # as a device does that dropped its job
    assert bad.take_job() == job
    end_well(round, bad, good)


def test_update_trained_anew_takes_the_place_of_the_first(coordinator, devices):
    """The same job, another digest: the device was restarted in mid-upload."""
    good, bad = devices
    round = give_jobs(coordinator, good, bad, num_floats=FLOATS_PER_PART)
    bad.announce()
    bad.send_parts([0])
    heard_until_now(bad)
    bad.trained = {name: tensor + 1 for name, tensor in bad.trained.items()}
    results = end_well(round, bad, good)
    assert update_of(results, "bad").message.digest != update_of(results, "good").message.digest


@pytest.mark.parametrize("num_floats", [1, FLOATS_PER_PART, 3 * FLOATS_PER_PART + 1])
def test_update_of_another_digest_than_announced(coordinator, devices, num_floats):
    """A bit that flipped on the device between digest and sending: whole, finite and wrong."""
    good, bad = devices
    round = give_jobs(coordinator, good, bad, num_floats=num_floats)
    announced = bad.make_update()
    name = next(iter(bad.trained))
    bad.trained[name].view(torch.uint8)[-1] ^= 1
    bad.send(announced)
    fault = bad.upload()
    assert isinstance(fault, Fault)
    assert (fault.code, fault.round) == ("protocol", 1)
    found = Sender(bad.trained).digest()
    assert f"its bytes have the digest {found}, announced was {announced.digest}" in fault.detail
    end(round, good, "failed", "protocol")


def test_parts_in_any_order_give_the_digest(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad, num_floats=4 * FLOATS_PER_PART)
    bad.announce()
    bad.send_parts([1, 0, 3, 2])
    assert isinstance(bad.upload(), Accepted)
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_update_after_failing_is_refused(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.send(Fault(code="trainer", detail="the training process was killed", round=1))
    bad.send(bad.make_update())
    assert expect_fault(bad, "round") == "bad has failed in this round already"
    assert end(round, good, "failed", "trainer").detail == "the training process was killed"


def test_update_of_a_client_that_was_not_chosen(make_coordinator):
    coordinator = make_coordinator("good", "other", "bad")
    good, other, bad = coordinator.gather()
    round = coordinator.train(work("good", "other"))
    good.take_job()
    other.take_job()
    bad.job, bad.trained = other.job, other.trained
    bad.send(bad.make_update())
    assert expect_fault(bad, "round") == "no update of round 1 is wanted from bad now"
    end_well(round, other, good)


def test_update_with_no_round_open(coordinator):
    clients = coordinator.clients()
    good, bad = coordinator.device("good"), coordinator.device("bad")
    bad.join()
    update = Update(
        job="7" * 32,
        digest="7" * 32,
        round=7,
        num_examples=1,
        num_steps=1,
        exits=(),
        phases={},
        peak_memory_bytes=0,
        tensors=(),
    )
    bad.send(update)
    assert expect_fault(bad, "round", 7) == "no update of round 7 is wanted from bad now"
    bad.reconnect(round=7, job="7" * 32)
    expect_fault(bad, "round", 7)  # hello told of it too
    good.join()
    clients.result(WAIT_S)
    round = coordinator.train(work(*BOTH))
    good.finish()
    bad.finish()
    assert_only_these_count(round.result(WAIT_S), good, bad)


# -- parts -----------------------------------------------------------------------------------------


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
    round = give_jobs(coordinator, good, bad)
    bad.announce()
    bad.send(Part(round=1, index=index), bytes(size))
    assert detail in expect_fault(bad, "protocol")
    assert end(round, good, "failed", "protocol").bytes_up == 0


def test_parts_out_of_order_and_twice(coordinator, devices, quick_links):
    good, bad = devices
    round = give_jobs(coordinator, good, bad, num_floats=3 * FLOATS_PER_PART)
    assert bad.announce().count == 4  # three, and 28 bytes of another
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
    round = give_jobs(coordinator, good, bad)
    bad.send_parts([0])  # before the update
    bad.return_update()
    bad.send_parts([0])  # after it
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


def test_parts_that_do_not_exist_are_not_sent(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    for first, count in ((1, 1024), (2**48, 1)):
        bad.send(Fetch(round=1, have=1, first=first, count=count))
    bad.send(Fetch(round=2, have=0, first=0, count=1))
    bad.ping(1)
    end_well(round, bad, good)


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


@pytest.mark.parametrize("code", ["protocol", "version"])
def test_a_fault_about_another_round_ends_no_job(coordinator, devices, code):
    good, bad = devices
    round = give_jobs(coordinator, good, bad, round=5)
    bad.send(Fault(code=code, detail="about an old one", round=1))
    bad.ping(5)
    end_well(round, good, bad)
