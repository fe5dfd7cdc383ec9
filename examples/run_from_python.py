"""A run from Python: emulated clients in this process, the same rounds as over a network.

    python examples/run_from_python.py runs/from-python
"""

import sys
from pathlib import Path

from coordinator.cohort import InProcessCohort
from coordinator.config import RotationOptions, RunConfig, checked
from coordinator.emulate import split_shards
from coordinator.methods import make_method
from coordinator.rounds import RoundReport, run_rounds
from coordinator.store import Store
from edge_sdk.data import load_dataset
from edge_sdk.wire import ModelSpec


def show(done: RoundReport) -> None:
    shares = " / ".join(f"{share:.2f}" for share in done.accuracy_served)
    print(f"round {done.round}: {done.totals.returned} updates, accuracy per exit {shares}")


def main(folder: str, rounds: int = 5) -> None:
    data = load_dataset("digits", seed=0)
    spec = ModelSpec(family="cnn", input_shape=data.train.input_shape, num_classes=10, exit=3)
    rotation = RotationOptions(mode="add", stages=0)
    config = checked(
        RunConfig(method="stage-rotation", model=spec, rounds=rounds, rotation=rotation)
    )
    shards = split_shards(data.train, 6, split="dirichlet", alpha=0.5, seed=0)
    names = [f"client-{number}" for number in range(1, 7)]
    exits = dict(zip(names, (1, 1, 2, 2, 3, 3), strict=True))  # the deepest that each can train
    cohort = InProcessCohort(dict(zip(names, shards, strict=True)), exits, spec.exit)
    method, store = make_method(config), Store.create(Path(folder), config, "emulate")
    run_rounds(store, method, cohort, data.test, report=show)
    print("model:", store.write_model(spec, method.served()))
    store.close()


if __name__ == "__main__":
    main(*sys.argv[1:2])
