"""What every method must do in runs whose clients train in earnest, and keep what they keep between
rounds."""

from __future__ import annotations

import pytest
import torch

from coordinator.cohorts.base import Absence
from coordinator.cohorts.budget import Variant
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.methods.registry import METHODS, make_method
from coordinator.runs.rounds import run_rounds
from coordinator.store.opening import open_store
from edge_sdk.protocol.tensors import specs_of
from tests.contract.methods import changed_names, clients_of, learned
from tests.support.examples import config, examples

LOST = "d"  # the client with the most
ROUNDS = 3


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


class Forgetful(InProcessCohort):
    """Whose client LOST vanishes in round 1: before it trains, or with the trained update."""

    def __init__(self, *given, is_trained):
        super().__init__(*given)
        self.is_trained = is_trained

    def train(self, work, round, deadline_s):
        gone = {LOST: work[LOST]} if round == 1 and LOST in work else {}
        if self.is_trained:
            assert not any(isinstance(r, Absence) for r in super().train(gone, round, 0.0))
        for who, job in gone.items():
            client = next(c for c in self.clients() if c.id == who)
            yield Absence(client, job.plan.segments, "failed", "link", "it is gone")
        yield from super().train({w: j for w, j in work.items() if w not in gone}, round, 0.0)


def cohort_of(method, states=None, kind=InProcessCohort, **how):
    clients = clients_of(method)
    shards = {who.id: examples(12 + 3 * i, seed=i) for i, who in enumerate(clients)}
    exits = {who.id: who.exit for who in clients}
    variants = {who.id: Variant(who.variant, who.exit, who.num_weights) for who in clients}
    chosen = variants if method.offer().variants else None
    return kind(shards, exits, method.spec.exit, "cpu", None, chosen, states, **how)


def run(folder, name, rounds=ROUNDS, *, resume=False, kind=InProcessCohort, **how):
    """So many more rounds; the method, and all files of what its clients keep."""
    settings = config(name, rounds=9, min_updates=1)
    method = make_method(settings)
    store = open_store(folder / "run", settings, "emulate", resume)
    until = store.next_round() + rounds
    cohort = cohort_of(method, folder / "clients", kind, **how)
    run_rounds(store, method, cohort, None, should_stop=lambda: store.next_round() == until)
    counted = store.counted(until - 1)
    store.close()
    cohort.accept(until - 1, counted)  # as the next round would
    where = folder / "clients"
    kept = {str(p.relative_to(where)): p.read_bytes() for p in where.rglob("*.*")}
    return method, kept


def test_a_run_repeats_bit_by_bit_and_goes_on_as_if_never_stopped(tmp_path, name):
    """What its clients keep, too."""
    straight, kept = run(tmp_path / "straight", name)
    run(tmp_path / "stopped", name, 1)
    resumed, also_kept = run(tmp_path / "stopped", name, ROUNDS - 1, resume=True)
    assert not changed_names(straight.state_dict(), resumed.state_dict())
    assert kept == also_kept
    assert bool(kept) == straight.offer().plan.keeps_state
    cohort = clients_of(straight)
    fresh = make_method(config(name))
    assert changed_names(learned(fresh, cohort), learned(straight, cohort))


def test_who_vanishes_after_training_leaves_no_trace(tmp_path, name):
    """Neither in the model nor with itself: its next job begins as if it had not had one."""
    results = [
        run(tmp_path / str(is_trained), name, 2, kind=Forgetful, is_trained=is_trained)
        for is_trained in (False, True)
    ]
    (method, kept), (other, also_kept) = results
    assert not changed_names(method.state_dict(), other.state_dict())
    assert kept == also_kept


def test_returns_lists_what_training_gives(name):
    method = make_method(config(name))
    cohort = cohort_of(method)
    work = {who.id: method.assign(who, 1) for who in cohort.clients()}
    for update in cohort.train(work, 1, 0.0):
        assert not isinstance(update, Absence), update
        want = work[update.client.id].returns
        assert list(update.tensors) == [spec.name for spec in want]
        for got, spec in zip(specs_of(update.tensors), want, strict=True):
            assert got == spec or (got.role == spec.role == "packed" and got.shape <= spec.shape)
            assert torch.isfinite(update.tensors[spec.name].float()).all()
