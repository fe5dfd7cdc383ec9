"""What devices say they trained, against what the coordinator counted, and against the model.

Three witnesses that share no code: the devices' logs, the run's database, and the checkpoints. The
last are checked by doing a round again in this process from the checkpoint before it, with exactly
the updates that the database counts: one lost or counted twice would show in the weights.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor

from coordinator.aggregation.border import STATE
from coordinator.aggregation.staleness import rebase_late_updates
from coordinator.cohorts.base import Client, ClientUpdate
from coordinator.cohorts.in_process import train_here
from coordinator.config import RunConfig, read_config
from coordinator.methods.base import Method
from coordinator.methods.registry import make_method
from edge_sdk.models import build
from edge_sdk.protocol.tensors import Tensors
from tests.chaos.bed import Bed

# Weights here are of the order of 1, and means folded in another order differ by a few units in
# the last place, 2^-23 of them; seen: up to 1.2e-7. Trained with another seed: from 4e-2.
TOLERANCE = 1e-5
SAID = re.compile(r"round (\d+): (trained before|trained|update accepted)\b")


@dataclass(frozen=True)
class Row:
    """Of the table participations. round: whose job it was. segments: "1-2", "1-1,3-3"."""

    round: int
    name: str
    outcome: str
    code: str
    digest: str
    segments: str


@dataclass
class Ledger:
    """By (round, client). problems: what was lost or counted twice, a line each."""

    trained: Counter[tuple[int, str]] = field(default_factory=Counter)
    accepted: Counter[tuple[int, str]] = field(default_factory=Counter)
    counted: Counter[tuple[int, str]] = field(default_factory=Counter)
    named: dict[tuple[int, str], str] = field(default_factory=dict)
    last_round: int = 0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.last_round} rounds, {self.trained.total()} trainings, "
            f"{self.counted.total()} counted, {len(self.named)} others named"
        )


def judged(
    logs: Mapping[str, str], rows: Iterable[Row], last_round: int, owners: Sequence[float]
) -> Ledger:
    """logs: what each device has said. owners: how many updates the newest checkpoint holds of each
    stage; () if unknown. Jobs of rounds after last_round may still end well and are not judged."""
    ledger = Ledger(last_round=last_round)
    for name, text in logs.items():
        for round, what in SAID.findall(text):
            book = ledger.accepted if what == "update accepted" else ledger.trained
            if what != "trained before" or not book[int(round), name]:  # may have been told then
                book[int(round), name] += 1
    digests: Counter[str] = Counter()
    stages: Counter[int] = Counter()
    for row in rows:
        if row.outcome != "ok":
            ledger.named[row.round, row.name] = f"{row.outcome}: {row.code}"
            continue
        ledger.counted[row.round, row.name] += 1
        digests[row.digest] += 1
        for first, last in (map(int, part.split("-")) for part in row.segments.split(",")):
            stages.update(range(first, last + 1))
    twice = [f"digest {digest} is counted {n} times" for digest, n in digests.items() if n > 1]
    expected = [stages[stage] for stage in range(1, len(owners) + 1)]
    if list(owners) != expected:
        twice.append(f"the model holds {list(owners)} updates by stage, the database {expected}")
    ledger.problems = [*twice, *_miscounted(ledger), *_lost(ledger)]
    return ledger


def _miscounted(ledger: Ledger) -> Iterable[str]:
    for (round, name), times in sorted(ledger.counted.items()):
        if times > 1:
            yield f"round {round}: {name} is counted {times} times"
        if not ledger.trained[round, name]:
            yield f"round {round}: {name} is counted, but never said that it had trained"


def _lost(ledger: Ledger) -> Iterable[str]:
    for key in sorted(set(ledger.accepted) | set(ledger.trained)):
        round, name = key
        if round > ledger.last_round or key in ledger.counted:
            continue
        found = ledger.named.get(key, "nothing")
        if key in ledger.accepted:
            yield f"round {round}: {name} was told 'accepted', the database has {found}"
        elif key not in ledger.named:
            yield f"round {round}: {name} trained, and nothing says what became of it"


def read_ledger(bed: Bed) -> Ledger:
    """The books of a run so far. Its devices are to stand still, or the newest round is open."""
    logs = {
        name: "\n".join(
            log.read_text(errors="replace")
            for log in (bed.folder / f"{name}.log", bed.folder / f"{name}-second.log")
            if log.exists()
        )
        for name in bed.links
    }
    last = bed.last_round()
    rows = bed.rows(
        "SELECT round - staleness, client_id, outcome, code, digest, segments"
        " FROM participations WHERE round <= ?",
        last,
    )
    bed.keep_checkpoints()
    newest = bed.checkpoint(last)
    owners = load_file(newest)["owners"].tolist() if newest.exists() else ()
    return judged(logs, [Row(*row) for row in rows], last, owners)


# -- the model ---------------------------------------------------------------------------------


def replayed(bed: Bed, rounds: Iterable[int], *, seed_shift: int = 0) -> dict[int, float]:
    """The largest difference between the tensors of each round's checkpoint and those of the same
    round done here from the checkpoint before it, with the updates that the database counts.
    seed_shift: train with another seed, which must show. Needs the checkpoints."""
    bed.keep_checkpoints()
    config = _config(bed)
    differences = {}
    for round in rounds:
        method = _method_before(bed, config, round)
        _do_again(bed, config, method, round, seed_shift)
        theirs = _state(bed, round)
        differences[round] = largest_difference(method.state_dict(), theirs)
    return differences


def undisturbed(bed: Bed, last: int) -> float:
    """The largest difference after round `last` from a run that nothing ever happened to: the same
    rounds one after the other here, from the first model on. Only where no update was late."""
    bed.keep_checkpoints()
    config = _config(bed)
    method = make_method(config, "cpu")
    for round in range(1, last + 1):
        _do_again(bed, config, method, round)
    return largest_difference(method.state_dict(), _state(bed, last))


def _state(bed: Bed, round: int) -> Tensors:
    """The method's part of a round's checkpoint: what the border remembers of norms is not."""
    return {name: t for name, t in load_file(bed.checkpoint(round)).items() if name != STATE}


def _config(bed: Bed) -> RunConfig:
    ((text,),) = bed.rows("SELECT config FROM runs")
    return read_config(text, "run")


def _method_before(bed: Bed, config: RunConfig, round: int) -> Method:
    """As it was when the jobs of this round were given."""
    method = make_method(config, "cpu")
    if round > 1:
        method.load_state_dict(_state(bed, round - 1))
    return method


def _do_again(bed: Bed, config: RunConfig, method: Method, round: int, seed_shift: int = 0) -> None:
    """The round that is next for this method, with the updates that the database counts."""
    rows = bed.rows(
        "SELECT client_id, exit, staleness, micro_batch, recompute FROM participations"
        " WHERE round = ? AND outcome = 'ok' ORDER BY client_id, staleness",
        round,
    )
    updates = []
    for name, exit, staleness, micro_batch, recompute in rows:
        client = Client(name, exit, num_examples=len(bed.shards[name]))
        begun = _method_before(bed, config, round - staleness) if staleness else method
        job = begun.assign(client, round - staleness)
        plan = msgspec.structs.replace(
            job.plan,
            micro_batch=micro_batch,
            recompute=bool(recompute),
            seed=job.plan.seed + seed_shift,
        )
        job = dataclasses.replace(job, plan=plan)
        update = train_here(client, job, bed.shards[name], "cpu")
        assert isinstance(update, ClientUpdate), update
        updates.append(dataclasses.replace(update, staleness=staleness, sent=job.tensors))
    parameters = {name for name, _ in build(method.spec).named_parameters()}
    half_life = config.staleness_half_life
    method.aggregate(round, rebase_late_updates(updates, method.current(), parameters, half_life))


def largest_difference(ours: Tensors, theirs: Mapping[str, Tensor]) -> float:
    """Over all elements of all tensors of two checkpoints."""
    assert ours.keys() == theirs.keys(), "the checkpoints have other tensors"
    return max(
        float((ours[name].to(torch.float64) - theirs[name].to(torch.float64)).abs().max())
        for name in ours
        if ours[name].numel()
    )
