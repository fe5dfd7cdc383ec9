"""What runs on the emulated device beside `edge-sdk` itself: `python3 arm64_programs.py link|train
FOLDER`. The training runs natively too, for comparison; so torch is imported where it is used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from edge_sdk.hardware.measure import measure
from edge_sdk.protocol.keys import read_all_keys
from edge_sdk.protocol.link import Link
from edge_sdk.protocol.messages import PROTOCOL, Accepted, Hello, ModelSpec, Part, Plan, Segment

SPEC = ModelSpec(
    family="cnn", input_shape=(1, 8, 8), num_classes=10, exit=3, options={"channels": (8, 8, 12)}
)
# Exits 1 and 2 jointly, stage 3 alone over the frozen prefix: all that a device trains.
PLAN = Plan(
    segments=(Segment(first=1, last=2), Segment(first=3, last=3)),
    epochs=2,
    batch_size=16,
    optimizer="sgd",
    momentum=0.9,
    lr=0.05,
    seed=3,
)


def train_step(folder: Path) -> dict[str, Any]:
    """One job over FOLDER/shard.npz from FOLDER/start.npz; its losses, what it trained in
    FOLDER/trained.npz, and what this device is."""
    import numpy as np
    import torch

    from edge_sdk.data.loading import load_shard
    from edge_sdk.training.trainer import train

    torch.set_num_threads(1)
    with np.load(folder / "start.npz") as start:
        tensors = {name: torch.from_numpy(start[name]) for name in start.files}
    result = train(SPEC, PLAN, tensors, load_shard(str(folder / "shard.npz")))
    trained = {name: tensor.numpy() for name, tensor in result.tensors.items()}
    np.savez(folder / "trained.npz", **trained)
    return {
        "losses": [found.loss for found in result.exits],
        "num_steps": result.num_steps,
        "torch": torch.__version__,
        "machine": measure(compute=False).machine,
    }


def train_and_calibrate(folder: Path) -> dict[str, Any]:
    """The same, then the calibration that an agent of one thread finds where it keeps its own. Two
    of the five models: the others take a minute of an emulated core."""
    from edge_sdk.agent.setup import memory_calibration_file
    from edge_sdk.training import calibration

    found = train_step(folder)
    calibration.PROBES = calibration.PROBES[:2]
    made = calibration.memory_calibration(Path(memory_calibration_file()), "cpu", may_measure=True)
    return found | {"allowance": made.allowance, "scratch_bytes": made.scratch_bytes}


def link(folder: Path, endpoint: str) -> dict[str, Any]:
    """Say hello, send every part back as it comes, end when accepted; how many parts came."""
    connection = Link(endpoint, *read_all_keys(folder, None))
    assert connection.socket is not None
    connection.socket.poll(60_000, 2)  # POLLOUT: connected and encrypted
    hello = Hello(
        protocol=PROTOCOL,
        client_id="a",
        session="first",
        profile=measure(compute=False),
        num_examples=1,
        input_shape=(1, 8, 8),
        num_classes=2,
    )
    assert connection.send(hello), "not connected"
    num_parts = 0
    while connection.socket.poll(60_000):
        received = connection.receive()
        assert received is not None
        message, payload = received
        if isinstance(message, Accepted):
            return {"num_parts": num_parts}
        assert isinstance(message, Part)
        num_parts += 1
        assert connection.send(message, payload)
    raise AssertionError("the coordinator said nothing for 60 s")


if __name__ == "__main__":
    programs = {"train": train_and_calibrate, "link": link}
    print(json.dumps(programs[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])))
