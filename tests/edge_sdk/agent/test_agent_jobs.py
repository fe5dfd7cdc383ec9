"""Jobs of the real agent and its real training process, also where memory is short; the coordinator
is scripted. The tests share one device: see conftest.settled."""

from __future__ import annotations

import pytest
import torch
from msgspec.structs import replace

from edge_sdk.capacity.costs import peak_bytes
from edge_sdk.protocol.messages import (
    Accepted,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Part,
    Ready,
    Segment,
    Update,
)
from edge_sdk.protocol.tensor_lists import trained_names
from edge_sdk.protocol.tensors import Tensors, specs_of
from tests.support.agent import GIB, LONG, MODEL, WHOLE, finish, give, job_tensors

NAN = float("nan")


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
    assert device.agent._choosing.chooser.cache_bytes(plan.segments) == kept
    (row,) = [c for c in device.agent._choosing.chooser.costs if (c.first, c.last) == (3, 3)]
    trained = []
    for round, memory_bytes in ((1, 64 * GIB), (2, peak_bytes(row) - 1)):
        device.memory_bytes = memory_bytes
        coordinator.wait_for(Heartbeat)
        coordinator.wait_for(Heartbeat)  # chosen anew for this memory
        sender = coordinator.give(round, MODEL, plan, job_tensors(plan))
        coordinator.wait_for(Fetch)
        coordinator.send_parts(round, sender, range(sender.num_parts))
        trained.append(coordinator.fetch_update(coordinator.wait_for(Update)))
        bound = device.agent._choosing.chooser.cache_bytes(plan.segments)
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
    ],
    ids=["NaN"],
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


def test_end_of_a_job_that_never_came_is_answered_with_what_it_can_do(settled):
    """The coordinator takes a device that has a job, or had, for one that is not ready."""
    coordinator, _ = settled
    coordinator.send(Fault(code="late", detail="the round is over", round=7))
    assert coordinator.expect(Ready).exit == 3


def test_frame_that_is_no_message(settled):
    coordinator, _ = settled
    coordinator.router.socket.send_multipart([coordinator.route, b"\xc1"])
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
    coordinator.welcome(MODEL, LONG)
    assert coordinator.expect(Ready).exit == 3
    coordinator.wait_for(Heartbeat, lambda heartbeat: heartbeat.round == 0)
    finish(coordinator, 1)


def test_welcome_to_the_same_run_keeps_the_job(settled):
    coordinator, _ = settled
    give(coordinator, 1, LONG)
    coordinator.expect(Heartbeat)
    coordinator.send(Fault(code="hello", detail="who is this?"))
    assert coordinator.expect(Hello).round == 1
    coordinator.welcome(MODEL, LONG)
    assert coordinator.expect(Ready).exit == 3
    assert coordinator.expect(Heartbeat).round == 1


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
    assert "killed by signal 9, and memory was not short" in fault.detail
    ready = coordinator.expect(Ready)
    assert (ready.exit, ready.reason) == (0, "costs are not counted yet")
    # Of the trainer that took its place; anybody may have killed the first.
    assert coordinator.expect(Ready).exit == 3
    assert device.trainer().pid != trainer.pid
    finish(coordinator, 2)


def test_trainer_killed_while_idle(settled):
    coordinator, device = settled
    device.trainer().kill()
    assert coordinator.expect(Ready).exit == 0
    assert coordinator.expect(Ready).exit == 3  # nothing was tried, so nothing was too large
    finish(coordinator, 1)
