"""Generators by networks that predict the tensors of stage t from those of stage t - 1, client by
client; deeper stages are chained: stage 3 of an exit-1 client comes from its generated stage 2.

svd-mlp           HypeMeFed's factorised hypernetworks (2024) on absolute weights
naive-mlp         the same on flattened weights, for comparison
svd-mlp-residual  the factorised networks on updates (trained minus sent) in units of their size,
                  with the honest gate (ours)

Tensors of neighbouring stages pair off from the last, matrices with matrices and vectors with
vectors (a family's first stage may hold a stem). Trained by mean squared error against the owner's
tensor, cut to the rank: equal to the full one when the rank reaches the smaller matrix side. One
Adam step takes every owner of the round (the paper's single batch), or `owners_per_step` of them in
an order drawn from the seed (published code: one). A new Adam each round, networks warm-started.

The gate of stage t is the least-squares weight of the predictions G against the owners' W, before
training on them: clip(sum <G - w, W - w> / sum |G - w|^2, 0, 1), w the global sent, averaged over
rounds (0.8). At 1 a generated tensor counts as a trained one, at 0 the owners' mean is left alone.

Memory grows with the participants of a round, by their codes; while fitting, one group at a time
has gradients, moments of Adam and predictions, which are codes too.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from coordinator.cohorts.base import ClientUpdate
from coordinator.config import GeneratorOptions
from coordinator.generators.factors import dematricise, matricise, matrix_shape
from coordinator.generators.networks import Codec, FlatCodec, SvdCodec
from coordinator.generators.registry import register_generator
from edge_sdk.errors import ShapeError
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors, check_shapes

log = logging.getLogger(__name__)
Device: TypeAlias = str | torch.device
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
GATE_DECAY = 0.8
CLIENTS_AT_ONCE = 8  # predictions in memory


@dataclass(frozen=True)
class Group:
    """Pairs (source, target) of one stage whose matrices have the same shapes."""

    stage: int
    sources: tuple[str, ...]
    targets: tuple[str, ...]


@dataclass
class _Seen:
    client_id: str
    weight: float
    trained: frozenset[str]
    codes: dict[str, Any] = field(default_factory=dict)

    def holds(self, names: tuple[str, ...]) -> bool:
        return all(name in self.codes for name in names)


class PairGenerator:
    """See the module's docstring. names: of what is generated or a source of it. codec: of a
    network's sources and targets. is_residual: of updates, with the gate."""

    def __init__(
        self,
        shapes: Shapes,
        names: Sequence[str],
        options: GeneratorOptions,
        seed: int,
        device: Device,
        codec: Codec[Any],
        *,
        is_residual: bool = False,
    ) -> None:
        shapes = {name: shapes[name] for name in names}
        self.options = options
        self.groups = groups_of(shapes)
        self.is_residual = is_residual
        self.codec = codec
        used = {name for g in self.groups for name in (*g.sources, *g.targets)}
        self._shapes = {name: shapes[name] for name in shapes if name in used}
        self._device = device
        self._seed = seed
        self._seen: list[_Seen] = []
        self._scales: dict[str, float] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.networks = nn.ModuleList(
                self.codec.network(
                    len(group.targets),
                    matrix_shape(shapes[group.sources[0]]),
                    matrix_shape(shapes[group.targets[0]]),
                    options.hidden,
                )
                for group in self.groups
            ).to(device)
        stages = 1 + max((group.stage for group in self.groups), default=0)
        self._fits = torch.zeros(len(self.groups), dtype=torch.int64)
        self._gates = torch.full((stages,), -1.0, dtype=torch.float64)  # by stage; -1: none yet

    def observe(self, update: ClientUpdate, current: Mapping[str, Tensor], weight: float) -> None:
        seen = _Seen(update.client.id, weight, frozenset(update.tensors))
        for name in self._shapes:
            if name not in update.tensors:
                continue
            tensor = update.tensors[name].float()
            if self.is_residual:
                tensor = tensor - current[name].float()
            try:
                seen.codes[name] = self.codec.encode(matricise(tensor).to(self._device))
            except ShapeError as error:  # it still counts in the mean
                log.warning("%s of %s is left out: %s", name, update.client.id, error)
        self._seen.append(seen)

    def fit(self, current: Mapping[str, Tensor], round: int) -> dict[str, float]:
        self._seen.sort(key=lambda seen: seen.client_id)  # arrival order must not matter
        order = torch.Generator().manual_seed(self._seed * 1_000_003 + round)
        self._scales = {name: self._scale(name) for name in self._shapes}
        figures = {"generator_bytes": float(self._held_bytes())}
        sums: dict[int, Tensor] = {}
        for number, (group, network) in enumerate(zip(self.groups, self.networks, strict=True)):
            owners = [seen for seen in self._seen if seen.holds(group.sources + group.targets)]
            if not owners:
                continue
            sources = self._stacked(owners, group.sources)
            targets = self._stacked(owners, group.targets)
            found = self._measure(group, network, sources, targets, len(owners), current)
            sums[group.stage] = sums.get(group.stage, torch.zeros(5)) + found
            # its gradients and Adam's two moments; predictions are as large as their targets
            needed = 3 * sum(p.nbytes for p in network.parameters())
            needed += self.codec.num_bytes(sources) + 3 * self.codec.num_bytes(targets)
            held = max(figures["generator_bytes"], float(self._held_bytes() + needed))
            figures["generator_bytes"] = held
            self._train(group, network, sources, targets, len(owners), order)
            self._fits[number] += 1
        for stage, (error, previous, norm, agreement, power) in sums.items():
            trust = float((agreement / power).clamp(0, 1)) if power > 0 else 0.0
            last = float(self._gates[stage])
            trust = trust if last < 0 else GATE_DECAY * last + (1 - GATE_DECAY) * trust
            self._gates[stage] = trust
            figures[f"trust_stage_{stage}"] = trust
            if norm > 0:
                figures[f"error_stage_{stage}"] = float((error / norm).sqrt())
                figures[f"previous_stage_{stage}"] = float((previous / norm).sqrt())
        return figures

    @torch.no_grad()
    def generate(
        self, current: Mapping[str, Tensor], mean: Mapping[str, Tensor]
    ) -> Iterator[tuple[float, Tensors]]:
        owned = {name for seen in self._seen for name in seen.trained}
        chained = {name for group in self.groups for name in group.sources}
        fitted = zip(self.groups, self.networks, self._fits.tolist(), strict=True)
        for group, network, fits in fitted:
            lacking = [
                seen
                for seen in self._seen
                if seen.holds(group.sources) and not seen.trained & set(group.targets)
            ]
            if not (lacking and fits and owned.issuperset(group.targets)):
                continue
            total = sum(seen.weight for seen in lacking)
            averages = [
                torch.zeros(matrix_shape(self._shapes[name]), device=self._device)
                for name in group.targets
            ]
            for start in range(0, len(lacking), CLIENTS_AT_ONCE):
                some = lacking[start : start + CLIENTS_AT_ONCE]
                made = self.codec.predict(network, self._stacked(some, group.sources))
                for client, seen in enumerate(some):
                    for pair, average in enumerate(averages):
                        matrix = self.codec.matrix(made, client, pair)
                        average.add_(matrix, alpha=seen.weight / total)
                    if chained & set(group.targets):
                        self._chain(seen, group.targets, made, client)
            if (factor := self._factor(group, total)) > 0:
                yield total * factor, self._tensors(group, averages, current)
        self._seen = []

    def state_dict(self) -> Tensors:
        state = {name: t.detach().cpu().clone() for name, t in self.networks.state_dict().items()}
        return state | {"fits": self._fits.clone(), "gates": self._gates.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}
        check_shapes(state, shapes, f"checkpoint, {self.options.name}")
        self._fits, self._gates = state["fits"].clone(), state["gates"].clone()
        kept = {name: t for name, t in state.items() if name not in ("fits", "gates")}
        self.networks.load_state_dict(kept)

    def _train(
        self,
        group: Group,
        network: nn.Module,
        sources: Any,
        targets: Any,
        owners: int,
        order: torch.Generator,
    ) -> None:
        optimizer = torch.optim.Adam(network.parameters(), lr=self.options.lr)
        step = self.options.owners_per_step or owners
        entries = math.prod(matrix_shape(self._shapes[group.targets[0]]))
        for _ in range(self.options.epochs):
            for batch in torch.randperm(owners, generator=order).split(step):
                optimizer.zero_grad(set_to_none=True)
                some = batch.to(self._device)
                made = self.codec.predict(network, self.codec.take(sources, some))
                # the mean over clients and a matrix' entries; a sum over pairs: independent
                factor = 1 / (len(batch) * entries)
                self.codec.backward(made, self.codec.take(targets, some), factor)
                optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _measure(
        self,
        group: Group,
        network: nn.Module,
        sources: Any,
        targets: Any,
        owners: int,
        current: Mapping[str, Tensor],
    ) -> Tensor:
        """Sums over owners and pairs, in units of the weights: |G - W|^2, |w - W|^2, |W|^2,
        <G - w, W - w>, |G - w|^2."""
        sums = torch.zeros(5)
        predicted = self.codec.predict(network, sources)
        for pair, name in enumerate(group.targets):
            sent = matricise(current[name].float()).to(self._device)
            for client in range(owners):  # one whole matrix of each kind at a time
                moved = self.codec.matrix(predicted, client, pair) * self._scales[name]
                wanted = self.codec.matrix(targets, client, pair) * self._scales[name]
                if not self.is_residual:
                    moved, wanted = moved.sub_(sent), wanted.sub_(sent)
                terms = [_dot(moved - wanted), _dot(wanted), _dot(wanted + sent)]
                terms += [_dot(moved, wanted), _dot(moved)]
                sums += torch.stack(terms).cpu()
        return sums

    def _stacked(self, clients: list[_Seen], names: tuple[str, ...]) -> Any:
        """Their codes, in units of the scales."""
        codes = [[seen.codes[name] for name in names] for seen in clients]
        return self.codec.stack(codes, [1 / self._scales[name] for name in names])

    def _chain(self, seen: _Seen, names: tuple[str, ...], made: Any, client: int) -> None:
        """Keep what was generated as the source of the next stage."""
        for pair, name in enumerate(names):
            try:
                scale = self._scales[name]
                seen.codes[name] = self.codec.encode_made(made, client, pair, scale)
            except ShapeError as error:
                log.warning("nothing generated beyond %s for %s: %s", name, seen.client_id, error)

    def _scale(self, name: str) -> float:
        """Root mean square of the round's updates of a tensor; 1 for absolute weights."""
        if not self.is_residual:
            return 1.0
        found = [self.codec.norm(seen.codes[name]) for seen in self._seen if name in seen.codes]
        size = math.sqrt(math.prod(self._shapes[name]))
        return sum(found) / len(found) / size if any(found) else 1.0

    def _tensors(
        self, group: Group, matrices: Sequence[Tensor], current: Mapping[str, Tensor]
    ) -> Tensors:
        """One (rows, columns) a pair, in units of the scales -> tensors of the model."""
        tensors = {}
        for name, matrix in zip(group.targets, matrices, strict=True):
            tensor = dematricise(matrix, self._shapes[name]).contiguous().cpu()
            if self.is_residual:
                tensor = current[name] + tensor * self._scales[name]
            tensors[name] = tensor
        return tensors

    def _factor(self, group: Group, lacking: float) -> float:
        """What the weight of generated tensors is multiplied by, so that the mean becomes
        (owners + lacking (gate G + (1 - gate) owners' mean)) / all."""
        if not self.is_residual:
            return 1.0
        gate = max(0.0, float(self._gates[group.stage]))
        owners = sum(seen.weight for seen in self._seen if seen.trained & set(group.targets))
        return owners * gate / (owners + (1 - gate) * lacking) if owners else 0.0

    def _held_bytes(self) -> int:
        codes = sum(self.codec.num_bytes(c) for seen in self._seen for c in seen.codes.values())
        return codes + sum(p.nbytes for p in self.networks.parameters())


def _dot(a: Tensor, b: Tensor | None = None) -> Tensor:
    return (a * (a if b is None else b)).sum()


def groups_of(shapes: Mapping[str, tuple[int, ...]]) -> list[Group]:
    """Pairs of neighbouring stages, from the last of each kind, by stage and shapes; in the order
    in which a chain can be followed."""
    kinds: dict[tuple[int, str, bool], list[str]] = {}
    for name, shape in shapes.items():
        kind, stage = stage_of(name)
        kinds.setdefault((stage, kind, len(shape) > 1), []).append(name)
    groups: dict[tuple[object, ...], list[tuple[str, str]]] = {}
    for (stage, kind, is_matrix), targets in sorted(kinds.items()):
        sources = kinds.get((stage - 1, kind, is_matrix), [])
        # strict=False: the longer list's first tensors stay unpaired
        found = zip(reversed(sources), reversed(targets), strict=False)
        for source, target in reversed(list(found)):
            key = (stage, kind, matrix_shape(shapes[source]), matrix_shape(shapes[target]))
            groups.setdefault(key, []).append((source, target))
    return [
        Group(int(str(key[0])), tuple(s for s, _ in pairs), tuple(t for _, t in pairs))
        for key, pairs in groups.items()
    ]


@register_generator("svd-mlp")
def svd_mlp(
    shapes: Shapes, names: Sequence[str], settings: GeneratorOptions, seed: int, device: Device
) -> PairGenerator:
    codec = SvdCodec(settings.rank)
    return PairGenerator(shapes, names, settings, seed, device, codec)


@register_generator("naive-mlp")
def naive_mlp(
    shapes: Shapes, names: Sequence[str], settings: GeneratorOptions, seed: int, device: Device
) -> PairGenerator:
    return PairGenerator(shapes, names, settings, seed, device, FlatCodec())


@register_generator("svd-mlp-residual")
def svd_mlp_residual(
    shapes: Shapes, names: Sequence[str], settings: GeneratorOptions, seed: int, device: Device
) -> PairGenerator:
    codec = SvdCodec(settings.rank)
    return PairGenerator(shapes, names, settings, seed, device, codec, is_residual=True)
