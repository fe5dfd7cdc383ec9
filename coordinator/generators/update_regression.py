"""`update-regression`: a linear residual generator with memory (ours), the regression estimator of
survey sampling: the few clients that trained a stage are a sample, and the update of stage 1, known
of everybody, is the auxiliary variable that says how the sample differs from the cohort.

Per round, d = trained minus sent, n the clients' weights, H those of the cohort that trained stage
t, bars for n-weighted means:

    f_c   = stage 1's tensors of d_c, each divided by its mean norm over the cohort, which are the
            clients that trained stage 1
    y_c   = d_c - D, stage t, D their mean over H; with one owner D is a running mean (0.7)
    rows (f_c - fbar_H, y_c) enter a memory Z, Y of the last `memory_rows` after use; with one owner
    fbar_H is the cohort's fbar
    P(x)  = Y' (Z Z' / q + 0.3 I)^-1 Z x / q,   q = mean of diag(Z Z'), from 4 rows on
    made  = owners' mean + g P(f_lacking - fbar_H), standing for all of the cohort that lack stage t
    g     = running mean (0.8) of clip(<P, y> / <P, P>, 0, 1) over H, before its rows enter

Averaged with the owners this is the owners' mean minus g P(fbar_H - fbar): clients are never
generated one by one. Of updates only their place in a low-rank basis in half precision is kept
(row_memory.py): between rounds at most 2 min(rank, memory_rows + 1) bytes for each generated
parameter, and of stage 1 a sketch of at most SKETCH numbers a tensor for each row. In a round its
owners' vectors come on top, up to SLACK of them or SLACK_BYTES; beyond that the basis is cut before
all have arrived, and their order then changes what is kept of them.

Corrects by default main weights, BatchNorm affine and exits (`generate` "all", where the published
networks make main weights only); running statistics follow the owners.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coordinator.cohorts.base import ClientUpdate
from coordinator.config import GeneratorOptions
from coordinator.generators.registry import register_generator
from coordinator.generators.row_memory import RowMemory
from edge_sdk.protocol.tensor_lists import stage_of
from edge_sdk.protocol.tensors import Tensors, check_shapes, with_prefix

SKETCH = 4096  # numbers kept of a stage-1 tensor; larger ones are count-sketched
MIN_ROWS = 4
SLACK, SLACK_BYTES = 8, 256 * 1024**2  # basis vectors of a round before it is cut: the larger
SINGLE_DECAY, GAIN_DECAY = 0.7, 0.8


@dataclass
class _Owner:
    """Of the round: row (1, m) is its update in terms of the stage's basis."""

    client_id: str
    weight: float
    row: Tensor


@dataclass(frozen=True)
class _Seen:
    client_id: str
    weight: float
    features: dict[str, Tensor]  # stage-1 updates, sketched; empty: it did not train stage 1
    norms: dict[str, float]


@dataclass
class _Stage:
    """Memory of one stage: rows (R, m) and the running mean (1, m) in terms of the basis, z (R, F)
    the rows' features."""

    names: list[str]
    basis: RowMemory
    rows: Tensor
    mean: Tensor
    z: Tensor
    gain: float = -1.0  # none yet
    has_mean: bool = False


BEST = {"generator.generate": "all", "generator.rank": 12}


@register_generator("update-regression", defaults=BEST)
class UpdateRegression:
    """See the module's docstring. generated: names of what is corrected."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        generated: Sequence[str],
        options: GeneratorOptions,
        seed: int,
        device: str | torch.device = "cpu",
    ) -> None:
        self.options = options
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self._device = device
        self._features = [name for name in shapes if stage_of(name)[1] == 1]
        self._hashes = {name: _hashes(name, shapes[name], seed) for name in self._features}
        self._stages: dict[int, _Stage] = {}
        for number in sorted({stage_of(name)[1] for name in generated} - {1}):
            names = [name for name in generated if stage_of(name)[1] == number]
            width = sum(torch.Size(shapes[name]).numel() for name in names)
            empty = torch.zeros(0, 0, dtype=torch.float64)
            basis = RowMemory(width, options.rank, device)
            mean = torch.zeros(1, 0, dtype=torch.float64)
            self._stages[number] = _Stage(names, basis, empty, mean, torch.zeros(0, 0))
        self._seen: list[_Seen] = []
        self._pending: dict[int, list[_Owner]] = {number: [] for number in self._stages}
        self._made: dict[int, Tensor] = {}  # what each stage's prediction adds to the owners' mean
        self._lacking: dict[int, float] = {}
        self._peak_bytes = 0

    def observe(self, update: ClientUpdate, current: Mapping[str, Tensor], weight: float) -> None:
        features, norms = {}, {}
        if all(name in update.tensors for name in self._features):
            for name in self._features:
                moved = (update.tensors[name] - current[name]).float().flatten()
                norms[name] = float(moved.norm())
                features[name] = _sketched(moved, self._hashes[name])
        self._seen.append(_Seen(update.client.id, weight, features, norms))
        for number, stage in self._stages.items():
            if not all(name in update.tensors for name in stage.names):
                continue
            if len(stage.basis) >= self._kept(stage) + slack(stage.basis.width):
                self._cut(number, stage.basis.gram())
            trained, sent = ([held[n] for n in stage.names] for held in (update.tensors, current))
            size = stage.basis.add(trained, sent)
            row = torch.zeros(1, len(stage.basis), dtype=torch.float64)
            row[0, -1] = size
            self._pending[number].append(_Owner(update.client.id, weight, row))
        self._peak_bytes = max(self._peak_bytes, self._held_bytes())

    def fit(self, current: Mapping[str, Tensor], round: int) -> dict[str, float]:
        self._made, self._lacking = {}, {}
        cohort = sorted((s for s in self._seen if s.features), key=lambda s: s.client_id)
        figures: dict[str, float] = {}
        if cohort:
            f = self._normalised(cohort)  # (C, F)
            weights = torch.tensor([seen.weight for seen in cohort], dtype=torch.float64)
            place_of = {seen.client_id: row for row, seen in enumerate(cohort)}
            for number in self._stages:
                owners = [o for o in self._pending[number] if o.client_id in place_of]
                if owners:
                    owners.sort(key=lambda owner: owner.client_id)
                    rows = [place_of[owner.client_id] for owner in owners]
                    figures |= self._fit_stage(number, owners, rows, f, weights)
        self._peak_bytes = max(self._peak_bytes, self._held_bytes())
        figures["generator_bytes"] = float(self._peak_bytes)
        self._peak_bytes = 0
        self._seen = []
        self._pending = {number: [] for number in self._stages}
        return figures

    @torch.no_grad()
    def generate(
        self, current: Mapping[str, Tensor], mean: Mapping[str, Tensor]
    ) -> Iterator[tuple[float, Tensors]]:
        for number, moved in self._made.items():
            names = self._stages[number].names
            sizes = [torch.Size(self._shapes[name]).numel() for name in names]
            parts = moved.cpu().split(sizes)
            tensors = {
                name: mean[name] + part.reshape(self._shapes[name])
                for name, part in zip(names, parts, strict=True)
            }
            yield self._lacking[number], tensors
        self._made = {}

    def state_dict(self) -> Tensors:
        state: Tensors = {}
        for number, stage in self._stages.items():
            held = {f"memory/{k}": t for k, t in stage.basis.state_dict().items()}
            held |= {"rows": stage.rows, "mean": stage.mean, "z": stage.z}
            held["gain"] = torch.tensor([stage.gain, float(stage.has_mean)], dtype=torch.float64)
            state |= {f"{number}/{name}": tensor.clone() for name, tensor in held.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for number, stage in self._stages.items():
            held = with_prefix(state, f"{number}/")
            shapes: dict[str, tuple[int | None, ...]] = {"mean": (1, None), "gain": (2,)}
            shapes |= dict.fromkeys(("rows", "z"), (None, None))
            if "memory/basis" in held:  # none before the first update
                shapes["memory/basis"] = (None, stage.basis.width)
            check_shapes(held, shapes, f"checkpoint, update-regression of stage {number}")
            stage.basis.load_state_dict(with_prefix(held, "memory/"))
            stage.rows, stage.mean, stage.z = (held[k].clone() for k in ("rows", "mean", "z"))
            stage.gain, stage.has_mean = float(held["gain"][0]), bool(held["gain"][1])

    def _fit_stage(
        self, number: int, owners: list[_Owner], rows: list[int], f: Tensor, weights: Tensor
    ) -> dict[str, float]:
        """Predict for those who lack the stage, judge the prediction on its owners, then learn."""
        stage = self._stages[number]
        width = len(stage.basis)
        d = torch.cat([_padded(owner.row, width) for owner in owners])  # (H, m)
        share = weights[rows] / weights[rows].sum()
        mean = share @ d  # (m,)
        old = _padded(stage.mean, width)[0]
        running = SINGLE_DECAY * old + (1 - SINGLE_DECAY) * mean if stage.has_mean else mean
        y = d - (mean if len(owners) > 1 else running)
        mean_f, owners_f = weights @ f / weights.sum(), share @ f[rows]
        centred = f[rows] - (owners_f if len(owners) > 1 else mean_f)
        known = _padded(stage.rows, width)  # (R, m)
        figures = {}
        gram = stage.basis.gram()
        if len(known) >= MIN_ROWS:
            predict = _solver(stage.z.double())
            p = predict(centred) @ known  # (H, m) in terms of the basis
            agreement = float(((p @ gram) * y).sum())
            power = float(((p @ gram) * p).sum())
            trust = min(1.0, max(0.0, agreement / power)) if power > 0 else 0.0
            last = stage.gain
            stage.gain = trust if last < 0 else GAIN_DECAY * last + (1 - GAIN_DECAY) * trust
            norm = float(((y @ gram) * y).sum())
            figures[f"trust_stage_{number}"] = stage.gain
            if norm > 0:
                left = norm - 2 * stage.gain * agreement + stage.gain**2 * power
                figures[f"deviation_error_stage_{number}"] = (max(0.0, left) / norm) ** 0.5
            lacking = [row for row in range(len(f)) if row not in rows]
            if lacking and stage.gain > 0:
                total = weights[lacking].sum()
                target_f = weights[lacking] @ f[lacking] / total
                change = predict((target_f - owners_f)[None]) @ known  # (1, m)
                self._made[number] = stage.basis.combine(stage.gain * change[0])
                self._lacking[number] = float(total)
        kept = self.options.memory_rows
        stage.rows = torch.cat([known, y])[-kept:]
        old_z = stage.z if len(stage.z) else centred[:0]
        stage.z = torch.cat([old_z.float(), centred.float()])[-kept:]
        stage.mean, stage.has_mean = running[None], True
        self._pending[number] = []
        if width > self._kept(stage):
            self._cut(number, gram)
        return figures

    def _kept(self, stage: _Stage) -> int:
        """Basis vectors that the rows in memory and their mean can have use for."""
        return min(self.options.rank, len(stage.rows) + 1)

    def _cut(self, number: int, gram: Tensor) -> None:
        """Cut a stage's basis back to the rank, for its rows, its mean and what is pending."""
        stage, pending = self._stages[number], self._pending[number]
        width = len(stage.basis)
        parts = [stage.rows, stage.mean, *(owner.row for owner in pending)]
        counts = [len(part) for part in parts]
        new = stage.basis.cut(torch.cat([_padded(part, width) for part in parts]), gram).split(
            counts
        )
        stage.rows, stage.mean = new[0], new[1]
        for owner, row in zip(pending, new[2:], strict=True):
            owner.row = row

    def _normalised(self, cohort: list[_Seen]) -> Tensor:
        """(C, F) float64: every tensor's update over its mean norm in the cohort."""
        columns = []
        for name in self._features:
            size = sum(seen.norms[name] for seen in cohort) / len(cohort)
            block = torch.stack([seen.features[name] for seen in cohort]).double()
            columns.append(block / size if size else block)
        return torch.cat(columns, 1)

    def _held_bytes(self) -> int:
        features = sum(t.nbytes for seen in self._seen for t in seen.features.values())
        held = sum(stage.basis.num_bytes + stage.z.nbytes for stage in self._stages.values())
        made = sum(tensor.nbytes for tensor in self._made.values())
        hashes = sum(t.nbytes for pair in self._hashes.values() if pair for t in pair)
        return features + held + made + hashes


def slack(width: int) -> int:
    """How many vectors of that width a round may add before the basis is cut."""
    return max(SLACK, SLACK_BYTES // (2 * width))


def _solver(z: Tensor) -> Callable[[Tensor], Tensor]:
    """P's coefficients for features x (B, F): (B, R)."""
    products = z @ z.T  # (R, R)
    q = products.diagonal().mean()
    if q <= 0:
        return lambda x: x.new_zeros(len(x), len(z))
    ridge = products / q + 0.3 * torch.eye(len(z), dtype=z.dtype)
    return lambda x: torch.linalg.solve(ridge, z @ x.T / q).T


def _padded(rows: Tensor, width: int) -> Tensor:
    """(n, m) -> (n, width): the basis has grown, older rows have no part in the new vectors."""
    return torch.nn.functional.pad(rows, (0, width - rows.shape[1]))


def _hashes(name: str, shape: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor] | None:
    """Bucket and sign of every entry of a tensor too large to keep; None: kept as it is."""
    count = torch.Size(shape).numel()
    if count <= SKETCH:
        return None
    rng = torch.Generator().manual_seed(seed + sum(map(ord, name)))
    buckets = torch.randint(SKETCH, (count,), generator=rng, dtype=torch.int32)
    signs = torch.randint(2, (count,), generator=rng, dtype=torch.int8) * 2 - 1
    return buckets, signs


def _sketched(flat: Tensor, hashes: tuple[Tensor, Tensor] | None) -> Tensor:
    """A count sketch (Charikar et al. 2002): inner products are kept in expectation."""
    if hashes is None:
        return flat.clone()
    buckets, signs = hashes
    return torch.zeros(SKETCH).index_add_(0, buckets.long(), flat * signs)
