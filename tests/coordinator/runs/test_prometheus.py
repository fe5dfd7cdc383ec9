"""What a coordinator tells Prometheus, and at which address."""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
from collections.abc import Iterator
from typing import get_args

import pytest

from coordinator.fleet.counters import CODES, OTHER
from coordinator.runs.prometheus import MetricsServer, metrics_flag
from coordinator.store.status import (
    ClientPhase,
    ClientState,
    CohortState,
    RunPhase,
    Snapshot,
)
from edge_sdk.errors import ConfigError
from tests.support.run_states import HOSTILE, snapshot
from tests.support.scraping import scrape


@contextlib.contextmanager
def serving(state: Snapshot | None) -> Iterator[MetricsServer]:
    with contextlib.closing(MetricsServer("127.0.0.1:0")) as server:
        server.latest = lambda: state
        yield server


def test_prometheus_gets_the_latest_snapshot():
    state = snapshot(rounds_done=2, rounds_s=7.5, last_round_s=3.5, holdout_metric=0.75)
    with serving(state) as server:
        found = scrape(server.port)
    expected = {
        ("round", ""): 3,
        ("rounds_planned", ""): 50,
        ("last_round_seconds", ""): 3.5,
        ("round_seconds_count", ""): 2,
        ("round_seconds_sum", ""): 7.5,
        ("phase", "round open"): 1,
        ("phase", "aggregating"): 0,
        ("run_info", "1a2b"): 1,
        ("clients", "upload"): 1,
        ("clients", "away"): 1,
        ("clients", "ready"): 0,
        ("round_chosen", ""): 4,
        ("round_needed", ""): 2,
        ("round_returned", ""): 1,
        ("holdout_accuracy", "received"): 0.75,
        ("holdout_accuracy", "own"): None,
        ("bytes_in_flight", ""): 10,
        ("memory_budget_bytes", ""): 64,
        ("spool_bytes", ""): 7,
        ("bytes_sent_total", ""): 100,
        ("bytes_received_total", ""): 200,
        ("updates_total", "accepted"): 5,
        ("updates_total", "late"): 1,
        ("updates_total", "failed"): 2,
        ("strangers_refused_total", ""): 9,
        ("messages_unheard_total", "refused"): 11,
        ("messages_unheard_total", "dropped"): 12,
        ("peers_ended_total", ""): 13,
        ("connections_ended_total", ""): 14,
        ("unfit_devices", ""): 2,
        ("faults_total", "tensors"): 3,
        ("faults_total", "gone"): 1,
        ("faults_total", OTHER): 2,
        ("faults_total", "stalled"): 0,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found["start_time_seconds", ""] == pytest.approx(state.started_utc.timestamp())
    assert found["status_timestamp_seconds", ""] == pytest.approx(state.written_utc.timestamp())


def test_series_do_not_grow_with_clients_and_codes():
    many = CohortState(
        clients=tuple(ClientState(name=f"pi-{n}", phase="ready") for n in range(500)),
        faults={f"{HOSTILE}{n}": 1 for n in range(500)} | {"gone": 1},
    )
    with serving(snapshot()) as server:
        before = scrape(server.port)
        server.latest = lambda: snapshot(cohort=many)
        found = scrape(server.port)
    assert found.keys() == before.keys()
    assert found["clients", "ready"] == found["faults_total", OTHER] == 500
    for name, values in (
        ("clients", get_args(ClientPhase)),
        ("phase", get_args(RunPhase)),
        ("faults_total", {*CODES, OTHER}),
    ):
        assert {value for label, value in found if label == name} == set(values)


def test_nothing_that_is_told_breaks_the_answer():
    with serving(snapshot(run=HOSTILE)) as server:
        assert scrape(server.port)["run_info", HOSTILE] == 1


def test_before_the_run_begins_there_is_the_process_only():
    with serving(None) as server:
        found = scrape(server.port)
    if sys.platform == "linux":
        assert found["process_resident_memory_bytes", ""] > 10**6
    assert ("round", "") not in found


def test_two_servers_have_figures_of_their_own_and_a_port_is_free_again():
    with serving(snapshot(round=1)) as one, serving(snapshot(round=2)) as two:
        assert (scrape(one.port)["round", ""], scrape(two.port)["round", ""]) == (1, 2)
        port = one.port
        with pytest.raises(ConfigError, match=f"--metrics 127.0.0.1:{port}: cannot listen there"):
            MetricsServer(f"127.0.0.1:{port}")
    assert not any("serve_forever" in thread.name for thread in threading.enumerate())
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9464",
        ":9464",
        "localhost",
        "localhost:",
        "localhost:x",
        "localhost:65536",
        "a:b:1",
        "localhost:-1",
        "http://localhost:9464",
        "localhost:9464/metrics",
        "local host:9464",
        "localhost:9464\n",
        "localhost:٣",
        "[::1]",
        "[::1:9464",
    ],
)
def test_a_bad_address_is_one_line(text):
    with pytest.raises(ConfigError, match="is not HOST:PORT, e.g. 127.0.0.1:9464"):
        metrics_flag(text)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_the_address_is_logged(caplog, host):
    caplog.set_level("INFO")
    try:
        server = MetricsServer(f"{host}:0")
    except ConfigError as error:
        pytest.skip(str(error))  # a machine without IPv6
    server.close()
    assert [record.getMessage() for record in caplog.records] == [
        f"metrics at http://{host}:{server.port}/metrics"
    ]


def test_good_addresses():
    assert metrics_flag("127.0.0.1:9464") == ("127.0.0.1", 9464)
    assert metrics_flag("[::1]:0") == ("::1", 0)


@pytest.mark.parametrize("text", ["no-such-host.invalid:1", "203.0.113.1:0", f"{'a' * 70}:1"])
def test_an_address_of_nobody_is_one_line(text):
    with pytest.raises(ConfigError, match="cannot listen there"):
        MetricsServer(text)


def test_without_the_package_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ConfigError, match=r'py3-none-any.whl\[metrics\]"'):
        MetricsServer("127.0.0.1:0")
