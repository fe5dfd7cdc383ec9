"""A small problem for each task that a small model learns in a few rounds."""

from __future__ import annotations

import numpy as np

from edge_sdk.data.examples import Examples, check_examples
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.tokens import IGNORED

MIX = np.array([[2.0, -1.0], [0.5, 1.0], [-1.0, 0.0], [0.0, 0.5]], np.float32)
MLP = {"family": "mlp", "options": {"widths": (16, 16)}}


def problem(task: str, count: int, seed: int = 0) -> Examples:
    """Labels that follow from the inputs: of numbers (n, 4), or of 6 tokens at 5 places."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, 4)).astype(np.float32)
    if task == "classify":
        found = Examples(x, (x @ MIX).argmax(1).astype(np.int64), 2)
    elif task == "multilabel":
        found = Examples(x, (x[:, :3] > 0).astype(np.float32), 3, task="multilabel")
    elif task == "regress":
        found = Examples(x, x @ MIX, 2, task="regress")
    else:
        ids = rng.integers(6, size=(count, 5))
        y = ids % 3
        y[:, -1] = IGNORED
        found = Examples(ids, y, 3, task="tokens", vocabulary=6)
    return check_examples(found, task)


def spec_of(examples: Examples, exit: int = 2) -> ModelSpec:
    how = {"family": "embedded"} if examples.vocabulary else MLP
    return ModelSpec(
        input_shape=examples.input_shape,
        num_classes=examples.num_classes,
        exit=exit,
        task=examples.task,
        vocabulary=examples.vocabulary,
        **how,
    )
