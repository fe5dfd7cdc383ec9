"""How many inputs the small fuzzing of the tests makes, and how it spoils them."""

from __future__ import annotations

import random

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FEW = settings(
    max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
MORE = settings(FEW, max_examples=120)
numbers = st.integers(0, 2**32).map(random.Random)


def mutate_bytes(data: bytes, max_size: int, rng: random.Random | None = None) -> bytes:
    """What libFuzzer does, in small: change, drop, repeat or append a few bytes."""
    rng = rng or random.Random(len(data))
    spoilt = bytearray(data or b"\0")
    place = rng.randrange(len(spoilt))
    match rng.randrange(4):
        case 0:
            spoilt[place] = rng.randrange(256)
        case 1:
            del spoilt[place:]
        case 2:
            spoilt[place:place] = spoilt[place : place + rng.randrange(8)]
        case _:
            spoilt += rng.randbytes(rng.randrange(1, 5))
    return bytes(spoilt[:max_size])
