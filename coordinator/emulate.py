"""`edge-coordinator emulate`: the rounds of a real run over clients in this process.

For experiments: shards, groups, sampling and initial weights are functions of the seed alone, so
methods compared under one seed see the same of everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import torch

from coordinator.cohort import InProcessCohort
from coordinator.config import RunConfig
from coordinator.methods import Method
from coordinator.rounds import RoundReport, run_rounds
from coordinator.store import Store
from edge_sdk.data import DataSet, Examples
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.partition import partition_by_subject, partition_dirichlet, partition_iid

SPLITS = ("dirichlet", "iid", "subject")


def split_shards(
    train: Examples, num_clients: int, *, split: str, alpha: float, seed: int
) -> list[Examples]:
    """One shard per client. split: one of SPLITS; alpha is for "dirichlet"."""
    if split == "iid":
        parts = partition_iid(len(train), num_clients, seed)
    elif split == "dirichlet":
        parts = partition_dirichlet(train.y, num_clients, alpha, seed)
    elif split == "subject":
        if train.subject is None:
            raise DataError("this data has no subjects; use --split dirichlet or iid")
        parts = partition_by_subject(train.subject, num_clients, seed)
    else:
        raise ConfigError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    return [train.take(part) for part in parts]


def group_exits(groups: Sequence[int], num_clients: int, num_exits: int) -> list[int]:
    """Exit of each client: the first groups[0] clients stop at exit 1, and so on."""
    if sum(groups) != num_clients or len(groups) > num_exits or min(groups) < 0:
        raise ConfigError(
            f"groups {','.join(map(str, groups))} need to sum to {num_clients} clients over at "
            f"most {num_exits} exits"
        )
    return [exit for exit, count in enumerate(groups, 1) for _ in range(count)]


def emulate(
    store: Store,
    method: Method,
    data: DataSet,
    shards: Sequence[Examples],
    exits: Sequence[int],
    *,
    device: torch.device,
    should_stop: Callable[[], bool],
    report: Callable[[RoundReport], None],
) -> None:
    """Run what is left of the store's run."""
    config = store.config
    names = [f"client-{number:03d}" for number in range(1, len(shards) + 1)]
    cohort = InProcessCohort(
        dict(zip(names, shards, strict=True)),
        dict(zip(names, exits, strict=True)),
        config.model.exit,
        device,
    )
    run_rounds(
        store, method, cohort, data.test, device=device, should_stop=should_stop, report=report
    )


def check_writable(path: Path) -> None:
    """Raise ConfigError now rather than after a long run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".new").touch()
        path.with_name(path.name + ".new").unlink()
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error}") from error


def write_json(store: Store, setting: dict[str, object], path: Path) -> None:
    """The run as one JSON file, from the database, replaced as a whole."""
    config: RunConfig = store.config
    content = {
        "config": msgspec.to_builtins(config) | setting,
        "machine": {"torch": torch.__version__, "numpy": np.__version__, "cpus": os.cpu_count()},
        "rounds": store.history(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(content, indent=1))
    os.replace(draft, path)
