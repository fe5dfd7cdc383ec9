"""Next tokens as labels want a model that answers a token by those before it: one that also sees
those after it reads its answers off its input, learns to copy, and is right without fail until it
is asked to go on with a text."""

from __future__ import annotations

import torch

from edge_sdk.data.examples import Examples
from edge_sdk.errors import DataError
from edge_sdk.models import build
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import ModelSpec
from edge_sdk.tasks.tokens import IGNORED

ALIKE = 1e-3  # of the largest logit
LOOKED_AT = 200  # examples


def has_next_tokens(examples: Examples) -> bool:
    """Whether each label that counts is the id that follows in its example."""
    if examples.task != "tokens" or not examples.vocabulary:
        return False
    x, y = examples.x[:LOOKED_AT], examples.y[:LOOKED_AT]
    counts = y[:, :-1] != IGNORED
    return bool(counts.any() and (y[:, :-1] == x[:, 1:])[counts].all())


@torch.no_grad()
def check_causal(spec: ModelSpec, model: StagedModel, examples: Examples) -> None:
    """Raise DataError for a model that sees the next tokens that it is to tell."""
    if not has_next_tokens(examples):
        return
    was_training, device = model.training, next(model.parameters()).device
    one = torch.from_numpy(examples.x[:1]).to(device)
    other = one.clone()
    other[:, -1] = (other[:, -1] + 1) % spec.vocabulary
    before, after = (torch.stack(model.eval()(x))[:, :, :-1] for x in (one, other))
    model.train(was_training)
    if (after - before).abs().max() > ALIKE * before.abs().max().clamp_min(ALIKE):
        raise DataError(
            f"the labels are the next tokens of the texts, and family {spec.family!r} answers a "
            "token by those after it, too: it would see what it is to tell; take llama, or another "
            "causal model, or labels of another kind"
        )


def check_sight(spec: ModelSpec, examples: Examples) -> None:
    """The same of a model that is built for it, before a run. Raises DataError."""
    if has_next_tokens(examples):
        check_causal(spec, build(spec), examples)
