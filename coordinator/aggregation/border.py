"""What one finite update may do: the check that every update passes before it counts, in every
method, over the network and emulated. It refuses what no honest training gives and leaves the rest
as it is; what is bounded more closely is for --clip and the robust rules.

Per stage, weights may move by FACTOR, statistics of BatchNorm by STATISTICS times FACTOR times the
median of the last 64 updates that owned the stage, before this round; or by a tenth of that times
|sent| + 1 where that is more, so that nobody who trains in earnest is refused because others hardly
moved, or because a converged run hardly moves. Of honest updates (Fashion-MNIST and digits, every
method, Dirichlet 0.1, adam, sgd at 0.1 with momentum too) those that moved weights by more than
|sent| moved 2.8 medians, and statistics moved up to 48. Norms of refused updates are remembered
too: when most of a cohort moves further, that is no attack.

The values of a weight under a mask are that weight's, and their mask is within the one that was
sent. A teacher's tensors are measured as those of the model, by their names. What else an update
brings beside the model's own tensors (see fields.Role) is one more group, whose movement is
measured from what was sent under the same name and shape, else from zero; what its integers mean
the method knows that asked for them.

With fewer than FEW norms of earlier rounds a stage has the round's own: up to HELD updates wait, in
their order, for others to be compared with. Where there are no three, weights may move by 10 FACTOR
(|sent| + 1), statistics by anything whose squares stay in float32.

Whatever the factor, variances are not negative, a single integer counts batches, so it only grows
and by no more than were trained, and other integers come back as they were sent."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from coordinator.aggregation.masked import kept_of_sent
from coordinator.aggregation.movement import Group, NormMemory
from coordinator.aggregation.robust import lower_median
from coordinator.aggregation.weights import most_examples
from coordinator.cohorts.base import Absence, ClientUpdate
from coordinator.cohorts.sampling import job_seed
from edge_sdk.errors import ShapeError, UpdateError
from edge_sdk.protocol.tensor_lists import role_of, stage_of
from edge_sdk.protocol.tensors import Tensors, check_finite, check_shapes

log = logging.getLogger(__name__)
WEIGHTS, MEANS, VARIANCES = range(3)
KINDS = ("weights", "statistics", "variances")
STATISTICS = 10
FEW = 3  # norms that have a median
HELD = 8  # updates that wait for others, by reference
MOST = 1e12  # of a statistic's movement; its square stays in float32
REMEMBERED = 1e300  # instead of infinite
COLUMNS = 2**18  # entries at once: what fits a core's cache
STATE = "border/norms"


class Border:
    """One run's. others: where clients train several models, those after the first, in the order of
    their variants; the stages of each are on their own. factor: FACTOR, 0: movement is not bounded.
    epochs: of a job."""

    def __init__(
        self,
        model: nn.Module,
        factor: float,
        *,
        epochs: int,
        seed: int,
        others: Sequence[nn.Module] = (),
    ) -> None:
        self._groups: list[Mapping[str, Group]] = []  # by name, of each model
        self._stages: list[str] = []  # how each is called
        for number, each in enumerate((model, *others), 1):
            before, groups = len(self._stages), groups_of(each)
            count = 1 + max((stage for stage, _ in groups.values()), default=-1)
            of_model = f" of model {number}" if others else ""
            self._stages += [f"stage {stage}{of_model}" for stage in range(1, count + 1)]
            self._groups.append({n: (before + stage, k) for n, (stage, k) in groups.items()})
        stages = len(self._stages)
        self._beside: Group = (stages, WEIGHTS)
        self.memory = NormMemory(stages + 1, len(KINDS))
        self._factor = factor
        self._epochs = epochs
        self._seed = seed
        self._medians: dict[Group, float] = {}
        self._seen: dict[tuple[str, int], tuple[dict[Group, float], dict[Group, float]]] = {}
        self._bounded: set[str] = set()
        self._round = 0

    def check(self, update: ClientUpdate, sent: Mapping[str, Tensor]) -> None:
        """Raise UpdateError for an update that may not count, as far as earlier rounds tell, and
        ShapeError for NaN and infinite values. sent: what its job began from."""
        where = self._where(update)
        told, known = update.message.num_examples, update.client.num_examples
        if known and told > known:
            raise UpdateError(f"{where}: {told} examples, it had {known} when it was asked")
        squares: dict[Group, float] = {}
        started: dict[Group, float] = {}
        for name, tensor in update.tensors.items():
            role, weight = role_of(name)
            if not tensor.is_floating_point():
                if role in ("weight", "teacher"):
                    self._check_integers(name, tensor, sent[name], told, where)
                continue
            is_packed = role == "packed"
            of_model = weight if role in ("packed", "teacher") else name
            group = self._groups_of(update).get(of_model, self._beside)
            if group[1] == VARIANCES and tensor.numel() and (least := float(tensor.min())) < 0:
                raise UpdateError(f"{where}: {name} reaches {least:.3g}, a variance is at least 0")
            old = kept_of_sent(weight, update.tensors, sent, where) if is_packed else sent.get(name)
            if old is None or old.shape != tensor.shape:
                old = torch.zeros_like(tensor)
            moved, began = squared_norms(tensor, old)
            squares[group] = squares.get(group, 0.0) + moved
            started[group] = started.get(group, 0.0) + began
        if not all(math.isfinite(total) for total in squares.values()):
            check_finite(update.tensors, where)
        norms = {group: min(REMEMBERED, math.sqrt(total)) for group, total in squares.items()}
        scales = {group: math.sqrt(total) + 1 for group, total in started.items()}
        self._seen[update.client.id, update.round] = norms, scales
        self._check_norms(where, norms, scales, self._medians)

    def screened(
        self,
        round: int,
        results: Iterable[ClientUpdate | Absence],
        sent: Mapping[str, Mapping[str, Tensor]],
        examples: Collection[int],
    ) -> Iterator[ClientUpdate | Absence]:
        """Pass the results of one round's participants on, refused updates as absences, and
        remember all norms. sent: what each client's job began from; examples: of all who were
        asked, as they said."""
        self._round, most = round, most_examples(examples)
        waiting: deque[ClientUpdate] = deque()
        found: dict[Group, list[float]] = {}
        for result in results:
            if isinstance(result, Absence):
                yield result
                continue
            refused = self._refused(result, sent)
            for group, norm in self._norms(result)[0].items():
                found.setdefault(group, []).append(norm)
            if refused:
                yield refused
                continue
            waiting.append(self._bounded_weight(round, result, most))
            del result  # no reference stays here
            while waiting and (len(waiting) > HELD or not self._is_open(waiting[0])):
                yield self._compared(waiting.popleft(), found)
        while waiting:
            yield self._compared(waiting.popleft(), found)
        self._settle(round)

    def state_dict(self) -> Tensors:
        return {STATE: self.memory.norms}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Of a run from before there was a border: nothing is remembered. Raises ShapeError."""
        if state:
            check_shapes(state, {STATE: tuple(self.memory.norms.shape)}, "checkpoint, border")
            self.memory.norms = state[STATE].clone()
        self._medians = self.memory.medians(FEW)

    def _where(self, update: ClientUpdate) -> str:
        """An emulated client's names no round."""
        return f"update from {update.client.id}, round {update.round or self._round}"

    def _groups_of(self, update: ClientUpdate) -> Mapping[str, Group]:
        several = len(self._groups) > 1
        return self._groups[max(update.client.variant, 1) - 1 if several else 0]

    def _norms(self, update: ClientUpdate) -> tuple[dict[Group, float], dict[Group, float]]:
        return self._seen.get((update.client.id, update.round), ({}, {}))

    def _refused(
        self, update: ClientUpdate, sent: Mapping[str, Mapping[str, Tensor]]
    ) -> Absence | None:
        """Unless it was checked when it arrived."""
        if (update.client.id, update.round) in self._seen:
            return None
        try:
            self.check(update, update.sent or sent[update.client.id])
        except ShapeError as error:
            return absence(update, error)
        return None

    def _is_open(self, update: ClientUpdate) -> bool:
        """Whether it has a stage of which only this round's others tell what is usual."""
        return bool(self._factor) and not self._norms(update)[0].keys() <= self._medians.keys()

    def _compared(
        self, update: ClientUpdate, found: Mapping[Group, list[float]]
    ) -> ClientUpdate | Absence:
        """With the others of its round, in the stages that earlier rounds tell nothing of."""
        medians = {
            group: lower_median(norms)
            for group, norms in found.items()
            if group not in self._medians and len(norms) >= FEW
        }
        norms, scales = self._norms(update)
        open_norms = {group: norm for group, norm in norms.items() if group in medians}
        try:
            self._check_norms(self._where(update), open_norms, scales, medians)
        except UpdateError as error:
            return absence(update, error)
        return update

    def _check_norms(
        self,
        where: str,
        norms: Mapping[Group, float],
        scales: Mapping[Group, float],
        medians: Mapping[Group, float],
    ) -> None:
        for group, norm in norms.items() if self._factor else ():
            kind = group[1]
            factor = self._factor * (1 if kind == WEIGHTS else STATISTICS)
            if (median := medians.get(group)) is not None:
                bound = max(factor * median, factor / 10 * scales[group])
                why = f"{factor:g} medians ({median:.3g}) of other updates"
            else:
                bound = 10 * factor * scales[group] if kind == WEIGHTS else MOST
                why = "before there are others to compare with"
            if norm > bound:
                raise UpdateError(
                    f"{where}: moved the {self._words(group)} by {norm:.3g}, at most "
                    f"{bound:.3g}: {why}; see --refuse-above"
                )

    def _words(self, group: Group) -> str:
        stage, kind = group
        return (
            "tensors beside the model"
            if group == self._beside
            else f"{KINDS[kind]} of {self._stages[stage]}"
        )

    def _check_integers(
        self, name: str, tensor: Tensor, sent: Tensor, num_examples: int, where: str
    ) -> None:
        if tensor.ndim:
            if not torch.equal(tensor, sent):
                raise UpdateError(f"{where}: {name} holds integers other than those that were sent")
            return
        got, least = int(tensor), int(sent)
        most = least + self._epochs * num_examples
        if not least <= got <= most:
            raise UpdateError(f"{where}: {name} counts {got} batches, expected {least} to {most}")

    def _bounded_weight(self, round: int, update: ClientUpdate, most: float) -> ClientUpdate:
        bounded = replace(update, most_examples=most)
        name, told = update.client.id, update.message.num_examples
        if bounded.num_examples < told and name not in self._bounded:
            self._bounded.add(name)
            said = (
                "round %d: %s counts with %d of its %d examples, as nobody counts for more than "
                "three times another, ten medians or half of all"
            )
            log.info(said, round, name, bounded.num_examples, told)
        return bounded

    def _settle(self, round: int) -> None:
        """Remember what was seen, in an order that does not depend on that of arrival."""
        order = sorted(self._seen, key=lambda key: job_seed(self._seed, round, f"border/{key[0]}"))
        self.memory.remember(self._seen[key][0] for key in order)
        self._medians = self.memory.medians(FEW)
        self._seen = {}


def absence(update: ClientUpdate, error: ShapeError) -> Absence:
    """The participant's result instead of an update that may not count."""
    log.warning("%s", error)
    moved = update.bytes_down, update.bytes_up
    return Absence(update.client, update.segments, "failed", error.code, str(error), *moved)


def groups_of(model: nn.Module) -> dict[str, Group]:
    """Of each tensor, by name."""
    kinds = {name: MEANS for name, _ in model.named_buffers()}
    kinds |= {name: WEIGHTS for name, _ in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_var is not None:
            kinds[f"{name}.running_var"] = VARIANCES
    return {name: (stage_of(name)[1] - 1, kind) for name, kind in kinds.items()}


def squared_norms(tensor: Tensor, sent: Tensor) -> tuple[float, float]:
    """|tensor - sent|^2 and |sent|^2, in float32: not finite from about 1e38 on. By numpy, which
    takes half of torch's time for small tensors: 0.2 ms for 5 MB."""
    new, old = (t.reshape(-1).float().numpy() for t in (tensor, sent))
    moved = began = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(new), COLUMNS):
            part = old[start : start + COLUMNS]
            step = new[start : start + COLUMNS] - part
            moved += float(np.dot(step, step))
            began += float(np.dot(part, part))
    return moved, began
