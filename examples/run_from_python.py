"""A run from Python: emulated clients in this process, the same rounds as over a network.

    python examples/run_from_python.py runs/from-python

make_config gives a run the defaults that --method gives it on the command line.
"""

import sys
from pathlib import Path

from coordinator.cohorts.population import Population
from coordinator.methods.registry import make_config
from coordinator.runs.emulating import EmulateSettings, emulate
from edge_sdk.models import ModelSpec


def main(folder: str, rounds: int = 5) -> None:
    """Six clients, two of each exit; the data gives the model its shape and number of classes."""
    spec = ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=10, exit=3)
    config = make_config("hypemefed", spec, data="digits", rounds=rounds)
    population = Population(clients=6, groups=(2, 2, 2), split="dirichlet", alpha=0.5)
    emulate(config, population, EmulateSettings(folder=Path(folder)))
    print("model:", Path(folder) / "model.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
