"""A model of torchvision, cut at equal operations: trained by emulated clients, exported, asked.

    python examples/torchvision_model.py runs/mobilenet

On the command line: edge-coordinator emulate --model torchvision:mobilenet_v3_small --data digits
"""

import sys
from pathlib import Path

from coordinator.cohorts.population import Population
from coordinator.methods.registry import make_config
from coordinator.runs.emulating import EmulateSettings, emulate
from edge_sdk.data.loading import load_shard
from edge_sdk.infer import EarlyExit
from edge_sdk.models import ModelSpec


def main(folder: str, rounds: int = 5, examples: int = 1000) -> None:
    """Three clients, one of each exit. The spec is all that both sides need: weights are random."""
    options = {"model": "mobilenet_v3_small", "cuts": "auto:3"}
    shape = {"input_shape": (1, 8, 8), "num_classes": 10}
    spec = ModelSpec(family="torchvision", exit=3, options=options, **shape)
    few = {"examples": examples, "test_examples": examples // 5}
    config = make_config("fedavg-s", spec, data="digits", rounds=rounds, epochs=1, **few)
    population = Population(clients=3, groups=(1, 1, 1), split="iid", alpha=0.5)
    run = Path(folder)
    emulate(config, population, EmulateSettings(folder=run, export=run / "exported"))
    found = EarlyExit.load(run / "exported").predict(load_shard("digits").x[:5])
    print("labels", *found.label, "at exits", *found.exit)


if __name__ == "__main__":
    main(sys.argv[1])
