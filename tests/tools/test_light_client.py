"""tools/light_client.py message by message; with the real coordinator in test_bench_load.py."""

from __future__ import annotations

import struct
import subprocess
import sys

import pytest

from edge_sdk.errors import ProtocolError
from edge_sdk.protocol.codec import decode, encode
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Accepted,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Job,
    ModelSpec,
    Part,
    Plan,
    Probe,
    Ready,
    Segment,
    TensorSpec,
    Update,
    Welcome,
)
from edge_sdk.protocol.stream import PART_BYTES, digest_of
from tests.support.processes import ROOT
from tools.bench.light_fleet import read_clients, write_clients
from tools.light_client import LightClient, update_bytes, value_of

SPEC = ModelSpec(family="mlp", input_shape=(10,), num_classes=2, exit=2)
PLAN = Plan(segments=(Segment(first=1, last=2),))
PART = PART_BYTES // 4  # float32 values of one part
ID = 32 * "a"


def job_of(parts: float, round: int = 1, id: str = ID) -> Job:
    weight = TensorSpec(name="w", shape=(int(parts * PART),), dtype="float32")
    return Job(id=id, round=round, model=SPEC, plan=PLAN, tensors=(weight,), deadline_s=0)


def welcome() -> Welcome:
    return Welcome(protocol=PROTOCOL, run="r", model=SPEC, plan=PLAN, deadline_s=0, heartbeat_s=5)


@pytest.fixture
def client():
    """Welcomed and ready."""
    client = LightClient("c1", (10,), 2)
    assert client.hello().round == 0
    assert client.on_message(welcome()) == [(Ready(exit=2), None)]
    return client


def give(client: LightClient, job: Job, *indices: int) -> list:
    """What it answers to the last of these parts, each of zeros."""
    total = job.tensors[0].num_bytes
    for index in indices:
        size = min(PART_BYTES, total - index * PART_BYTES)
        answer = client.on_message(Part(round=job.round, index=index), bytes(size))
    return answer


def test_an_update_holds_its_rounds_value_and_zeros_for_integers():
    specs = (
        TensorSpec(name="count", shape=(), dtype="int64"),
        TensorSpec(name="w", shape=(3,), dtype="float32"),
        TensorSpec(name="d", shape=(1,), dtype="float64"),
        TensorSpec(name="h", shape=(2,), dtype="float16"),
    )
    assert value_of(16) == 1.25
    stream = bytes(update_bytes(specs, 16))
    # 8 + 12, up to 24 for the next multiple of 8, + 8 + 4
    assert struct.unpack("<q3f4xd2e", stream) == (0, 1.25, 1.25, 1.25, 1.25, 1.25, 1.25)


def test_a_job_from_beginning_to_end(client):
    job = job_of(1.5)
    assert client.on_message(job) == [(Fetch(round=1, have=0, first=0, count=2), None)]
    assert client.heartbeat() == Heartbeat(round=1)
    assert client.on_message(Probe()) == [(Heartbeat(round=1), None)]
    (last, _), (update, _) = give(client, job, 0, 1)
    assert last == Fetch(round=1, have=2, first=2, count=0)
    assert isinstance(update, Update)
    assert decode(encode(update)) == update  # within every bound of the wire
    assert [result.exit for result in update.exits] == [1, 2]
    parts = client.on_message(Fetch(round=1, have=0, first=0, count=8))
    assert [part for part, _ in parts] == [Part(round=1, index=0), Part(round=1, index=1)]
    assert [len(payload) for _, payload in parts] == [PART_BYTES, PART_BYTES // 2]
    assert update.digest == digest_of(payload for _, payload in parts)
    assert client.on_message(Accepted(round=1)) == [(Ready(exit=2), None)]
    assert client.round == 0
    assert client.counts["bytes down"] == client.counts["bytes up"] == 1.5 * PART_BYTES
    assert list(client.accepted_at) == [1]


def test_no_more_than_a_window_is_under_way(client):
    job = job_of(20)
    assert client.on_message(job) == [(Fetch(round=1, have=0, first=0, count=8), None)]
    assert give(client, job, 0, 1, 2) == []  # 5 of 8 under way
    assert give(client, job, 3) == [(Fetch(round=1, have=4, first=8, count=4), None)]


def test_the_next_rounds_model_is_compared_with_what_was_sent(client):
    first = job_of(1)
    client.on_message(first)
    give(client, first, 0)
    client.on_message(Accepted(round=1))
    second = job_of(1, round=2, id=32 * "b")
    client.on_message(second)
    assert client.counts["models compared"] == 0
    client.on_message(Part(round=2, index=0), update_bytes(second.tensors, 1))
    assert (client.counts["models compared"], client.counts["models wrong"]) == (1, 0)
    client.on_message(Accepted(round=2))
    third = job_of(1, round=3, id=32 * "c")
    client.on_message(third)
    give(client, third, 0)  # zeros, not 1 + 2 / 64
    assert (client.counts["models compared"], client.counts["models wrong"]) == (2, 1)


def test_a_broken_download_goes_on_where_it_was(client):
    job = job_of(20)
    client.on_message(job)
    give(client, job, 0, 1)
    assert client.on_message(Fault(code="hello", detail="who?"))[0][0].job == ID
    again = [(Fetch(round=1, have=2, first=2, count=8), None)]
    assert client.on_message(welcome()) == again
    assert client.on_message(welcome()) == []  # of a second hello
    assert client.on_message(job) == again  # given again by a coordinator that was restarted
    assert client.counts["jobs"] == 1


def test_a_finished_update_is_told_again(client):
    job = job_of(1)
    client.on_message(job)
    update = give(client, job, 0)[-1]
    hello = client.hello()
    assert isinstance(hello, Hello)
    assert (hello.round, hello.job) == (1, ID)
    assert client.on_message(welcome()) == [update]
    assert client.on_message(Accepted(round=1)) == [(Ready(exit=2), None)]
    assert client.on_message(Accepted(round=1)) == []
    assert client.counts["accepted"] == client.counts["accepted twice"] == 1


def test_a_fault_of_its_round_ends_the_job_and_another_does_not(client):
    client.on_message(job_of(1, round=2))
    assert client.on_message(Fault(code="round", detail="over", round=1)) == []
    assert client.round == 2
    assert client.on_message(Fault(code="late", detail="over", round=2)) == [(Ready(exit=2), None)]
    assert client.round == 0
    assert client.counts["fault late"] == client.counts["fault round"] == 1


def test_only_a_final_bye_is_the_end(client):
    assert client.on_message(Bye(reason="restart")) == [(Bye(reason="bye"), None)]
    assert not client.is_over
    assert client.on_message(Bye(is_final=True))
    assert client.is_over


def test_what_no_coordinator_says_is_an_error(client):
    with pytest.raises(ProtocolError, match="c1: Ready is not for devices"):
        client.on_message(Ready(exit=1))
    client.on_message(job_of(1))
    with pytest.raises(ProtocolError, match="part 0 has 3 bytes"):
        client.on_message(Part(round=1, index=0), b"abc")


def test_keys_are_written_for_their_owner_only_and_read_by_slices(tmp_path):
    from edge_sdk.protocol.keys import KeyPair

    pairs = [(f"c{number}", KeyPair(b"p%d" % number, b"s%d" % number)) for number in range(3)]
    write_clients(tmp_path / "pairs", pairs)
    assert (tmp_path / "pairs").stat().st_mode & 0o777 == 0o600
    assert read_clients(tmp_path / "pairs", 1, 5) == pairs[1:]


def test_it_imports_no_torch():
    code = "import sys, tools.bench.light_fleet; print(*{'torch', 'numpy'} & set(sys.modules))"
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert ended.stdout.split() == []
