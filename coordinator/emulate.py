"""`edge-coordinator emulate`: the rounds of a real run over clients in this process.

For experiments: shards, groups, sampling and initial weights are functions of the seed alone, so
methods compared under one seed see the same of everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from msgspec.structs import replace

from coordinator.cohort import InProcessCohort
from coordinator.cohort_processes import ProcessCohort
from coordinator.config import SPLITS, RunConfig
from coordinator.evaluate import Personalised, personalised_accuracy, split_holdout
from coordinator.sampling import job_seed
from coordinator.store import Store
from edge_sdk.capacity import in_model, peak_bytes
from edge_sdk.data import Examples
from edge_sdk.errors import ConfigError, DataError, StoreError
from edge_sdk.examples import MIN_BATCH
from edge_sdk.models.costs import segment_costs
from edge_sdk.partition import check_alpha, partition_by_subject, partition_dirichlet, partition_iid
from edge_sdk.tensors import Tensors
from edge_sdk.wire import ModelSpec


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
    "dirichlet"; holders: share of the weak clients of each group that can hold a deeper stage;
    holdout: share of each client's examples that it keeps from training."""

    clients: int
    groups: tuple[int, ...]
    split: str
    alpha: float
    holders: float = 1.0
    holdout: float = 0.0

    def text(self) -> str:
        """For the run's settings: a resumed run must have the same."""
        return msgspec.json.encode(self).decode()


def check_population(population: Population, num_exits: int) -> None:
    """Raise ConfigError for one that no data can be shared out to, before any is read."""
    if population.clients < 1:
        raise ConfigError(f"--clients is {population.clients}, expected at least 1")
    group_exits(population.groups, population.clients, num_exits)
    check_holders(population.holders)
    if population.split == "dirichlet":
        check_alpha(population.alpha)


@dataclass(frozen=True)
class EmulatedClient:
    id: str
    exit: int
    shard: Examples
    holdout: Examples | None


def emulated_clients(
    population: Population, config: RunConfig, train: Examples
) -> list[EmulatedClient]:
    """Everything about them is a function of the run's seed. A client of a single example has no
    hold-out."""
    exits = group_exits(population.groups, population.clients, config.model.exit)
    parts = split_shards(
        train, population.clients, split=population.split, alpha=population.alpha, seed=config.seed
    )
    clients = []
    for number, (exit, part) in enumerate(zip(exits, parts, strict=True), 1):
        name, held = f"client-{number:03d}", None
        if population.holdout and len(part) > 1:
            part, held = split_holdout(part, population.holdout, job_seed(config.seed, 0, name))
        clients.append(EmulatedClient(name, exit, part, held))
    return clients


@contextmanager
def emulated_cohort(
    population: Population,
    config: RunConfig,
    clients: Sequence[EmulatedClient],
    *,
    device: torch.device,
    processes: int = 1,
    imports: Sequence[str] = (),
) -> Iterator[InProcessCohort | ProcessCohort]:
    """The clients as a cohort, trained here or in `processes`."""
    shards = {client.id: client.shard for client in clients}
    exits = {client.id: client.exit for client in clients}
    holders = choose_holders(exits, population.holders, config.seed)
    num_exits = config.model.exit
    if processes == 1:
        yield InProcessCohort(shards, exits, num_exits, device, holders)
        return
    check_processes(processes, device)
    with ProcessCohort(
        shards, exits, num_exits, processes,
        holders=holders, imports=imports, threads=torch.get_num_threads(),
    ) as cohort:  # fmt: skip
        yield cohort


def personalise(
    config: RunConfig,
    spec: ModelSpec,
    served: Tensors,
    clients: Sequence[EmulatedClient],
    epochs: int,
    device: torch.device,
) -> dict[str, Any]:
    """Accuracy on the clients' hold-outs, of the served model's part that each can run, before and
    after `epochs` of fine-tuning (HypeMeFed, section 5.3.2): means over all clients and over those
    of each exit."""
    able = [c for c in clients if c.holdout is not None and len(c.shard) >= MIN_BATCH]
    found = personalised_accuracy(
        spec,
        served,
        [client.shard for client in able],
        [client.holdout for client in able if client.holdout is not None],
        replace(config.plan(config.rounds), seed=config.seed),
        epochs,
        exits=[min(client.exit, spec.exit) for client in able],
        device=device,
    )
    groups: dict[str, list[Personalised]] = {"all": found}
    for client, result in zip(able, found, strict=True):
        groups.setdefault(f"exit {client.exit}", []).append(result)
    return {
        "epochs": epochs,
        "groups": {
            name: {
                "clients": len(results),
                "before": sum(result.before for result in results) / len(results),
                "after": sum(result.after for result in results) / len(results),
            }
            for name, results in groups.items()
            if results
        },
    }


def choose_holders(exits: Mapping[str, int], share: float, seed: int) -> set[str]:
    """`share` of each group, rounded, by draws of (seed, client)."""
    check_holders(share)
    chosen: set[str] = set()
    for exit in set(exits.values()):
        group = sorted((n for n in exits if exits[n] == exit), key=lambda n: job_seed(seed, 0, n))
        chosen |= set(group[: round(share * len(group))])
    return chosen


def check_holders(share: float) -> None:
    """Raises ConfigError."""
    if not 0 <= share <= 1:
        raise ConfigError(f"--holders {share}, expected a share from 0 to 1")


def check_processes(processes: int, device: torch.device) -> None:
    """Raises ConfigError."""
    if processes > 1 and device.type != "cpu":
        raise ConfigError(f"--processes {processes} is for the CPU; leave it out with {device}")


def check_writable(path: Path) -> None:
    """Raise ConfigError now rather than after a long run; leaves nothing but the folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise ConfigError(f"--out {path} is no file; give the name of one, e.g. rounds.json")
        draft = _draft(path)
        draft.touch(exist_ok=False)
        draft.unlink()
    except OSError as error:
        raise ConfigError(f"--out {path} cannot be written: {error}; give another") from error


def _draft(path: Path) -> Path:
    """A name beside `path` that nobody has."""
    return path.with_name(f".{os.urandom(8).hex()}.new")


def write_json(store: Store, population: Population, path: Path, extra: Mapping[str, Any]) -> None:
    """The run as one JSON file, from the database, replaced as a whole. extra: more of its keys.
    Raises StoreError."""
    config: RunConfig = store.config
    costs = client_costs(store)
    content = {
        "config": msgspec.to_builtins(config) | msgspec.to_builtins(population),
        "machine": {"torch": torch.__version__, "numpy": np.__version__, "cpus": os.cpu_count()},
        "rounds": [entry | costs.get(int(str(entry["round"])), {}) for entry in store.history()],
        **extra,
    }
    draft = _draft(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(content, indent=1))
        os.replace(draft, path)
    except OSError as error:
        with suppress(OSError):
            draft.unlink()
        raise StoreError(f"{path} cannot be written: {error}; {store.way_on()}") from error


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
    cost_of = {f"{cost.first}-{cost.last}": cost for cost in found}
    costs: dict[int, dict[str, int]] = {}
    for round, exit, segments, num_examples in trained:
        entry = costs.setdefault(round, {"stages_trained": 0, "peak_memory_bytes": 0})
        deepest = max(map(cost_of.__getitem__, segments.split(",")), key=lambda cost: cost.last)
        for segment in segments.split(","):
            first, last = map(int, segment.split("-"))
            work = num_examples * (last - first + 1) * config.epochs
            entry["stages_trained"] += work
            if exit == shallowest:
                peak = peak_bytes(in_model(cost_of[segment], deepest))
                entry["peak_memory_bytes"] = max(entry["peak_memory_bytes"], peak)
    return costs
