"""What Prometheus would read of a coordinator."""

from __future__ import annotations

import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from tests.support.devices import WAIT_S


def scrape(port: int) -> dict[tuple[str, str], float]:
    """(name, the label's value) to figure, of what this coordinator tells of itself."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=WAIT_S) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain")
        text = answer.read().decode()
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name.removeprefix("edge_coordinator_"), "".join(sample.labels.values()))
            assert key not in found
            found[key] = sample.value
    return found
