"""Flower's legacy gRPC server and client as tools/peer measures them.

Runs with the Python of the peer's virtual environment: Flower and numpy only.

    flower.py server ADDRESS MB CLIENTS ROUNDS MARKS
    flower.py client ADDRESS NUMBER

MARKS is a named pipe. It is told, one line each with the monotonic time: "base" when all clients
are there and the model is not, "begin" and "end" of each round, "done" or "failed:WHY".
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from flwr.client import NumPyClient, start_client
from flwr.common import Parameters, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import ServerConfig, start_server
from flwr.server.strategy import FedAvg

NUM_TENSORS = 20
WAIT_S = 600


class MarkedFedAvg(FedAvg):
    """FedAvg that makes the model when all clients are there, and says when a round begins and
    ends."""

    def __init__(self, megabytes: int, clients: int, marks: Path) -> None:
        super().__init__(
            fraction_fit=1.0,
            fraction_evaluate=0.0,
            min_fit_clients=clients,
            min_available_clients=clients,
            min_evaluate_clients=0,
            accept_failures=False,
        )
        self._megabytes, self._clients, self._marks = megabytes, clients, marks
        self.model: list[np.ndarray] = []
        self.last: Parameters | None = None

    def initialize_parameters(self, client_manager: Any) -> Parameters:
        client_manager.wait_for(self._clients, WAIT_S)
        mark(self._marks, "base")
        size = self._megabytes * 1_000_000 // 4 // NUM_TENSORS
        random = np.random.default_rng(0)
        self.model = [random.standard_normal(size, dtype=np.float32) for _ in range(NUM_TENSORS)]
        return ndarrays_to_parameters(self.model)

    def configure_fit(self, *args: Any, **options: Any) -> Any:
        mark(self._marks, "begin")
        return super().configure_fit(*args, **options)

    def aggregate_fit(self, server_round: int, results: Any, failures: Any) -> Any:
        if len(results) != self._clients:
            mark(self._marks, f"failed:{len(results)}-results")
        new, metrics = super().aggregate_fit(server_round, results, failures)
        mark(self._marks, "end")
        self.last = new
        return new, metrics


def serve(address: str, megabytes: int, clients: int, rounds: int, marks: Path) -> None:
    strategy = MarkedFedAvg(megabytes, clients, marks)
    start_server(server_address=address, config=ServerConfig(num_rounds=rounds), strategy=strategy)
    assert strategy.last is not None
    is_right = all(
        np.allclose(new[1:], old[1:], rtol=1e-5) and np.isclose(new[0], (clients - 1) / 2)
        for new, old in zip(parameters_to_ndarrays(strategy.last), strategy.model, strict=True)
    )
    mark(marks, "done" if is_right else "failed:wrong-mean")


class Echo(NumPyClient):
    """Sends back what it got, with its own number in the first element of each tensor."""

    def __init__(self, number: int) -> None:
        self._number = number

    def fit(self, parameters: list[np.ndarray], config: object) -> Any:
        for array in parameters:
            array[0] = self._number
        return parameters, 1, {}


def mark(path: Path, what: str) -> None:
    with path.open("a") as file:
        file.write(f"{what} {time.monotonic()}\n")


if __name__ == "__main__":
    if sys.argv[1] == "server":
        address, megabytes, clients, rounds, path = sys.argv[2:]
        serve(address, int(megabytes), int(clients), int(rounds), Path(path))
    else:
        start_client(
            server_address=sys.argv[2], client=Echo(int(sys.argv[3])).to_client(), insecure=True
        )
