"""What a method and a generator are run with unless told otherwise, as flags of the command line.

hypemefed without `--paper` is what measured best, see docs/methods.md and docs/results/."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# 100 rounds of Fashion-MNIST, docs/results/main.csv; tuned on seeds 0 and 1 at alpha 0.5
MOMENTUM: dict[str, Any] = {"server_momentum": 0.5, "server_lr": 0.75}
# every method; none of the flags' own defaults
METHODS: Mapping[str, Mapping[str, Any]] = {
    "hypemefed": {
        "rotation": "add",
        "rotation_stages": 0,
        "generator": "update-regression",
        "distill": "auto",
        **MOMENTUM,
    },
    "owners-mean": {},
    "stage-rotation": {"rotation": "add", "rotation_stages": 0},
    "stale-copy": {},
    "fedavg-s": {},
    "fedavg-l": {},
}
# HypeMeFed (2024), section 5: absolute weights, rank 100, a plain mean, the last model
PAPER: Mapping[str, Any] = {
    "generator": "svd-mlp",
    "weighting": "equal",  # as in its code
    "rank": 100,
    "rotation": "off",
    "serve": "last",
    "server_momentum": 0.0,
    "server_lr": 1.0,
}
# main weights only as in the paper; update-regression measured best correcting everything
GENERATE: Mapping[str, str] = {"update-regression": "all"}
RANK: Mapping[str, int] = {"update-regression": 12}

# their step is about lr per weight, whatever the aggregate's; 1 ruins a model in a round
ADAPTIVE: Mapping[str, Any] = {"server_momentum": 0.9, "server_lr": 0.01}


def defaults_of(method: str, is_paper: bool, optimizer: str) -> Mapping[str, Any]:
    found = PAPER if is_paper else METHODS[method]
    return found if optimizer == "fedavgm" else {**found, **ADAPTIVE}
