"""Labels that are the next tokens, and models that see them."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from edge_sdk.data.examples import Examples
from edge_sdk.errors import DataError
from edge_sdk.models.causal import check_sight, has_next_tokens
from edge_sdk.protocol.messages import ModelSpec

LLAMA = ModelSpec(
    family="llama",
    input_shape=(6,),
    num_classes=9,
    exit=2,
    task="tokens",
    vocabulary=9,
    options={"dim": 8, "heads": 2},
)


def texts(*, are_next: bool) -> Examples:
    x = np.random.default_rng(0).integers(9, size=(4, 6))
    y = np.roll(x, -1 if are_next else -2, axis=1)
    y[:, -1] = -100
    return Examples(x, y, 9, task="tokens", vocabulary=9)


def test_next_tokens_are_known_by_their_values():
    assert has_next_tokens(texts(are_next=True))
    assert not has_next_tokens(texts(are_next=False))
    nothing_counts = texts(are_next=True)
    nothing_counts.y[:] = -100
    assert not has_next_tokens(nothing_counts)


def test_a_model_that_sees_its_answers_is_refused():
    """With it a transformer tells random words without fail: it copies them."""
    both = replace(LLAMA, family="transformer")
    with pytest.raises(DataError, match="family 'transformer' answers a token by those after it"):
        check_sight(both, texts(are_next=True))
    check_sight(both, texts(are_next=False))  # labels of tokens, such as parts of speech
    check_sight(LLAMA, texts(are_next=True))
