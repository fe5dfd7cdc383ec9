"""The minimal device of examples/, which imports nothing of ours, in a real run, alone and beside a
device of ours. Its updates are counted in every round, and the model learns digits."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

from edge_sdk.data.loading import load_dataset
from edge_sdk.data.partition import partition_iid
from tests.support.processes import ROOT, World

EXAMPLES, ROUNDS = 600, 5


@pytest.mark.slow
@pytest.mark.parametrize("names", ["b", "ab"])
def test_a_device_of_another_make_learns(tmp_path, names):
    with World(tmp_path) as world:
        data = load_dataset("digits", 0, examples=2 * EXAMPLES, test_examples=200)
        for name, part in zip("ab", partition_iid(len(data.train), 2, 0), strict=True):
            shard = data.train.take(part)
            np.savez(tmp_path / name / "data.npz", x=shard.x, y=shard.y, num_classes=10)
        np.savez(tmp_path / "test.npz", x=data.test.x, y=data.test.y, num_classes=10)
        model = ["--model", "mlp", "--exits", "3", "--option", "widths=64,64,64"]
        plan = ["--rounds", f"{ROUNDS}", "--epochs", "5", "--batch-size", "32"]
        least = ["--method", "owners-mean", "--min-clients", f"{len(names)}"]
        coordinator = world.serve(*least, *model, *plan)
        if "a" in names:
            world.device("a")
        minimal = [world.endpoint, "b", str(tmp_path / "b" / "data.npz"), str(tmp_path / "b")]
        program = (sys.executable, str(ROOT / "examples" / "minimal_device.py"))
        foreign = world.start("b", minimal, program)
        assert coordinator.end() == 0
        assert foreign.end() == 0  # the last bye was final
        for name in names:
            assert world.outcomes(name) == dict.fromkeys(range(1, ROUNDS + 1), "ok")
        told = re.findall(r"accuracy per exit ([\d.]+) / ([\d.]+) / ([\d.]+) %", coordinator.text())
        assert len(told) == ROUNDS
        assert min(map(float, told[-1])) >= 90  # one of ten classes by chance: 10
