"""What emulated clients keep between rounds: of committed rounds, over a stop and a kill."""

from contextlib import closing

import pytest
import torch

from coordinator.cohorts.base import Absence, ClientUpdate
from coordinator.cohorts.in_process import InProcessCohort
from coordinator.cohorts.processes import ProcessCohort
from coordinator.methods.registry import make_method
from coordinator.runs.rounds import run_rounds
from coordinator.store.store import Store
from tests.support.examples import config, examples

EXITS = {"a": 1, "b": 1, "c": 2, "d": 3}
SHARDS = {name: examples(12, seed=i) for i, name in enumerate(EXITS)}


def settings(**changes):
    return config("scaffold", rounds=5, participants=3, epochs=1, **changes)


def run(path, cohort, most=99):
    """Run at most so many more rounds. The state of the method."""
    store = Store.resume(path) if path.exists() else Store.create(path, settings(), "emulate")
    method, seen = make_method(settings()), []
    with closing(store):
        run_rounds(
            store,
            method,
            cohort,
            None,
            should_stop=lambda: len(seen) >= most,
            report=lambda report: seen.append(report.round),
        )
    return method.state_dict()


def in_process(path):
    return InProcessCohort(SHARDS, EXITS, 3, states=path / "clients")


def same(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_stopped_and_resumed_run_equals_a_straight_one(tmp_path):
    """After each round anew, with another cohort object: as after a kill between the commit of a
    round and the next."""
    straight = run(tmp_path / "straight", in_process(tmp_path / "straight"))
    path = tmp_path / "stopped"
    for _ in range(5):
        stopped = run(path, in_process(path), most=1)
    assert same(straight, stopped)
    in_memory = run(tmp_path / "memory", InProcessCohort(SHARDS, EXITS, 3))
    assert same(straight, in_memory)
    lost = tmp_path / "lost"
    for _ in range(5):
        without = run(lost, InProcessCohort(SHARDS, EXITS, 3), most=1)
    assert not same(straight, without)  # so it matters


def test_processes_give_the_same_bytes(tmp_path):
    straight = run(tmp_path / "here", in_process(tmp_path / "here"))
    path = tmp_path / "there"
    with ProcessCohort(in_process(path), 2, threads=1) as cohort:
        run(path, cohort, most=2)
        there = run(path, cohort)
    assert same(straight, there)


def test_a_round_that_is_not_committed_leaves_nothing(tmp_path):
    """Killed in the middle of round 3, when two of its three clients had trained."""
    straight = run(tmp_path / "straight", in_process(tmp_path / "straight"))
    path = tmp_path / "killed"
    run(path, in_process(path), most=2)

    class Killed(Exception):
        pass

    class Dying(InProcessCohort):
        def train(self, work, round, deadline_s):
            for number, result in enumerate(super().train(work, round, deadline_s), 1):
                yield result
                if number == 2:
                    raise Killed

    with pytest.raises(Killed):
        run(path, Dying(SHARDS, EXITS, 3, states=path / "clients"))
    assert same(straight, run(path, in_process(path)))


def test_only_clients_whose_update_counts_keep_it(tmp_path):
    class Spoiling(InProcessCohort):
        """a's update is not finite, so it is refused."""

        def train(self, work, round, deadline_s):
            for result in super().train(work, round, deadline_s):
                if isinstance(result, ClientUpdate) and result.client.id == "a":
                    result.tensors["exits.0.2.bias"][0] = float("nan")
                yield result

    path = tmp_path / "run"
    store = Store.create(path, config("scaffold", rounds=2, participants=4), "emulate")
    cohort = Spoiling(SHARDS, EXITS, 3, states=path / "clients")
    run_rounds(store, make_method(store.config), cohort, None)
    assert store.counted(1) == store.counted(2) == ["b", "c", "d"]
    cohort.accept(2, store.counted(2))
    store.close()
    rounds = {name: state.load("emulated", 3)[0] for name, state in cohort.states.items()}
    assert rounds == {"a": 0, "b": 2, "c": 2, "d": 2}


def test_a_state_that_cannot_be_written_is_said(tmp_path):
    path = tmp_path / "run"
    path.mkdir()
    (path / "clients").write_text("in the way")
    cohort = InProcessCohort(SHARDS, EXITS, 3, states=path / "clients")
    method = make_method(settings())
    work = {"a": method.assign(cohort.clients()[0], 1)}
    (result,) = cohort.train(work, 1, 0)
    assert isinstance(result, Absence)
    assert "what this client keeps of round 1 cannot be written" in result.detail
