"""Run an exported model without torch, stopping at the first exit that is sure enough.

edge-coordinator export --run runs/first --out model
edge-sdk calibrate model --data held-out.npz --accuracy-loss 0.01
python examples/early_exit.py model my-data.npz
"""

import sys

import numpy as np

from edge_sdk.data import load_test
from edge_sdk.infer import EarlyExit


def main(folder: str, source: str) -> None:
    model = EarlyExit.load(folder)  # thresholds as calibrated; or threshold=0.8, measure="entropy"
    examples = load_test(source)  # x scaled as in training
    found = model.predict(examples.x)  # found.label, found.exit, found.confidence: one per example
    print(f"accuracy {np.mean(found.label == examples.y):.3f} on {len(examples)} examples")
    for exit in range(1, len(model.sessions) + 1):
        print(f"stopped at exit {exit}: {np.mean(found.exit == exit):.0%}")


if __name__ == "__main__":
    main(*sys.argv[1:])
