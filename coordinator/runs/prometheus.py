"""`serve --metrics HOST:PORT`: the latest Snapshot for Prometheus, by HTTP.

What is asked reads one reference, so a scrape never waits for the thread that runs the rounds, nor
that one for a scrape. There are no labels with clients' names: a thousand devices would be a
thousand series for each figure, and who looks for one device finds it with `status`. Labels are
phases, outcomes and the codes of counters.CODES, all of them always there, so the number of series
is fixed. Nobody is asked who they are and nothing is encrypted: listen on an address of your own.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from coordinator.fleet.counters import CODES, OTHER
from coordinator.runs.http_server import BoundedServer
from coordinator.store.status import ClientPhase, RunPhase, Snapshot
from edge_sdk.errors import ConfigError
from edge_sdk.helpers.imports import install
from edge_sdk.tasks.metrics import METRICS

log = logging.getLogger(__name__)
PREFIX = "edge_coordinator_"
_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%a-z]+\]|[^:/\s\[\]]+):([0-9]{1,5})")


def metrics_flag(text: str) -> tuple[str, int]:
    """Host and port of HOST:PORT, port 0 for any free one. Raises ConfigError."""
    found = _ADDRESS.fullmatch(text)
    if not found or int(found[2]) > 65535:
        raise ConfigError(f"--metrics {text!r} is not HOST:PORT, e.g. 127.0.0.1:9464")
    return found[1].strip("[]"), int(found[2])


class MetricsServer:
    """Answers from its start on; with figures once `latest` gives a snapshot. Raises ConfigError
    where the package is missing or the address cannot be listened on."""

    def __init__(self, address: str) -> None:
        host, port = metrics_flag(address)
        try:
            from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
        except ImportError as error:
            raise ConfigError(f"--metrics needs {error.name}; {install('metrics')}") from error
        self.latest: Callable[[], Snapshot | None] = lambda: None
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)  # memory and CPU seconds of this process
        try:
            self._server = BoundedServer(host, port, make_wsgi_app(registry))
        except (OSError, UnicodeError) as error:
            raise ConfigError(
                f"--metrics {address}: cannot listen there: {error}; choose another address"
            ) from error
        self.port: int = self._server.server_port
        log.info("metrics at http://%s:%d/metrics", address.rpartition(":")[0], self.port)

    def collect(self) -> Iterator[Any]:
        """As prometheus_client asks, in a thread for each scrape."""
        snapshot = self.latest()
        if snapshot is not None:
            yield from families(snapshot)

    def close(self) -> None:
        self._server.close()


def families(snapshot: Snapshot) -> Iterator[Any]:
    """The snapshot as Prometheus's metric families; the same series whatever happens."""
    from prometheus_client.core import InfoMetricFamily, SummaryMetricFamily

    cohort = snapshot.cohort
    clients = Counter(client.phase for client in cohort.clients)
    run = {"run": snapshot.run}
    yield InfoMetricFamily(f"{PREFIX}run", "The run that is coordinated.", value=run)
    started, written = snapshot.started_utc.timestamp(), snapshot.written_utc.timestamp()
    yield _gauge("start_time_seconds", "When the coordinator started, Unix time.", started)
    yield _gauge("status_timestamp_seconds", "When these figures were true, Unix time.", written)
    yield _gauge("round", "Round in progress, or the next one.", snapshot.round)
    yield _gauge("rounds_planned", "Rounds of the whole run.", snapshot.rounds)
    yield _gauge("last_round_seconds", "Duration of the last round.", snapshot.last_round_s)
    yield SummaryMetricFamily(
        f"{PREFIX}round_seconds",
        "Durations of the rounds since the start.",
        count_value=snapshot.rounds_done,
        sum_value=snapshot.rounds_s,
    )
    now = {phase: phase == snapshot.phase for phase in get_args(RunPhase)}
    yield _labelled("phase", "1 for what the run does now.", "phase", now)
    by_phase = {phase: clients[phase] for phase in get_args(ClientPhase)}
    yield _labelled("clients", "Clients by what they do now.", "phase", by_phase)
    yield _gauge("round_chosen", "Participants of the round.", cohort.chosen)
    yield _gauge("round_needed", "Updates that the round needs.", cohort.needed)
    yield _gauge("round_returned", "Updates that the round has.", cohort.returned)
    yield _gauge("bytes_in_flight", "Bytes of updates being received.", cohort.bytes_in_flight)
    yield _gauge("memory_budget_bytes", "Most that may be in flight.", cohort.budget_bytes)
    yield _gauge("spool_bytes", "Bytes of updates kept on disk.", cohort.spool_bytes)
    yield _counter("bytes_sent", "Bytes of tensors sent to clients.", cohort.bytes_down)
    yield _counter("bytes_received", "Bytes of tensors received from clients.", cohort.bytes_up)
    yield _counter("strangers_refused", "Connections refused for their key.", cohort.strangers)
    metric = METRICS[snapshot.task]
    title = metric.name[0].upper() + metric.name[1:]
    for name, said, values in (
        (f"test_{metric.key}", f"{title} on the test set, last round.", snapshot.metric),
        ("train_loss", "Training loss of the participants, last round.", snapshot.loss),
        (f"train_{metric.key}", f"Training {metric.name} of the same.", snapshot.train_metric),
    ):
        yield _labelled(
            name, said, "exit", {str(e): v for e, v in enumerate(values, 1) if v is not None}
        )
    own = {"received": snapshot.holdout_metric, "own": snapshot.personal_metric}
    said = (
        f"{title} on what clients set aside, last round, of the models received or of each's own."
    )
    yield _labelled(
        f"holdout_{metric.key}", said, "model", {k: v for k, v in own.items() if v is not None}
    )
    links = cohort.links
    said = "Messages that were not heard, by why."
    unheard = {"refused": links.frames_refused, "dropped": links.messages_dropped}
    yield _labelled("messages_unheard", said, "why", unheard, is_counter=True)
    said = "Peers that said too much, and were kept out for a while."
    yield _counter("peers_ended", said, links.peers_ended)
    said = "Connections ended for their descriptor or more than is read."
    yield _counter("connections_ended", said, links.connections_ended)
    said = "Devices that are refused, or can train nothing, of those heard of last."
    yield _gauge("unfit_devices", said, len(cohort.unfit))
    outcomes = {
        "accepted": cohort.updates_accepted,
        "late": cohort.updates_late,
        "stale": cohort.updates_stale,
        "failed": cohort.updates_failed,
    }
    said = "What became of participants' updates."
    yield _labelled("updates", said, "outcome", outcomes, is_counter=True)
    faults = {code: cohort.faults.get(code, 0) for code in sorted(CODES)}
    faults[OTHER] = sum(cohort.faults.values()) - sum(faults.values())
    yield _labelled("faults", "Faults by code.", "code", faults, is_counter=True)


def _gauge(name: str, said: str, value: float) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return GaugeMetricFamily(PREFIX + name, said, value=value)


def _counter(name: str, said: str, value: float) -> Any:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(PREFIX + name, said, value=value)


def _labelled(
    name: str, said: str, label: str, values: Mapping[str, float], *, is_counter: bool = False
) -> Any:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    kind = CounterMetricFamily if is_counter else GaugeMetricFamily
    family: Any = kind(PREFIX + name, said, labels=[label])
    for value, figure in values.items():
        family.add_metric([value], figure)
    return family
