"""Rounds of clients in this process: stopped and resumed, empty, short of updates, evaluated; and
how such clients are made."""

from __future__ import annotations

import dataclasses
import json
from collections import deque

import pytest
import torch

from coordinator.aggregation.border import Border
from coordinator.cohorts.base import Absence, Assignment, ClientUpdate
from coordinator.cohorts.in_process import InProcessCohort, train_here
from coordinator.cohorts.population import (
    Population,
    choose_holders,
    even_groups,
    group_exits,
    split_shards,
)
from coordinator.cohorts.sampling import sample
from coordinator.methods.base import Metrics
from coordinator.methods.registry import make_method
from coordinator.runs.asking import Asking
from coordinator.runs.emulating import write_json
from coordinator.runs.rounds import RoundReport, print_round, run_rounds
from coordinator.store.store import Store
from coordinator.store.tables import RoundTotals
from edge_sdk.errors import ConfigError, DataError, TrainerError
from edge_sdk.models import build
from edge_sdk.protocol.messages import Plan, Segment
from tests.support.examples import answer, client, cnn, config, examples


def cohort():
    shards = {name: examples(12, seed=i) for i, name in enumerate("abcd")}
    return InProcessCohort(shards, {"a": 1, "b": 1, "c": 2, "d": 3}, 3)


@pytest.mark.parametrize("name", ["hypemefed", "stage-rotation"])
def test_stopped_and_resumed_run_equals_a_straight_one(tmp_path, name):
    """Same cohorts, same jobs, same bytes: everything is a function of (seed, round, client)."""
    settings = config(name, rounds=4, participants=3)
    models = []
    for folder, stops in (("straight", [99]), ("stopped", [2, 99])):
        for turn, most in enumerate(stops):
            path = tmp_path / folder
            store = Store.resume(path) if turn else Store.create(path, settings, "emulate")
            seen = []
            method = make_method(settings)
            run_rounds(
                store,
                method,
                cohort(),
                examples(30, seed=9),
                should_stop=lambda seen=seen, most=most: len(seen) >= most,
                report=lambda report, seen=seen: seen.append(report.round),
            )
            store.close()
        models.append(method.state_dict())
        assert list(method.current()) == list(make_method(settings).current()), "order of the model"
    assert set(models[0]) == set(models[1])
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize(("stale", "said"), [(0, "1 of 2 returned"), (2, "1 of 2 and 2 late ret")])
def test_a_late_update_is_not_told_as_the_rounds_own(capsys, stale, said):
    totals = RoundTotals(3.0, 2, 1, 1, 0, 0, 10, 20, stale)
    print_round(RoundReport(7, [0.5], [0.75], Metrics(), totals))
    assert capsys.readouterr().out.startswith(f"round 7: {said}")


def test_what_was_not_tested_is_not_told(capsys):
    totals = RoundTotals(3.0, 2, 2, 0, 0, 0, 10, 20, 0)
    own = Metrics({"holdout_accuracy": 0.5})
    print_round(RoundReport(1, [0.5, 0.25], [0.75, 1.0], Metrics(), totals))
    print_round(RoundReport(2, [], [], own, totals))
    assert capsys.readouterr().out.splitlines() == [
        "round 1: 2 of 2 returned, accuracy per exit 50.0 / 25.0 %, served 75.0 / 100.0 %, 3.0 s",
        "round 2: 2 of 2 returned, accuracy on hold-outs as received 50.0 %, 3.0 s",
    ]


def test_failing_client_is_counted_and_the_round_goes_on(tmp_path):
    shards = {"a": examples(12), "b": examples(2)}  # b is too small to train
    store = Store.create(tmp_path, config("owners-mean", rounds=1), "emulate")
    reports = []
    method = make_method(store.config)
    clients = InProcessCohort(shards, {"a": 1, "b": 1}, 3)
    run_rounds(store, method, clients, None, report=reports.append)
    assert (reports[0].totals.returned, reports[0].totals.failures) == (1, 1)
    population = Population(clients=2, groups=(2,), split="iid", alpha=0.5)
    write_json(store, method.offer(), population, tmp_path / "out" / "x.json", {"more": 1})
    content = json.loads((tmp_path / "out" / "x.json").read_text())
    assert (content["more"], content["config"]["groups"]) == (1, [2])
    # a trained stage 1 of 12 examples, one epoch; b failed
    assert content["rounds"][0]["stages_trained"] == 12
    assert content["rounds"][0]["peak_memory_bytes"] > 0
    store.close()


def after_empty_rounds(folder, names, participants, rounds=1):
    """Of `names` those that the first round draws cannot train; who took part, by round."""
    settings = config("owners-mean", rounds=rounds, participants=participants)
    store = Store.create(folder, settings, "emulate")
    first = sample([client(n, 1) for n in names], participants, seed=settings.seed, round=1)
    broken = {who.id for who in first}
    shards = {name: examples(2 if name in broken else 12) for name in names}
    clients = InProcessCohort(shards, dict.fromkeys(names, 1), 3)
    try:
        run_rounds(store, make_method(settings), clients, None)
        rows = store._db.execute("SELECT round, client_id, outcome FROM participations")
        return broken, rows.fetchall()
    finally:
        store.close()


def test_an_empty_round_is_tried_again_with_others(tmp_path):
    broken, rows = after_empty_rounds(tmp_path / "1", "abcde", participants=2)
    assert {name for _, name, outcome in rows if outcome == "failed"} == broken
    (other,) = (name for _, name, outcome in rows if outcome == "ok")  # one update is enough
    assert other not in broken
    assert (broken, rows) == after_empty_rounds(tmp_path / "2", "abcde", participants=2)


def test_an_empty_round_is_tried_again_with_all_others_if_they_are_few(tmp_path):
    _, rows = after_empty_rounds(tmp_path, "abc", participants=2)
    assert sorted(outcome for _, _, outcome in rows) == ["failed", "failed", "ok"]


def test_who_failed_in_one_round_is_drawn_in_the_next(tmp_path):
    broken, rows = after_empty_rounds(tmp_path, "abcde", participants=2, rounds=6)
    clients = [client(name, 1) for name in "abcde"]
    num_mixed = 0
    for round in (2, 3, 4, 5, 6):
        want = {who.id for who in sample(clients, 2, seed=0, round=round)}
        drawn = {name for number, name, _ in rows if number == round}
        assert drawn == want != broken
        num_mixed += bool(drawn & broken)
    assert num_mixed == 2, "rounds 5 and 6"


def test_rounds_that_stay_empty_end_the_run(tmp_path):
    with pytest.raises(TrainerError, match="round 1: none of 2 participants .* 3 times in a row"):
        after_empty_rounds(tmp_path, "ab", participants=2)


def test_a_client_without_the_memory_is_an_absence():
    """A convolution of 10^6 x 10^6 channels takes 36 TB."""
    plan = Plan(segments=(Segment(first=1, last=3),))
    job = Assignment(model=cnn(channels=(10**6, 10**6, 4)), plan=plan, tensors={}, returns=())
    found = train_here(client("a", 3), job, examples(12), "cpu")
    assert (found.outcome, found.code) == ("failed", "capacity")
    assert found.detail.startswith("out of memory training for a: ")


def test_groups_and_splits():
    assert group_exits([2, 0, 1], 3, 3) == [1, 1, 3]
    for groups, clients in (([2, 2], 3), ([1, 1, 1, 1], 4), ([4, -1], 3)):
        with pytest.raises(ConfigError, match="groups"):
            group_exits(groups, clients, 3)
    assert [even_groups(50, n) for n in (2, 3)] == [(25, 25), (17, 17, 16)]
    assert even_groups(2, 3) == (1, 1, 0)
    data = examples(60)
    parts = split_shards(data, 4, split="iid", alpha=0.5, seed=0)
    assert sum(len(part) for part in parts) == 60
    with pytest.raises(DataError, match="no subjects"):
        split_shards(data, 4, split="subject", alpha=0.5, seed=0)


def test_holders_are_a_share_of_each_group():
    exits = {f"c{i:02d}": 1 + i // 10 for i in range(30)}
    half = choose_holders(exits, 0.5, seed=3)
    assert [sum(exits[name] == exit for name in half) for exit in (1, 2, 3)] == [5, 5, 5]
    assert half == choose_holders(dict(reversed(exits.items())), 0.5, seed=3)
    assert choose_holders(exits, 0.0, 3) == set()
    assert choose_holders(exits, 1.0, 3) == set(exits)
    with pytest.raises(ConfigError, match="--holders 2"):
        choose_holders(exits, 2.0, 3)


def test_the_last_rounds_are_evaluated(tmp_path):
    settings = config("owners-mean", rounds=5, eval_every=3, eval_tail=2)
    store = Store.create(tmp_path, settings, "emulate")
    cohort = InProcessCohort({"a": examples(12)}, {"a": 1}, 3)
    run_rounds(store, make_method(settings), cohort, examples(6))
    evaluated = [entry["round"] for entry in store.history() if entry["accuracy"]]
    store.close()
    assert evaluated == [3, 4, 5]


class Recording(InProcessCohort):
    """Remembers whom it was asked for, by try."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.asked: list[list[str]] = []

    def train(self, work, round, deadline_s):
        self.asked.append(sorted(work))
        return super().train(work, round, deadline_s)


def test_round_that_lacks_updates_asks_as_many_others(tmp_path):
    settings = config("owners-mean", rounds=1, participants=3, min_updates=3)
    store = Store.create(tmp_path, settings, "emulate")
    names = "abcdef"
    drawn = {c.id for c in sample([client(n, 1) for n in names], 3, seed=settings.seed, round=1)}
    broken = set(sorted(drawn)[:2])
    shards = {name: examples(2 if name in broken else 12) for name in names}
    cohort = Recording(shards, dict.fromkeys(names, 1), 3)
    run_rounds(store, make_method(settings), cohort, None)
    first, second = cohort.asked
    assert set(first) == drawn
    assert len(second) == 2, "two of three are lacking"
    assert not set(second) & drawn, "those who have not failed first"
    rows = store._db.execute("SELECT client_id, outcome FROM participations").fetchall()
    assert {name for name, outcome in rows if outcome == "failed"} == broken
    assert {name for name, outcome in rows if outcome == "ok"} == (drawn - broken) | set(second)
    assert store.history()[0]["chosen"] == 5
    store.close()


class Turns:
    """A cohort whose tries go as written: who is idle, then what comes of it. needed, num_busy: as
    of real devices."""

    def __init__(self, *turns: tuple[str, str], needed: int = 1, num_busy: int = 0) -> None:
        self._turns = deque(turns)
        self.needed, self.num_busy = needed, num_busy
        self.asked: list[str] = []
        self.rests: list[int] = []

    def clients(self):
        return [client(name, 1) for name in self._turns[0][0]]

    def expect(self, clients, num_chosen, check): ...

    def rest(self, tries):
        self.rests.append(tries)
        if not self.asked:  # before the round
            self._turns.popleft()
        return True

    def train(self, work, round, deadline_s):
        self.asked.append("".join(sorted(work)))
        returned = self._turns.popleft()[1]
        for name in sorted(work):
            if name in returned:
                yield answer(client(name, 1), work[name])
            else:
                yield Absence(client(name, 1), (), "failed", "trainer", "died")


def gathered(tmp_path, cohort, **settings):
    """One round: names of those whose updates counted."""
    store = Store.create(tmp_path, config("owners-mean", **settings), "serve")
    border = Border(build(store.config.model), 10.0, epochs=1, seed=0)
    asking = Asking(store, make_method(store.config), cohort, border, 1)
    results = list(asking.results())
    store.close()
    return [result.client.id for result in results if isinstance(result, ClientUpdate)]


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_round_whose_devices_fail_asks_others_in_both_modes(tmp_path, mode):
    cohort = Turns(("abcd", "a"), ("bcd", ""), ("bcd", "bcd"), needed=2)
    found = gathered(tmp_path, cohort, mode=mode, quorum=0.5)
    assert found[0] == "a"
    assert len(found) == 2
    assert cohort.asked[0] == "abcd"
    assert [len(asked) for asked in cohort.asked] == [4, 1, 1]


def test_a_round_of_nobody_is_not_begun(tmp_path):
    """All who are there are late with a job of before: the others are on their way."""
    cohort = Turns(("", ""), ("", ""), ("abcd", "abcd"))
    assert gathered(tmp_path, cohort, quorum=1.0) == ["a", "b", "c", "d"]
    assert (cohort.rests, cohort.asked) == ([1, 2], ["abcd"])


def test_an_asynchronous_round_may_be_of_those_at_work(tmp_path):
    cohort = Turns(("", ""), needed=0, num_busy=3)
    assert gathered(tmp_path, cohort, mode="async") == []
    assert (cohort.rests, cohort.asked) == ([], [""])


def test_in_asynchronous_mode_all_clients_so_far_tell_how_much_one_may_count(tmp_path):
    """A round asks one, who says 2^31; three who were asked in rounds before have 10 each."""

    class Alone(Turns):
        def clients(self):
            return [dataclasses.replace(client("d", 1), num_examples=2**31)]

        def train(self, work, round, deadline_s):
            (liar,) = self.clients()
            yield dataclasses.replace(answer(liar, work["d"], num_examples=2**31), client=liar)

    store = Store.create(tmp_path, config("owners-mean", mode="async"), "serve")
    store.record_clients(dataclasses.replace(client(n, 1), num_examples=10) for n in "abc")
    border = Border(build(store.config.model), 10.0, epochs=1, seed=0)
    asking = Asking(store, make_method(store.config), Alone(("d", "d")), border, 1)
    (update,) = asking.results()
    store.close()
    assert update.num_examples == 30
