"""Who is connected: keys, two with one key, hello and ready. The real Router and ZmqCohort against
scripted devices, one of them good."""

from __future__ import annotations

import math
import re
import time
from types import SimpleNamespace

import pytest

from coordinator.admission.client_list import remove_client
from coordinator.fleet import sessions as sessions_module
from coordinator.links.rate_limit import RateLimits
from coordinator.links.router import Received
from coordinator.links.unfit import UnfitDevices
from edge_sdk.protocol.keys import make_keys, read_keys
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Bye,
    Fault,
    Fetch,
    Heartbeat,
    Message,
    Probe,
    Ready,
    Welcome,
)
from tests.support.devices import WAIT_S, ScriptedDevice
from tests.support.examples import rewrite
from tests.support.jobs_and_results import (
    BOTH,
    absence_of,
    assert_only_these_count,
    end,
    end_well,
    ended,
    expect_fault,
    give_jobs,
    work,
)
from tests.support.real_coordinator import make_cohort

# -- keys ------------------------------------------------------------------------------------------


def test_unknown_client_key(coordinator, devices, tmp_path, caplog):
    good, bad = devices
    pending_key = make_keys(tmp_path / "stranger", "stranger")
    round = give_jobs(coordinator, good, bad)
    refused = coordinator.device("stranger", keys=pending_key)
    assert "does not know this device's key" in refused.refusal()
    assert f"unknown public key {pending_key.public.decode()}" in caplog.text
    end_well(round, good, bad)


def test_wrong_server_key(coordinator, devices, tmp_path):
    good, bad = devices
    other = make_keys(tmp_path / "other", "server")
    round = give_jobs(coordinator, good, bad)
    refused = coordinator.device("bad", server_key=other.public)
    assert "public key here is probably not the one" in refused.refusal()
    end_well(round, good, bad)


def test_client_without_keys_against_a_coordinator_with(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    refused = coordinator.device("bad", keys=None, server_key=None)
    assert "use keys on both or --insecure on both" in refused.refusal()
    end_well(round, good, bad)


def test_client_with_keys_against_a_coordinator_without(make_coordinator, tmp_path):
    coordinator = make_coordinator(*BOTH, is_insecure=True)
    good, bad = coordinator.gather()
    keys = make_keys(tmp_path / "keys", "bad")
    round = give_jobs(coordinator, good, bad)
    refused = coordinator.device("bad", keys=keys, server_key=keys.public)
    assert "--insecure" in refused.refusal()
    end_well(round, good, bad)


def test_key_of_another_client(make_coordinator):
    coordinator = make_coordinator("good", "bad", "thief", min_clients=2)
    clients = coordinator.clients()
    good, bad, thief = (coordinator.device(name) for name in coordinator.names)
    good.join()
    bad.join()
    clients.result(WAIT_S)
    round = give_jobs(coordinator, good, bad)
    thief.send(thief.make_hello(client_id="bad", round=1))
    assert expect_fault(thief, "admission", 0) == "this is 'thief', hello says 'bad'"
    thief.send(Heartbeat(round=1))
    assert thief.expect(Fault).code == "hello"  # it has not become anybody
    end_well(round, bad, good)


def test_one_connection_is_one_client(make_coordinator):
    coordinator = make_coordinator(*BOTH, is_insecure=True)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, good, bad)
    bad.send(bad.make_hello(client_id="good", round=1))
    expect_fault(bad, "admission", 0)
    end_well(round, bad, good)


def test_revoked_admission_takes_effect_on_the_live_link(make_coordinator):
    coordinator = make_coordinator(*BOTH, oldest=2)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH))
    good.finish()
    bad.take_job()
    bad.ping(1)  # from here on nobody says anything
    rewrite(coordinator.clients_file, f"good {coordinator.keys['good'].public.decode()}\n")
    assert "not admitted any more" in expect_fault(bad, "admission", 0)  # without a word from it
    absence = ended(round, good, "failed", "gone")
    assert absence.detail == "its key is not admitted any more"
    assert coordinator.ask(lambda cohort: cohort.num_busy).result(WAIT_S) == 0  # none is late
    bad.send(bad.make_update())
    coordinator.clients()
    expect_fault(bad, "admission", 0)


def test_key_that_was_given_another_name(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    text = coordinator.clients_file.read_text()
    rewrite(coordinator.clients_file, text.replace("bad ", "renamed "))
    bad.send(bad.make_update())
    expect_fault(bad, "admission", 0)
    assert end(round, good, "failed", "gone").detail == "its key is not admitted any more"


def test_device_whose_key_was_replaced_is_gone_at_once(make_coordinator, tmp_path):
    """As by `keys --rotate` while its agent runs."""
    coordinator = make_coordinator(*BOTH)
    good, bad = coordinator.gather()
    round = coordinator.train(work(*BOTH))
    good.finish()
    bad.take_job()
    keys = {"good": coordinator.keys["good"], "bad": make_keys(tmp_path / "new", "bad")}
    lines = [f"{name} {pair.public.decode()}\n" for name, pair in keys.items()]
    rewrite(coordinator.clients_file, "".join(lines))
    bad.send(Heartbeat(round=1))
    assert "keys --rotate" in bad.expect(Fault).detail
    detail = absence_of(round.result(WAIT_S), "bad", "failed", "gone").detail
    assert detail == "its key is not admitted any more"


# -- two with one key --------------------------------------------------------------------------


def test_two_programs_with_one_key_the_first_stays(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    second = coordinator.device("bad")
    second.session = "on another board"
    second.send(second.make_hello())
    bad.expect(Probe)
    bad.send(Heartbeat(round=1))
    bad.expect(Heartbeat)
    detail = expect_fault(second, "duplicate", 0)
    assert "another device with the key of 'bad' is connected from" in detail
    second.send(Heartbeat())
    assert second.expect(Fault).code == "hello"  # it has not become anybody
    end_well(round, bad, good)
    (state,) = coordinator.ask(lambda cohort: cohort.snapshot().clients[:1]).result(WAIT_S)
    assert (state.name, state.duplicates) == ("bad", 1)


def test_program_that_does_not_answer_loses_its_place(coordinator, devices, monkeypatch):
    """Half-open: its connection stands, and nobody is behind it."""
    monkeypatch.setattr(sessions_module, "PROBE_S", 0.5)
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    second = coordinator.device("bad")
    second.session = "after a power cut"
    second.hello()  # is welcome, when the first had time to answer
    second.ready()
    second.finish()
    bad.expect(Probe)
    bad.send(bad.make_update())
    expect_fault(bad, "hello", 0)
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, second)


class Lines:
    """In the place of a Router: every link stands."""

    limits = RateLimits(burst=math.inf)
    num_refused = 0

    def __init__(self) -> None:
        self.unfit = UnfitDevices()
        self.said: list[Received] = []
        self.sent: list[tuple[bytes, Message]] = []

    def receive(self, timeout_ms: int) -> tuple[bool, Received | None]:
        return (True, self.said.pop(0)) if self.said else (False, None)

    def send(self, route: bytes, message: Message, payload: object = None) -> bool:
        self.sent.append((route, message))
        return True

    def is_admitted(self, name: str) -> bool:
        return True

    def is_still(self, received: Received) -> bool:
        return True


def test_pause_of_the_caller_is_no_answer_to_a_probe(tmp_path):
    """Between a probe and its answer the caller aggregates; nothing is heard meanwhile."""
    lines = Lines()
    cohort = make_cohort(lines, tmp_path)
    for session in ("1", "2"):
        said = ScriptedDevice.make_hello(SimpleNamespace(name="a", session=session))
        lines.said.append(Received(session.encode(), None, said, None))
        cohort._pump()
    assert [(route, type(message)) for route, message in lines.sent] == [
        (b"1", Welcome),
        (b"1", Probe),
    ]
    cohort._listened -= 5.0  # so long the caller was busy
    cohort._pump()
    cohort.sessions.check_links(time.monotonic(), {})
    assert len(lines.sent) == 2  # it is not known yet who is there
    cohort.sessions.check_links(time.monotonic() + 5.0 + sessions_module.PROBE_S + 0.1, {})
    assert [(route, type(message)) for route, message in lines.sent[2:]] == [(b"2", Welcome)]


# -- hello and ready -------------------------------------------------------------------------------


def test_other_protocol_version(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.send(bad.make_hello(protocol=99))
    assert f"protocol 99, this side {PROTOCOL}" in expect_fault(bad, "version", 0)
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
    assert re.search(detail, told := expect_fault(bad, "data", 0)), told
    good.join()
    bad.join()  # with other data
    assert [client.id for client in clients.result(WAIT_S)] == ["bad", "good"]


def test_message_before_hello(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.link.open()
    for message in (
        Ready(exit=3),
        Heartbeat(),
        bad.make_update(),
        Fetch(round=1, have=0, first=0, count=1),
    ):
        bad.send(message)
        expect_fault(bad, "hello", 0)
    bad.hello(round=1, job=bad.job.id)
    end_well(round, bad, good)


def test_newer_connection_replaces_the_older(coordinator, devices):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    newer = coordinator.device("bad")
    newer.hello(session=bad.session, round=1, job=bad.job.id)
    bad.send(bad.make_update())
    expect_fault(bad, "hello", 0)
    newer.job, newer.trained = bad.job, bad.trained
    newer.return_update()
    good.return_update()
    assert_only_these_count(round.result(WAIT_S), good, bad)


@pytest.mark.parametrize("ready", [Ready(exit=4), Ready(exit=1, stages=(2, 4))])
def test_ready_beyond_the_model(coordinator, devices, ready):
    good, bad = devices
    round = give_jobs(coordinator, good, bad)
    bad.send(ready)
    assert expect_fault(bad, "protocol", 0) == "the model has 3 exits"
    end_well(round, bad, good)
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
    assert expect_fault(bad, "protocol", 0) == "2 stage_s for 1 stages"
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


def test_a_key_that_is_replaced_while_it_claims_a_place_does_not_get_it(tmp_path):
    """Its hello was let in, and waits for who was there first."""

    class Replaced(Lines):
        def is_still(self, received: Received) -> bool:
            return False

    lines = Replaced()
    cohort = make_cohort(lines, tmp_path)
    for session in ("1", "2"):
        said = ScriptedDevice.make_hello(SimpleNamespace(name="a", session=session))
        cohort.sessions.on_hello(Received(session.encode(), "a", said, None), said)
    cohort.sessions.check_links(time.monotonic() + sessions_module.PROBE_S + 0.1, {})
    route, refused = lines.sent[-1]
    assert (route, refused.code) == (b"2", "admission")
    assert cohort.sessions.all["a"].route == b"1"


def test_the_hub_knows_whose_key_a_message_had(gate, member):
    device = gate.device(read_keys(member, "device"))
    device.send(Heartbeat())
    device.expect(Heartbeat)
    received = Received(b"r", "pi", Heartbeat(), None, key=read_keys(member, "device").public)
    assert gate.router.is_still(received)
    remove_client(gate.clients, "pi")
    assert not gate.router.is_still(received)


# -- names that are only claimed -------------------------------------------------------------------


def test_names_without_keys_are_bounded(make_coordinator, monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_CLIENTS", 2)
    coordinator = make_coordinator(*BOTH, is_insecure=True)
    good, bad = coordinator.gather()
    round = give_jobs(coordinator, good, bad)
    third = coordinator.device("third")
    third.send(third.make_hello())
    refused = third.expect(Fault)
    assert (refused.code, refused.round) == ("admission", 0)
    assert refused.detail == "2 names have joined without keys, and no more may"
    bad.reconnect()  # who is known comes back
    end_well(round, good, bad)


def test_keys_need_no_bound(make_coordinator, monkeypatch):
    monkeypatch.setattr(sessions_module, "MAX_CLIENTS", 1)
    coordinator = make_coordinator(*BOTH)
    good, bad = coordinator.gather()
    end_well(give_jobs(coordinator, good, bad), good, bad)
