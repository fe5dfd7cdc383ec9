"""Dividing examples: stratified parts, and shards for clients, all drawn from a seed.

Each purpose has a random stream of its own, so that one draw never depends on another."""

from __future__ import annotations

import math

import numpy as np

from edge_sdk.data.examples import MIN_BATCH, Examples, Ints, bad
from edge_sdk.errors import ConfigError, UsageError

DIRICHLET_DRAWS = 100
MAX_ALPHA = 1e12  # shares are equal to 1e-6 there; numpy's gamma draws overflow near 1e308
SUBSET_FLAGS = {"train subset": "--examples", "test subset": "--test-examples"}
_PURPOSES = ("split", "train subset", "test subset", "iid", "dirichlet", "subject")


def stratified_split(y: Ints, fraction: float, seed: int) -> tuple[Ints, Ints]:
    """Sorted train and test indices; test is `fraction` of every class, to one example.

    A class keeps at least one example in train. Raises DataError if test would be empty."""
    if not 0 < fraction < 1:
        raise ConfigError(f"test fraction is {fraction}, expected between 0 and 1")
    counts = np.unique(y, return_counts=True)[1]
    size = min(max(1, round(fraction * len(y))), len(y) - len(counts))
    if size < 1:
        got = f"{len(y)} examples of {len(counts)} classes"
        raise bad("train and test split", got, "two of one class at least", "add examples")
    test = _stratified(y, size, 1, _generator(seed, "split"))
    return np.setdiff1d(np.arange(len(y)), test), test


def split_holdout(examples: Examples, share: float, seed: int = 0) -> tuple[Examples, Examples]:
    """Training part and hold-out of one client's examples, copies of those at `holdout_rows`."""
    kept, held = holdout_rows(examples.strata, share, seed)
    return examples.take(kept), examples.take(held)


def holdout_rows(y: Ints, share: float, seed: int = 0) -> tuple[Ints, Ints]:
    """Sorted indices of those that one client trains on and of its hold-out, a function of its
    strata (Examples.strata) and the seed.

    The hold-out is `share` of every class, to one example, while some class has two; of examples
    that are each alone in their class, it is drawn from all, at least one. It is empty where fewer
    than MIN_BATCH would be left to train on. Raises ConfigError."""
    if not 0 < share < 1:
        raise ConfigError(f"hold-out is {share} of the examples, expected between 0 and 1")
    every = np.arange(len(y))
    if len(np.unique(y)) < len(y):
        kept, held = stratified_split(y, share, seed)
    else:
        held = np.sort(
            _generator(seed, "split").permutation(every)[: max(1, round(share * len(y)))]
        )
        kept = np.setdiff1d(every, held)
    if len(kept) < MIN_BATCH:
        kept, held = every, every[:0]
    return kept, held


def partition_iid(n: int, num_clients: int, seed: int) -> list[Ints]:
    """Sorted indices per client: 0..n - 1 shuffled and cut into parts equal to one example."""
    _check_clients(n, num_clients, 1)
    order = _generator(seed, "iid").permutation(n)
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def check_alpha(alpha: float) -> None:
    """Raises ConfigError."""
    if not (math.isfinite(alpha) and alpha > 0):
        raise ConfigError(f"Dirichlet alpha is {alpha}, expected a finite number above 0")


def partition_dirichlet(
    y: Ints, num_clients: int, alpha: float, seed: int, min_examples: int = 10
) -> list[Ints]:
    """Sorted indices per client; each class is shared out by proportions ~ Dirichlet(alpha).

    Proportions are drawn anew until every client has `min_examples`, at most DIRICHLET_DRAWS
    times: published code draws without bound, and at alpha 0.1 may never end. After that, examples
    move one by one from the largest shard of the last draw to the smallest."""
    check_alpha(alpha)
    _check_clients(len(y), num_clients, min_examples)
    rng = _generator(seed, "dirichlet")
    counts = np.unique(y, return_counts=True)[1]
    concentration = np.full(num_clients, min(alpha, MAX_ALPHA))
    for _ in range(DIRICHLET_DRAWS):
        shares = rng.dirichlet(concentration, size=len(counts))  # (classes, clients)
        cuts = np.floor(shares.cumsum(axis=1) * counts[:, None]).astype(np.int64)
        cuts[:, -1] = counts  # the sum of the shares may round to below 1
        sizes = np.diff(cuts, axis=1, prepend=0)
        if sizes.sum(axis=0).min() >= min_examples:
            break
    order = rng.permutation(len(y))
    by_class = order[np.argsort(y[order], kind="stable")]  # shuffled within each class
    owner = np.empty(len(y), dtype=np.int64)  # the client that gets each example
    owner[by_class] = np.tile(np.arange(num_clients), len(counts)).repeat(sizes.ravel())
    shards = [order[owner[order] == client].tolist() for client in range(num_clients)]
    while len(smallest := min(shards, key=len)) < min_examples:
        smallest.append(max(shards, key=len).pop())
    return [np.sort(np.array(shard, dtype=np.int64)) for shard in shards]


def partition_by_subject(subject: Ints | None, num_clients: int, seed: int) -> list[Ints]:
    """Sorted indices per client; whole subjects, as many for each client, to one subject."""
    if subject is None:
        raise ConfigError("this data set has no subjects; choose an iid or Dirichlet partition")
    subjects = np.unique(subject)
    if not 1 <= num_clients <= len(subjects):
        raise ConfigError(f"got {num_clients} clients, expected 1 to {len(subjects)}, the subjects")
    order = _generator(seed, "subject").permutation(subjects)
    return [np.flatnonzero(np.isin(subject, part)) for part in np.array_split(order, num_clients)]


def _check_clients(n: int, num_clients: int, min_examples: int) -> None:
    got = f"partition: got {num_clients} clients with at least {min_examples} examples each"
    if num_clients < 1 or min_examples < 1:
        raise ConfigError(f"{got}, expected 1 or more of both")
    if num_clients * min_examples > n:
        raise ConfigError(f"{got}, expected at most {n} in all; take fewer clients or examples")


def _generator(seed: int, purpose: str) -> np.random.Generator:
    """One stream per purpose, so that one draw does not depend on whether another was made."""
    if seed < 0:
        raise ConfigError(f"seed is {seed}, expected 0 or more")
    stream = (_PURPOSES.index(purpose),)
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _stratified(y: Ints, size: int, spared: int, rng: np.random.Generator) -> Ints:
    """Sorted indices of `size` examples, shared over the classes by largest remainders; leaves
    `spared` of each class, so `size` is at most len(y) - spared * classes."""
    labels, counts = np.unique(y, return_counts=True)
    quota = counts * (size / len(y))
    chosen = np.minimum(np.floor(quota).astype(np.int64), counts - spared)
    while chosen.sum() < size:
        chosen[np.where(chosen < counts - spared, quota - chosen, -np.inf).argmax()] += 1
    pairs = zip(labels, chosen, strict=True)
    return np.sort(np.concatenate([rng.permutation(np.flatnonzero(y == k))[:m] for k, m in pairs]))


def stratified_subset(examples: Examples, size: int | None, seed: int, purpose: str) -> Examples:
    if size is None:
        return examples
    if not 1 <= size <= len(examples):
        flag = SUBSET_FLAGS.get(purpose, purpose)
        raise UsageError(f"{flag} {size}, expected 1 to {len(examples)}, all that there are")
    return examples.take(_stratified(examples.strata, size, 0, _generator(seed, purpose)))
