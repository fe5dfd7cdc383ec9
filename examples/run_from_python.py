"""A run from Python: emulated clients in this process, the same rounds as over a network.

    python examples/run_from_python.py runs/from-python

Here a method has no defaults of its own: what --method sets elsewhere, a RunConfig names.
"""

import sys
from contextlib import closing
from pathlib import Path

from coordinator.cohorts.in_process import InProcessCohort
from coordinator.cohorts.population import split_shards
from coordinator.config import RotationOptions, RunConfig
from coordinator.methods.registry import make_method
from coordinator.runs.rounds import print_round, run_rounds
from coordinator.store.store import Store
from edge_sdk.data import load_dataset
from edge_sdk.models import ModelSpec

EXITS = {"a": 1, "b": 1, "c": 2, "d": 2, "e": 3, "f": 3}  # by client: the deepest it can train


def main(folder: str, rounds: int = 5) -> None:
    data = load_dataset("digits", seed=0)
    spec = ModelSpec(family="cnn", input_shape=data.train.input_shape, num_classes=10, exit=3)
    rotation = RotationOptions(mode="add", stages=0)
    config = RunConfig(method="stage-rotation", model=spec, rounds=rounds, rotation=rotation)
    shards = split_shards(data.train, len(EXITS), split="dirichlet", alpha=0.5, seed=0)
    cohort = InProcessCohort(dict(zip(EXITS, shards, strict=True)), EXITS, spec.exit)
    method = make_method(config)
    with closing(Store.create(Path(folder), config, "emulate")) as store:
        run_rounds(store, method, cohort, data.test, report=print_round)
        print("model:", store.write_model(spec, method.served()))


if __name__ == "__main__":
    main(sys.argv[1])
