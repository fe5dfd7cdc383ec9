"""A `Client` in a program of one's own, and where there is no coordinator."""

from __future__ import annotations

from edge_sdk import Client
from tests.support.examples import examples

X, Y = examples(12).x, examples(12).y
NOWHERE = "tcp://127.0.0.1:9"  # the discard port, where nobody listens


def client(data: object = (X, Y), coordinator: str = NOWHERE, **options: object) -> Client:
    return Client(coordinator, data=data, **{"insecure": True, "threads": 1, **options})


def one_line(error: Exception) -> str:
    assert "\n" not in str(error)
    return str(error)
