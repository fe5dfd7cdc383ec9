"""How well a model answers the examples that a client set aside."""

from __future__ import annotations

import torch

from edge_sdk.data.examples import Examples
from edge_sdk.models import StagedModel
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import Holdout
from edge_sdk.training.tally import Tally


@torch.no_grad()
def answers(
    model: StagedModel, examples: Examples, at_once: int, device: str | torch.device = "cpu"
) -> Holdout | None:
    """Of the model's last exit, in eval mode, at_once examples together; the other exits are not
    asked, so they may lack tensors. None of no examples. The model is left in the mode that it was
    in."""
    if not len(examples):
        return None
    was_training = model.training
    model.eval()
    tally = Tally(examples.task)
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    for features, labels in zip(x.split(at_once), y.split(at_once), strict=True):
        features = moved(features, device)
        for stage in model.stages:
            features = stage(features)
        tally.add_(model.exits[-1](features).cpu(), labels)
    model.train(was_training)
    return Holdout(num_examples=len(y), loss=tally.loss, metric=tally.metric)
