"""Flower's current path (SuperLink, SuperNodes, `flwr run`) as tools/peer measures it.

A client sends back what it got, with its own number in the first element of each tensor: the
SuperLink stores objects by their content, and equal updates would be one. marks: see
tools/peer/flower.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

NUM_TENSORS = 20
server = ServerApp()
client = ClientApp()


class MarkedFedAvg(FedAvg):
    """FedAvg that says when a round begins and ends."""

    def __init__(self, clients: int, marks: str) -> None:
        super().__init__(
            fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        self._marks = marks
        self._clients = clients

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        mark(self._marks, "begin")
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        good = sum(not reply.has_error() for reply in replies)
        result = super().aggregate_train(server_round, replies)
        mark(self._marks, "end" if good == self._clients else f"failed:{good}-replies")
        return result


@server.main()
def serve(grid: Grid, context: Context) -> None:
    config = context.run_config
    megabytes, clients = int(config["megabytes"]), int(config["clients"])
    marks = str(config["marks"])
    while len(list(grid.get_node_ids())) < clients:
        time.sleep(1)
    mark(marks, "base")
    size = megabytes * 1_000_000 // 4 // NUM_TENSORS
    random = np.random.default_rng(0)
    model = [random.standard_normal(size, dtype=np.float32) for _ in range(NUM_TENSORS)]
    result = MarkedFedAvg(clients, marks).start(
        grid, ArrayRecord(model), num_rounds=int(config["rounds"])
    )
    got = result.arrays.to_numpy_ndarrays()
    is_right = all(
        np.allclose(new[1:], old[1:], rtol=1e-5) and np.isclose(new[0], (clients - 1) / 2)
        for new, old in zip(got, model, strict=True)
    )
    mark(marks, "done" if is_right else "failed:wrong-mean")


@client.train()
def train(message: Message, context: Context) -> Message:
    arrays = message.content["arrays"].to_numpy_ndarrays()
    for array in arrays:
        array[0] = int(context.node_config["number"])
    content = RecordDict(
        {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    )
    return Message(content=content, reply_to=message)


def mark(path: str, what: str) -> None:
    with Path(path).open("a") as file:
        file.write(f"{what} {time.monotonic()}\n")
