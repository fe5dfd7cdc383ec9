"""`svd-mlp`: HypeMeFed's factorised hypernetworks (2024), which predict the absolute convolution
weights of stage t from those of stage t - 1, client by client.

Per pair of a source and a target convolution two MLPs (linear, ReLU, linear): one maps each left
singular vector of the source to one of the target, the other each right one; the product of the two
outputs is the predicted matrix, trained by mean squared error. The r singular vectors are a batch,
so the size of the networks does not depend on the rank. Deeper stages are chained: stage 3 of an
exit-1 client comes from its generated stage 2.

Choices and deviations: convolutions of neighbouring stages pair off from the last (a family's first
stage may hold a stem). One owner is one step ("single batch"), in an order drawn from the seed. The
target is the owner's weight truncated to `rank`, equal to the full weight when rank reaches the
smaller matrix side: so of a client only factors are kept, O(rank (rows + columns)) per convolution;
memory grows with the participants of a round by that, and while fitting by the owners' targets.
A new Adam each round, networks warm-started. BatchNorm, biases and exits are never generated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from coordinator.cohort import ClientUpdate
from coordinator.config import GeneratorOptions
from coordinator.factors import (
    Factors,
    dematricise,
    factorise,
    matricise,
    matrix_shape,
    reconstruct,
)
from edge_sdk.errors import ShapeError
from edge_sdk.models.staged import place
from edge_sdk.tensors import Tensors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """Predict `target` (in stage `stage`) from `source`."""

    stage: int
    source: str
    target: str


@dataclass(frozen=True)
class _Seen:
    client_id: str
    weight: float
    factors: dict[str, Factors]


class HyperNetwork(nn.Module):
    """Two MLPs on the factors of one pair. source, target: matrix shapes (rows, columns)."""

    def __init__(self, source: tuple[int, int], target: tuple[int, int], hidden: int) -> None:
        super().__init__()
        self.left = _mlp(source[0], hidden, target[0])
        self.right = _mlp(source[1], hidden, target[1])

    def forward(self, factors: Factors) -> Tensor:
        """Predicted target matrix (rows, columns)."""
        return reconstruct(Factors(self.left(factors.left), self.right(factors.right)))


class SvdMlp:
    """See the module's docstring. shapes: of every tensor of the whole model, by name."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        options: GeneratorOptions,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.options = options
        self.pairs = conv_pairs(shapes)
        self._shapes = {name: shapes[name] for p in self.pairs for name in (p.source, p.target)}
        self._device = device
        self._seed = seed
        self._seen: list[_Seen] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.networks = nn.ModuleList(
                HyperNetwork(
                    matrix_shape(shapes[p.source]), matrix_shape(shapes[p.target]), options.hidden
                )
                for p in self.pairs
            ).to(device)

    def observe(self, update: ClientUpdate) -> None:
        factors: dict[str, Factors] = {}
        for name in self._shapes:
            if name in update.tensors:
                matrix = matricise(update.tensors[name].float()).to(self._device)
                try:
                    factors[name] = factorise(matrix, self.options.rank)
                except ShapeError as error:  # it still counts in the mean
                    log.warning("%s of %s is left out: %s", name, update.client.id, error)
        self._seen.append(_Seen(update.client.id, float(update.num_examples), factors))

    def fit(self, current: Mapping[str, Tensor], round: int) -> dict[str, float]:
        """Train every pair that has owners. The figures are taken before training on this round:
        error_stage_t is |prediction - weight| / |weight| over owners, weights cut to the rank;
        previous_stage_t the same of the global weight. Above it, generation carries nothing that
        the global does not."""
        self._seen.sort(key=lambda seen: seen.client_id)  # arrival order must not matter
        order = torch.Generator().manual_seed(self._seed * 1_000_003 + round)
        sums: dict[str, float] = {}
        for pair, network in zip(self.pairs, self.networks, strict=True):
            owners = [
                seen.factors
                for seen in self._seen
                if pair.source in seen.factors and pair.target in seen.factors
            ]
            if not owners:
                continue
            targets = [reconstruct(factors[pair.target]) for factors in owners]
            sources = [factors[pair.source] for factors in owners]
            previous = matricise(current[pair.target].float()).to(self._device)
            with torch.no_grad():
                for source, target in zip(sources, targets, strict=True):
                    for key, error in (
                        ("error", network(source) - target),
                        ("previous", previous - target),
                        ("norm", target),
                    ):
                        key = f"{key}_stage_{pair.stage}"
                        sums[key] = sums.get(key, 0.0) + float(error.square().sum())
            optimizer = torch.optim.Adam(network.parameters(), lr=self.options.lr)
            for _ in range(self.options.epochs):
                for i in torch.randperm(len(owners), generator=order).tolist():
                    optimizer.zero_grad(set_to_none=True)
                    loss = (network(sources[i]) - targets[i]).square().mean()
                    loss.backward()
                    optimizer.step()
        return {
            key: (total / sums[f"norm_{key.split('_', 1)[1]}"]) ** 0.5
            for key, total in sums.items()
            if not key.startswith("norm") and sums[f"norm_{key.split('_', 1)[1]}"] > 0
        }

    @torch.no_grad()
    def generate(self) -> Iterator[tuple[float, Tensors]]:
        owned = {name for seen in self._seen for name in seen.factors}
        for seen in self._seen:
            chain = dict(seen.factors)
            made: Tensors = {}
            for pair, network in zip(self.pairs, self.networks, strict=True):
                if pair.target in chain or pair.source not in chain or pair.target not in owned:
                    continue
                matrix = network(chain[pair.source])
                try:
                    chain[pair.target] = factorise(matrix, self.options.rank)
                except ShapeError as error:
                    log.warning("nothing generated for %s: %s", seen.client_id, error)
                    continue
                made[pair.target] = (
                    dematricise(matrix, self._shapes[pair.target]).contiguous().cpu()
                )
            if made:
                yield seen.weight, made
        self._seen = []

    def state_dict(self) -> Tensors:
        return {name: t.detach().cpu().clone() for name, t in self.networks.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.networks.load_state_dict(dict(state))


def conv_pairs(shapes: Mapping[str, tuple[int, ...]]) -> list[Pair]:
    """Convolutions (3 or 4 axes) of neighbouring stages, paired off from the last of each, ordered
    by stage so that a chain can be followed."""
    stages: dict[int, list[str]] = {}
    for name, shape in shapes.items():
        kind, number = place(name)
        if kind == "stages" and len(shape) in (3, 4):
            stages.setdefault(number, []).append(name)
    pairs = []
    for stage in sorted(stages):
        sources = stages.get(stage - 1, [])
        # strict=False: the longer list's first convolutions stay unpaired
        found = zip(reversed(sources), reversed(stages[stage]), strict=False)
        pairs += [Pair(stage, source, target) for source, target in reversed(list(found))]
    return pairs


def _mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))
