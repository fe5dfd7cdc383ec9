"""`edge-coordinator emulate`: the rounds of a real run over clients in this process.

For experiments: shards, groups, sampling and initial weights are functions of the seed alone, so
methods compared under one seed see the same of everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from coordinator.cohort import InProcessCohort
from coordinator.cohort_processes import ProcessCohort
from coordinator.config import RunConfig
from coordinator.sampling import job_seed
from coordinator.store import Store
from edge_sdk.capacity import peak_bytes
from edge_sdk.data import Examples
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.models.costs import segment_costs
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


class Population(msgspec.Struct, frozen=True, kw_only=True):
    """Emulated clients. groups: how many stop at exit 1, 2, ...; alpha: label skew of the split
    "dirichlet"; holders: share of the weak clients of each group that can hold a deeper stage."""

    clients: int
    groups: tuple[int, ...]
    split: str
    alpha: float
    holders: float = 1.0

    def text(self) -> str:
        """For the run's settings: a resumed run must have the same."""
        return msgspec.json.encode(self).decode()


@contextmanager
def emulated_cohort(
    population: Population,
    config: RunConfig,
    train: Examples,
    *,
    device: torch.device,
    processes: int = 1,
    imports: Sequence[str] = (),
) -> Iterator[InProcessCohort | ProcessCohort]:
    """The population as a cohort; everything about it is a function of the run's seed."""
    exits = group_exits(population.groups, population.clients, config.model.exit)
    parts = split_shards(
        train, population.clients, split=population.split, alpha=population.alpha, seed=config.seed
    )
    names = [f"client-{number:03d}" for number in range(1, population.clients + 1)]
    shards, exit_of = dict(zip(names, parts, strict=True)), dict(zip(names, exits, strict=True))
    holders = choose_holders(exit_of, population.holders, config.seed)
    num_exits = config.model.exit
    if processes == 1:
        yield InProcessCohort(shards, exit_of, num_exits, device, holders)
        return
    if device.type != "cpu":
        raise ConfigError(f"--processes {processes} is for the CPU; leave it out with {device}")
    with ProcessCohort(
        shards, exit_of, num_exits, processes,
        holders=holders, imports=imports, threads=torch.get_num_threads(),
    ) as cohort:  # fmt: skip
        yield cohort


def choose_holders(exits: Mapping[str, int], share: float, seed: int) -> set[str]:
    """`share` of each group, rounded, by draws of (seed, client)."""
    if not 0 <= share <= 1:
        raise ConfigError(f"--holders {share}, expected a share from 0 to 1")
    chosen: set[str] = set()
    for exit in set(exits.values()):
        group = sorted((n for n in exits if exits[n] == exit), key=lambda n: job_seed(seed, 0, n))
        chosen |= set(group[: round(share * len(group))])
    return chosen


def check_writable(path: Path) -> None:
    """Raise ConfigError now rather than after a long run."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(path.name + ".new").touch()
        path.with_name(path.name + ".new").unlink()
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error}") from error


def write_json(store: Store, population: Population, path: Path, extra: Mapping[str, Any]) -> None:
    """The run as one JSON file, from the database, replaced as a whole. extra: more of its keys."""
    config: RunConfig = store.config
    costs = client_costs(store)
    content = {
        "config": msgspec.to_builtins(config) | msgspec.to_builtins(population),
        "machine": {"torch": torch.__version__, "numpy": np.__version__, "cpus": os.cpu_count()},
        "rounds": [entry | costs.get(int(str(entry["round"])), {}) for entry in store.history()],
        **extra,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(json.dumps(content, indent=1))
    os.replace(draft, path)


def client_costs(store: Store) -> dict[int, dict[str, int]]:
    """By round: `stages_trained`, the sum over participants of examples x stages x epochs, and
    `peak_memory_bytes`, the largest that capacity.py predicts for a client of the shallowest exit,
    its runtime and data left out (one process emulates all: what it takes says nothing)."""
    config, trained = store.config, store.trained()
    if not trained:
        return {}
    shallowest = min(exit for _, exit, _, _ in trained)
    examples = max(2, sum(row[3] for row in trained) // len(trained))
    found = segment_costs(config.model, config.plan(config.rounds), examples, 0)
    peaks = {f"{cost.first}-{cost.last}": peak_bytes(cost) for cost in found}
    costs: dict[int, dict[str, int]] = {}
    for round, exit, segments, num_examples in trained:
        entry = costs.setdefault(round, {"stages_trained": 0, "peak_memory_bytes": 0})
        for segment in segments.split(","):
            first, last = map(int, segment.split("-"))
            work = num_examples * (last - first + 1) * config.epochs
            entry["stages_trained"] += work
            if exit == shallowest:
                entry["peak_memory_bytes"] = max(entry["peak_memory_bytes"], peaks[segment])
    return costs
