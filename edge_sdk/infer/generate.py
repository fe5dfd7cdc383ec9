"""Text from an exported causal model, token by token, each at the first exit that is confident.

    model = EarlyExit.load("model", threshold=0.9)
    found = generate(model, [5, 17, 3], count=20)    # found.ids, .exits, .confidences

A graph takes a text of fixed length, so each token runs its stages over the whole window, without
kept keys and values: an early exit then saves whole stages, and nothing of the deeper ones has to
be made up for the tokens after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edge_sdk.data.examples import Floats, Ints
from edge_sdk.errors import ConfigError
from edge_sdk.infer.early_exit import EarlyExit
from edge_sdk.tasks.base import check_ids, of_softmax

ALIKE = 1e-3  # of the largest logit


@dataclass(frozen=True, eq=False)
class Generated:
    """Per token: ids (n,) int64, exits (n,) int64 from 1, confidences (n,) float32 at them."""

    ids: Ints
    exits: Ints
    confidences: Floats


def generate(
    engine: EarlyExit, prompt: Sequence[int], count: int, *, end: int | None = None
) -> Generated:
    """At most `count` tokens after `prompt`, each the likeliest one at its exit (greedy). Of a text
    that is longer than the model's window, (T,), the last T tokens are seen. end: an id after which
    no more are wanted.

    Raises ConfigError for a model that tells no next token and for an empty prompt, DataError for
    ids beyond the vocabulary, and what EarlyExit.step raises."""
    spec = engine.model.spec
    if spec.task != "tokens" or spec.num_classes != spec.vocabulary:
        got = f"task {spec.task}, {spec.num_classes} outputs, a vocabulary of {spec.vocabulary}"
        step = "train it on the task tokens with each next token as label"
        raise ConfigError(f"a model of {got} tells no next token; {step}")
    if not len(prompt) or count < 1:
        got = f"{len(prompt)} tokens, and a count of {count}"
        raise ConfigError(f"a prompt of {got}, expected at least one of each")
    text = np.array(prompt)[None]  # (1, n)
    check_ids(text, spec.vocabulary, "the prompt")
    _check_causal(engine)
    exits: list[int] = []
    reached: list[float] = []
    while len(exits) < count and (not exits or text[0, -1] != end):
        token, exit, confidence = _next_token(engine, text)
        text = np.append(text, [[token]], axis=1)
        exits.append(exit)
        reached.append(confidence)
    ids = text[0, len(prompt) :]
    return Generated(ids, np.array(exits, np.int64), np.array(reached, np.float32))


def _next_token(engine: EarlyExit, text: Ints) -> tuple[int, int, float]:
    """The token after text (1, n), its exit and the confidence there."""
    length = engine.model.spec.input_shape[0]
    seen = text[:, -length:]
    place = seen.shape[1] - 1
    features: Ints | Floats = np.pad(seen, [(0, 0), (0, length - seen.shape[1])])
    for exit, threshold in enumerate((*engine.thresholds, 0.0), 1):
        features, logits = engine.step(exit, features)  # (1, T, K)
        answer = logits[:, place]
        confidence = float(of_softmax(answer, engine.measure)[0])
        if confidence >= threshold:
            break
    return int(answer.argmax()), exit, confidence


def _check_causal(engine: EarlyExit) -> None:
    """Raise ConfigError where what stands after a token changes its answer."""
    spec = engine.model.spec
    one, other = np.zeros((2, 1, *spec.input_shape), np.int64)
    other[:, -1] = spec.vocabulary - 1
    before, after = (engine.all_exits(text)[:, 0, :-1] for text in (one, other))
    if np.abs(after - before).max(initial=0) > ALIKE * np.abs(before).max(initial=ALIKE):
        raise ConfigError(
            f"family {spec.family!r} answers a token by those after it, too, which a text that is "
            "being written has not; take a causal one, such as llama"
        )
