"""How good a global model is: every exit on the common test set, clients after fine-tuning, and how
alike two models' features are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from msgspec.structs import replace
from torch import Tensor

from coordinator.cohorts.sampling import job_seed
from edge_sdk.data.loading import Examples
from edge_sdk.errors import ConfigError, DataError, ShapeError
from edge_sdk.models import build, family_code
from edge_sdk.models.staged import moved
from edge_sdk.protocol.messages import ModelSpec, Plan, Segment
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors
from edge_sdk.tasks.table import answered_at_once
from edge_sdk.training.tally import Tally
from edge_sdk.training.trainer import train

PERPLEXITY, MOST_EXPONENT = "perplexity", 80.0  # e^80 is about what float32 holds


def perplexity(loss: float) -> float:
    return math.exp(min(loss, MOST_EXPONENT))


@dataclass(frozen=True)
class Tested:
    """The task's metric and the loss on all examples. by_exit, losses: exit 1 first; of_mean: of
    the mean of all exits' logits, the prediction of DepthFL (2023)."""

    by_exit: list[float]
    of_mean: float
    losses: list[float]


def metric_per_exit(
    spec: ModelSpec, tensors: Tensors, examples: Examples, *, device: str | torch.device = "cpu"
) -> list[float]:
    """The task's metric on `examples`, e.g. the share that each exit gets right, exit 1 first."""
    return figures_of(spec, tensors, examples, device=device).by_exit


@torch.no_grad()
def figures_of(
    spec: ModelSpec, tensors: Tensors, examples: Examples, *, device: str | torch.device = "cpu"
) -> Tested:
    """Of a model, in eval mode; every example counts."""
    model = build(spec)
    model.load(tensors)
    model.ready(device).eval()
    tallies = [Tally(spec.task) for _ in range(spec.exit + 1)]  # the last one: of the mean
    x, y = torch.from_numpy(examples.x), torch.from_numpy(examples.y)
    count = answered_at_once(spec)
    for features, labels in zip(x.split(count), y.split(count), strict=True):
        with family_code(spec, "evaluating", model):
            logits: list[Tensor] = model(moved(features, device))
        for tally, logit in zip(tallies, [*logits, torch.stack(logits).mean(0)], strict=True):
            tally.add_(logit.cpu(), labels)
    *by_exit, of_mean = (tally.metric for tally in tallies)
    return Tested(by_exit, of_mean, [tally.loss for tally in tallies[:-1]])


@dataclass(frozen=True)
class Personalised:
    """One client's metric on its own hold-out, at its deepest exit."""

    before: float  # the global model as it is
    after: float  # after fine-tuning on the client's own training part


def personalised(
    spec: ModelSpec,
    tensors: Tensors,
    shards_train: Sequence[Examples],
    shards_holdout: Sequence[Examples],
    plan: Plan,
    epochs: int,
    *,
    exits: Sequence[int] | None = None,
    device: str | torch.device = "cpu",
) -> list[Personalised]:
    """Per client, the metric before and after `epochs` local epochs of fine-tuning its subnetwork
    by the plan (HypeMeFed, section 5.3.2); the global model is not changed.

    spec, tensors: the global model. exits: the depth of each client's subnetwork, None for the
    whole model. The plan's segments are replaced by the client's prefix. Clients train like
    participants of a round 0. Raises DataError for a client that cannot train or has no hold-out.
    """
    depths = [spec.exit] * len(shards_train) if exits is None else list(exits)
    if not len(shards_train) == len(shards_holdout) == len(depths):
        raise ConfigError(
            f"{len(shards_train)} training parts, {len(shards_holdout)} hold-outs and "
            f"{len(depths)} exits; give one of each per client"
        )
    results = []
    for number, (shard, holdout, exit) in enumerate(
        zip(shards_train, shards_holdout, depths, strict=True), 1
    ):
        if len(holdout) == 0:
            raise DataError(f"client {number} has no hold-out examples; leave it out")
        part, segments = replace(spec, exit=exit), (Segment(first=1, last=exit),)
        seed = job_seed(plan.seed, 0, f"personalise/{number}")
        job = replace(plan, segments=segments, epochs=epochs, seed=seed)
        held = {name: tensor for name, tensor in tensors.items() if stage_of(name)[1] <= exit}
        before = metric_per_exit(part, held, holdout, device=device)[-1]
        tuned = train(part, job, held, shard, device=device).tensors
        after = metric_per_exit(part, held | tuned, holdout, device=device)[-1]
        results.append(Personalised(before, after))
    return results


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Similarity in [0, 1] of two models' features of the same n examples: centred kernel alignment
    with linear kernels (Kornblith et al. 2019), |Yc^T Xc|^2 / (|Xc^T Xc| |Yc^T Yc|).

    x: (n, ...), y: (n, ...); each example's features are flattened. By the (n, n) Gram matrices,
    which is the same number: features are usually more than examples. NaN if all rows of one are
    alike. Raises ShapeError if the numbers of examples differ."""
    if len(x) != len(y):
        raise ShapeError(f"features of {len(x)} and of {len(y)} examples; give the same examples")
    grams = []
    for features in (x, y):
        flat = features.flatten(1).double()  # (n, features)
        centred = flat - flat.mean(0)
        grams.append(centred @ centred.T)  # (n, n)
    norm = grams[0].norm() * grams[1].norm()
    return float((grams[0] * grams[1]).sum() / norm)
