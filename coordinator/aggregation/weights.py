"""How much one client may count. Its examples are what it says they are: 2^31 of them would be the
whole mean. So it counts for at most MEDIANS times the median of those who were asked, at most OTHER
times the largest of the others, and at most all others together, each bounded so.

Of three or more clients that all return none has more than half, whatever it says, among n equal
ones 3 / (n + 2); k of n equal ones that lie together have at most 10 k / (9 k + n), while they are
fewer than half. Of one or two nothing is bounded: there an honest skew of 10 to 1 looks the same.
Fashion-MNIST, 50 clients, 10 a round, 500 rounds: at Dirichlet 0.5 nobody is bounded, at 0.1 one
client in 20 rounds."""

from __future__ import annotations

import math
from collections.abc import Collection

from coordinator.aggregation.robust import lower_median

MEDIANS, OTHER = 10, 3
FEW = 3  # clients from which there is something to compare with


def most_examples(asked: Collection[int]) -> float:
    """How many examples one of the clients that were asked may count with. asked: the examples of
    each, as it said. Infinite where fewer than FEW were."""
    if len(asked) < FEW:
        return math.inf
    bound = MEDIANS * lower_median(list(asked))
    others = sorted(min(number, bound) for number in asked)[:-1]
    return min(bound, OTHER * others[-1], sum(others))
