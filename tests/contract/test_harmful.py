"""One client of six that lies, under every method and generator with default settings: the run is
what it would have been without it, and goes on with the honest ones alone."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import load_file, save_file

from coordinator.aggregation.border import STATE
from coordinator.cohorts.budget import Variant
from coordinator.generators.registry import GENERATORS
from coordinator.methods.registry import METHODS, make_method
from coordinator.runs.rounds import run_rounds
from coordinator.store.checkpoints import unsound
from coordinator.store.opening import open_store
from edge_sdk.data.partition import holdout_rows
from tests.contract.methods import clients_of, unless_except
from tests.support.attackers import ATTACKS, EXAMPLES, EXITS, LIAR, Lying, says, sends
from tests.support.examples import config, examples
from tests.support.processes import read_rows

ROUNDS = 2
RUNS = {name: (name, "") for name in METHODS}
RUNS |= {f"with {name}": ("hypemefed", name) for name in GENERATORS}


def settings(key, **changes):
    method, generator = RUNS[key]
    made = config(method, rounds=ROUNDS + 1, **changes)
    if not generator:
        return made
    return replace(made, generator=replace(made.generator, name=generator, memory_rows=8))


def lying(key, lie, says_examples=0):
    method = make_method(settings(key))
    if not method.offer().variants:
        return Lying(lie, says_examples)
    clients = clients_of(method, tuple(EXITS.values()))
    return Lying(lie, says_examples, {c.id: Variant(c.variant, c.exit, 0) for c in clients})


def run(folder, made, cohort, rounds=ROUNDS, resume=False):
    """So many more rounds; the method's state and each round's figures."""
    store = open_store(folder, made, "emulate", resume)
    method, reports = make_method(made), []
    until = store.next_round() + rounds

    def stops():
        return store.next_round() == until

    run_rounds(
        store, method, cohort, examples(30, seed=9), should_stop=stops, report=reports.append
    )
    store.close()
    return method.state_dict(), reports


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@functools.cache
def without_it(folder, key):
    """The state when it returns nothing."""
    return run(folder / f"reference {key}", settings(key), lying(key, None))[0]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    return tmp_path_factory.mktemp("references")


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("key", RUNS)
def test_a_run_is_as_without_the_liar_and_goes_on_without_it(tmp_path, references, key, attack):
    if attack.startswith(("mean", "variance")):
        unless_except(key, "statistics")
    state, _ = run(tmp_path / "run", settings(key), lying(key, sends(ATTACKS[attack])))
    assert same(state, without_it(references, key))
    told = "SELECT DISTINCT client_id, code FROM participations WHERE outcome = 'failed'"
    details = "SELECT round, detail FROM participations WHERE outcome = 'failed'"
    for number, detail in read_rows(tmp_path / "run", details):
        assert detail.startswith(f"update from {LIAR}, round {number}: ")
    code = "tensors" if attack == "NaN" else "update"
    assert read_rows(tmp_path / "run", told) == [(LIAR, code)]
    state, reports = run(tmp_path / "run", settings(key), lying(key, None), 1, resume=True)
    assert unsound(state) == ""
    assert reports[0].totals.returned == 5
    assert all(math.isfinite(value) for value in reports[0].metrics.values.values())


@pytest.mark.parametrize("key", RUNS)
def test_two_billion_examples_count_three_times_anothers(tmp_path, key):
    """Five others have 24 each, so 2^31 count as 72, in every method that counts examples; or less
    where some are set aside."""
    state, _ = run(tmp_path / "lie", settings(key), lying(key, says(2**31), 2**31))
    half, _ = run(tmp_path / "half", settings(key), lying(key, says(72), 72))
    assert same(state, half)
    rows = read_rows(tmp_path / "lie", "SELECT DISTINCT num_examples FROM participations")
    share = settings(key).holdout
    trained_on = len(holdout_rows(examples(EXAMPLES).y, share)[0]) if share else EXAMPLES
    assert sorted(rows) == [(trained_on,), (2**31,)], "what it said is recorded"


def test_more_examples_than_it_said_before_do_not_count(tmp_path):
    state, _ = run(tmp_path / "run", settings("owners-mean"), Lying(says(25)))
    assert same(state, run(tmp_path / "none", settings("owners-mean"), Lying(None))[0])


def test_without_the_bound_a_round_that_would_end_the_run_changes_nothing(tmp_path):
    """--refuse-above 0: the mean of 1e20 is finite, and no run can go on from it."""
    made = settings("owners-mean")
    made = replace(made, aggregation=replace(made.aggregation, refuse_above=0.0))
    before = make_method(made).current()
    state, reports = run(tmp_path / "run", made, Lying(sends(ATTACKS["1e20"])))
    assert [report.metrics.values["aggregate_refused"] for report in reports] == [1.0] * ROUNDS
    assert all(torch.equal(state[f"server/globals/{name}"], t) for name, t in before.items())
    state, reports = run(tmp_path / "run", made, Lying(None), 1, resume=True)
    assert "aggregate_refused" not in reports[0].metrics.values
    assert not torch.equal(state["server/globals/exits.0.2.weight"], before["exits.0.2.weight"])


@pytest.mark.parametrize("key", ["hypemefed", "owners-mean"])
def test_a_run_that_an_earlier_version_let_be_poisoned_goes_back_and_on(tmp_path, key):
    """Its last checkpoint holds a share of 1e20 and no norms; from the one before it becomes what
    it would have been."""
    straight, _ = run(tmp_path / "straight", settings(key), Lying(None), 3)
    run(tmp_path / "run", settings(key), Lying(None), 2)
    for number in (1, 2):
        path = tmp_path / "run" / f"round-{number:06d}.safetensors"
        state = load_file(path)
        del state[STATE]
        if number == 2:
            state["server/globals/exits.0.2.weight"] += 2e18
        save_file(state, path)
    state, reports = run(tmp_path / "run", settings(key), Lying(None), 2, resume=True)
    assert [report.round for report in reports] == [2, 3]
    assert same(state, straight)
