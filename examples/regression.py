"""Numbers instead of classes: federated training of a regression, exported and asked.

    python examples/regression.py runs/regression

The data are scikit-learn's own: 442 patients, 10 measurements of each, and how a disease went on.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_diabetes

from coordinator.cohorts.population import Population
from coordinator.methods.registry import make_config
from coordinator.runs.emulating import EmulateSettings, emulate
from edge_sdk.infer import EarlyExit
from edge_sdk.models import ModelSpec


def main(folder: str, rounds: int = 20) -> None:
    """The task stands in the data; `--data FILE.npz --split iid` does the same."""
    data, run = load_diabetes(), Path(folder)
    x, y = data.data * 20, (data.target - 150) / 75  # both about -1 to 1, by constants
    run.mkdir(parents=True)
    np.savez(run / "data.npz", x=x, y=y, task="regress")
    spec = ModelSpec(family="mlp", input_shape=(10,), num_classes=1, exit=2, task="regress")
    config = make_config("hypemefed", spec, data=str(run / "data.npz"), rounds=rounds)
    population = Population(clients=6, groups=(3, 3), split="iid", alpha=1.0)
    emulate(config, population, EmulateSettings(folder=run / "run", export=run / "model"))
    model = EarlyExit.load(run / "model", threshold=0.8)  # stops where two exits agree
    found = model.predict(x[:100].astype(np.float32))
    apart = 75 * np.sqrt(np.mean((found.label[:, 0] - y[:100]) ** 2))
    print(f"RMSE {apart:.0f} of values from 25 to 346; exit {found.exit.mean():.2f} on average")


if __name__ == "__main__":
    main(sys.argv[1])
