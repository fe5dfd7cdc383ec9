"""The clients of `edge-coordinator emulate`: who they are, and what data each has.

For experiments: shards, groups, sampling and initial weights are functions of the seed alone, so
methods compared under one seed see the same of everything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec
import torch

from coordinator.cohorts.sampling import job_seed
from coordinator.config import SPLITS, RunConfig
from edge_sdk.data.loading import Examples
from edge_sdk.data.partition import (
    check_alpha,
    partition_by_subject,
    partition_dirichlet,
    partition_iid,
)
from edge_sdk.errors import ConfigError, DataError, UsageError


def split_shards(
    train: Examples, num_clients: int, *, split: str, alpha: float, seed: int
) -> list[Examples]:
    """One shard per client. split: one of SPLITS; alpha is for "dirichlet"."""
    if split == "iid":
        parts = partition_iid(len(train), num_clients, seed)
    elif split == "dirichlet":
        parts = partition_dirichlet(train.strata, num_clients, alpha, seed)
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
            f"--groups {_words(groups)} need to sum to {num_clients} clients over at most "
            f"{num_exits} exits; give such as {_words(even_groups(num_clients, num_exits))}"
        )
    return [exit for exit, count in enumerate(groups, 1) for _ in range(count)]


def even_groups(num_clients: int, num_exits: int) -> tuple[int, ...]:
    """As many clients at each exit; what is left over goes to the shallow ones."""
    each, over = divmod(num_clients, num_exits)
    return tuple(each + (exit < over) for exit in range(num_exits))


def _words(groups: Sequence[int]) -> str:
    return ",".join(map(str, groups))


def exits_of(population: Population, num_exits: int) -> dict[str, int]:
    """The exit that tells the group of each client, by its name."""
    exits = group_exits(population.groups, population.clients, num_exits)
    return {f"client-{number:03d}": exit for number, exit in enumerate(exits, 1)}


class Population(msgspec.Struct, frozen=True, kw_only=True):
    """Emulated clients. groups: how many stop at exit 1, 2, ...; alpha: label skew of the split
    "dirichlet"; holders: share of the weak clients of each group that can hold a deeper stage.
    variants: of each group, among those that the method offers; (): the largest that its memory
    holds."""

    clients: int
    groups: tuple[int, ...]
    split: str
    alpha: float
    holders: float = 1.0
    variants: tuple[int, ...] = ()

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


def check_split(population: Population, train: Examples) -> None:
    """Raise UsageError for shares of classes of data that have none."""
    if population.split == "dirichlet" and train.task != "classify":
        raise UsageError(
            f"--split dirichlet shares out classes, these data are for {train.task}; give "
            "--split iid" + " or subject" * (train.subject is not None)
        )


@dataclass(frozen=True)
class EmulatedClient:
    id: str
    exit: int
    shard: Examples


def emulated_clients(
    population: Population, config: RunConfig, train: Examples
) -> list[EmulatedClient]:
    """Everything about them is a function of the run's seed."""
    exits = exits_of(population, config.num_groups)
    parts = split_shards(
        train, population.clients, split=population.split, alpha=population.alpha, seed=config.seed
    )
    return [
        EmulatedClient(name, exit, part)
        for (name, exit), part in zip(exits.items(), parts, strict=True)
    ]


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
