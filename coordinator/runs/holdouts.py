"""Figures of clients' hold-outs: examples that each sets aside and never trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edge_sdk.protocol.messages import Holdout

QUANTILES = (0.1, 0.5, 0.9)  # of the clients


def pooled(name: str, results: Sequence[Holdout], most: float = math.inf) -> dict[str, float]:
    """`NAME_accuracy` and `NAME_loss` (nats) over all examples, of which a client counts with at
    most `most`; `NAME_accuracy_q10`, `_q50` and `_q90`: between the accuracies of single clients,
    each counting alike; `NAME_examples`, that counted; `NAME_clients`. Nothing of nobody."""
    if not results:
        return {}
    examples = np.array([result.num_examples for result in results], dtype=np.float64)
    correct = np.array([result.num_correct for result in results], dtype=np.float64)
    losses = np.array([result.loss for result in results])
    weights = np.minimum(examples, most)
    values = {
        "accuracy": (weights * correct / examples).sum() / weights.sum(),
        "loss": (losses * weights).sum() / weights.sum(),
        "examples": weights.sum(),
        "clients": len(results),
    }
    for share, value in zip(QUANTILES, np.quantile(correct / examples, QUANTILES), strict=True):
        values[f"accuracy_q{100 * share:.0f}"] = value
    return {f"{name}_{figure}": float(value) for figure, value in values.items()}
