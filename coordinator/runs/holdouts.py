"""Figures of clients' hold-outs: examples that each sets aside and never trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from edge_sdk.protocol.messages import Holdout
from edge_sdk.tasks.metrics import Metric

QUANTILES = (0.1, 0.5, 0.9)  # of the clients


def pooled(
    name: str, results: Sequence[Holdout], metric: Metric, most: float = math.inf
) -> dict[str, float]:
    """`NAME_accuracy`, or what else the metric's key is, and `NAME_loss` over all examples, of
    which a client counts with at most `most`; `NAME_accuracy_q10`, `_q50` and `_q90`: between those
    of single clients, each counting alike; `NAME_examples`, that counted; `NAME_clients`. Nothing
    of nobody."""
    if not results:
        return {}
    examples = np.array([result.num_examples for result in results], dtype=np.float64)
    figures = np.array([result.metric for result in results])
    means = np.array([metric.to_mean(result.metric) for result in results])
    losses = np.array([result.loss for result in results])
    weights = np.minimum(examples, most)
    values = {
        metric.key: metric.of_mean((weights * means).sum() / weights.sum()),
        "loss": (losses * weights).sum() / weights.sum(),
        "examples": weights.sum(),
        "clients": len(results),
    }
    for share, value in zip(QUANTILES, np.quantile(figures, QUANTILES), strict=True):
        values[f"{metric.key}_q{100 * share:.0f}"] = value
    return {f"{name}_{figure}": float(value) for figure, value in values.items()}
