"""The run folder: what is kept, when it is final, what a kill or a full disk leaves."""

from __future__ import annotations

import errno
import json
import os
import sqlite3
from pathlib import Path

import pytest
import torch

from coordinator import checkpoints
from coordinator.cohort import Absence, Assignment, ClientUpdate, InProcessCohort, train_here
from coordinator.emulate import Population, choose_holders, group_exits, split_shards, write_json
from coordinator.methods import make_method
from coordinator.methods.base import Metrics
from coordinator.rounds import run_rounds
from coordinator.sampling import sample
from coordinator.store import BEGUN, Store
from edge_sdk.errors import ConfigError, DataError, StoreError, TrainerError
from edge_sdk.wire import ExitResult, Phase, Plan, Segment
from tests.helpers import client, cnn, config, examples


def update(who, **changes):
    settings = {
        "client": who,
        "tensors": {},
        "segments": (Segment(first=1, last=1), Segment(first=3, last=3)),
        "num_examples": 10,
        "num_steps": 2,
        "exits": (ExitResult(exit=1, loss=0.5, accuracy=0.75),),
        "phases": {"train": Phase(wall_s=2.0, cpu_s=1.5), "wait": Phase(wall_s=3.0)},
        "bytes_down": 100,
        "bytes_up": 40,
        "retries": 1,
    }
    return ClientUpdate(**(settings | changes))


def commit(store, number, state=None, results=()):
    passed = list(store.recording(number, results))
    metrics = Metrics({"accuracy_exit_1": 0.5}, {"fit": Phase(wall_s=1.0, cpu_s=0.5)})
    tensors = {"w": torch.tensor([float(number)])} if state is None else state
    return passed, store.commit(number, metrics, tensors, "2026-01-01T00:00:00", 4.0)


def test_round_is_recorded_as_it_was(tmp_path):
    store = Store.create(tmp_path / "run", config("owners-mean"), "emulate")
    a, b, c = client("a", 1), client("b", 2), client("c", 3)
    store.record_clients([a, b, c])
    late = Absence(b, (Segment(first=1, last=2),), "straggler", "late", "did not return")
    gone = Absence(c, (Segment(first=1, last=3),), "failed", "gone", "killed", 7, 0)
    passed, totals = commit(store, 1, results=[update(a), late, gone])
    assert [u.client.id for u in passed] == ["a"], "a method sees updates only"
    assert (totals.returned, totals.stragglers, totals.failures) == (1, 1, 1)
    assert (totals.bytes_down, totals.bytes_up, totals.retries) == (107, 40, 1)
    rows = store._db.execute("SELECT client_id, segments FROM participations ORDER BY client_id")
    assert rows.fetchall() == [("a", "1-1,3-3"), ("b", "1-2"), ("c", "1-3")]
    (row,) = store.history()
    assert row["accuracy"] == [0.5]
    assert row["seconds"]["train"] == 1.5, "CPU seconds where measured"
    assert row["seconds"]["wait"] == 3.0, "else wall clock"
    assert row["seconds"]["checkpoint"] > 0
    store.close()


def test_resume_goes_on_after_the_last_round(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    assert store.next_round() == 1
    assert store.load_checkpoint() is None
    for number in (1, 2, 3):
        commit(store, number)
    store.close()
    again = Store.resume(tmp_path)
    assert again.next_round() == 4
    assert again.load_checkpoint()["w"].item() == 3.0
    assert again.config == config("owners-mean")
    assert again.run == store.run
    assert len(list(tmp_path.glob("round-*.safetensors"))) == 2, "the newest two are kept"
    again.close()


def test_what_was_not_committed_is_not_there(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)
    list(store.recording(2, [update(client("a", 1))]))
    store._db.close()  # killed here
    again = Store.resume(tmp_path)
    assert again.next_round() == 2
    count = again._db.execute("SELECT COUNT(*) FROM participations").fetchone()[0]
    assert count == 0
    commit(again, 2, results=[update(client("a", 1))])
    again.close()


@pytest.mark.parametrize("where", ["checkpoint", "rename"])
def test_full_disk_keeps_the_last_round(tmp_path, monkeypatch, where):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"checkpoint": (checkpoints, "save_file"), "rename": (checkpoints.os, "replace")}
    monkeypatch.setattr(*target[where], full)
    with pytest.raises(StoreError, match=r"round 2 .*No space left.*--resume at round 2"):
        commit(store, 2)
    with pytest.raises(StoreError, match=r"model\.safetensors cannot be written: .*No space left"):
        store.write_model(cnn(), {"w": torch.zeros(1)})
    monkeypatch.undo()
    assert store.next_round() == 2
    assert store.load_checkpoint()["w"].item() == 1.0
    assert not list(tmp_path.glob("*.new"))
    commit(store, 2)  # space was made
    assert store.next_round() == 3
    store.close()


def test_a_folder_that_is_gone_is_one_line(tmp_path):
    """Its place taken by a plain file, below which not even deleting works."""
    store = Store.create(tmp_path / "run", config("owners-mean"), "serve")
    commit(store, 1)
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").write_text("")
    with pytest.raises(StoreError, match=r"round 2 could not be saved in .*Not a directory"):
        commit(store, 2)
    with pytest.raises(
        StoreError, match=r"model\.safetensors cannot be written: .*Not a directory"
    ):
        store.write_model(cnn(), {"w": torch.zeros(1)})
    store.close()


def test_a_read_only_disk_is_one_line(tmp_path, monkeypatch):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)

    def refused(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(checkpoints, "save_file", refused)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(StoreError, match=r"round 2 .*Read-only file system.*--resume at round 2"):
        commit(store, 2)
    store.close()


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)
    (tmp_path / "round-000001.safetensors").unlink()
    (tmp_path / "round-000001.safetensors").mkdir()
    commit(store, 2)
    commit(store, 3)
    assert store.next_round() == 4
    store.close()


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_every_file_has_the_mode_that_the_umask_allows(tmp_path, mask):
    before = os.umask(mask)
    try:
        store = Store.create(tmp_path, config("owners-mean"), "serve")
        commit(store, 1)
        store.write_model(cnn(), {"w": torch.zeros(1)})
        (tmp_path / "plain").touch()
        store.close()
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    for name in ("round-000001.safetensors", "model.safetensors"):
        assert modes[name] == modes["plain"] == 0o666 & ~mask


def test_what_a_kill_while_writing_left_is_deleted(tmp_path):
    """The draft of safetensors, and ours, by a run that goes on; not by who only reads."""
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)
    store.close()
    for name in (".tmpa1B2c3", "round-000002.safetensors.new", ".tmp-of-somebody"):
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / "round-000002.safetensors.new").chmod(0o600)
    again = Store.resume(tmp_path)
    assert (tmp_path / ".tmpa1B2c3").exists(), "the run may be in progress: its own draft"
    commit(again, 2)
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".tmp-of-somebody", "round-000001.safetensors", "round-000002.safetensors", "run.sqlite",
    ]  # fmt: skip
    plain = (tmp_path / ".tmp-of-somebody").stat().st_mode
    assert (tmp_path / "round-000002.safetensors").stat().st_mode == plain


def test_truncated_checkpoint_is_a_clear_error(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    commit(store, 1)
    (tmp_path / "round-000001.safetensors").write_bytes(b"abc")
    with pytest.raises(StoreError, match="cannot be read"):
        store.load_checkpoint()
    store.close()


def test_a_deleted_run_leaves_nothing_behind(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    for number in (1, 2, 3):
        commit(store, number)
    for end in ("-wal", "-shm"):  # as a kill leaves them
        (tmp_path / f"run.sqlite{end}").rename(tmp_path / f"kept{end}")
    store.close()
    (tmp_path / "run.sqlite").unlink()
    for end in ("-wal", "-shm"):
        (tmp_path / f"kept{end}").rename(tmp_path / f"run.sqlite{end}")
    fresh = Store.create(tmp_path, config("owners-mean"), "serve")
    assert fresh.next_round() == 1
    commit(fresh, 1)
    commit(fresh, 2)
    assert fresh.load_checkpoint()["w"].item() == 2.0, "old checkpoints do not push new ones out"
    fresh.close()


def test_wrong_folders_say_so(tmp_path):
    with pytest.raises(StoreError, match="holds no run"):
        Store.resume(tmp_path / "nothing")
    Store.create(tmp_path / "a", config("owners-mean"), "serve").close()
    with pytest.raises(StoreError, match="--resume"):
        Store.create(tmp_path / "a", config("owners-mean"), "serve")
    db = sqlite3.connect(tmp_path / "a" / "run.sqlite")
    with db:
        db.execute("UPDATE runs SET version = 99")
    db.close()
    with pytest.raises(StoreError, match="format 99, this is format 3"):
        Store.resume(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(StoreError):
        Store.resume(tmp_path / "b")


def test_a_folder_that_cannot_be_looked_at_is_one_line(tmp_path):
    long = tmp_path / ("x" * 300)  # of no file system's names: even root cannot look at it
    for open_run in (Store.resume, lambda path: Store.create(path, config("owners-mean"), "serve")):
        with pytest.raises(StoreError, match="cannot be looked at: File name too long; give"):
            open_run(long)


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot start a run"):
        Store.create(tmp_path / "file" / "run", config("owners-mean"), "serve")


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


def test_failing_client_is_counted_and_the_round_goes_on(tmp_path):
    shards = {"a": examples(12), "b": examples(2)}  # b is too small to train
    store = Store.create(tmp_path, config("owners-mean", rounds=1), "emulate")
    reports = []
    method = make_method(store.config)
    clients = InProcessCohort(shards, {"a": 1, "b": 1}, 3)
    run_rounds(store, method, clients, None, report=reports.append)
    assert (reports[0].totals.returned, reports[0].totals.failures) == (1, 1)
    population = Population(clients=2, groups=(2,), split="iid", alpha=0.5)
    write_json(store, population, tmp_path / "out" / "x.json", {"more": 1})
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


# -- rounds that were begun, and who counted ---------------------------------------------------


def test_participants_of_a_round_outlive_a_kill(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    a, b = client("a", 1), client("b", 2)
    assert store.begun(1) == ([], 0)
    store.begin(1, [a])
    store.begin(1, [b])  # of the same round, which lacked updates
    store._db.close()  # killed here
    again = Store.resume(tmp_path)
    assert again.begun(2) == ([], 0), "of another round"
    assert again.begun(1) == ([a, b], 1), "one was chosen"
    again.begin(1, [a, b])
    assert again.begun(1)[1] == 1
    _, totals = commit(again, 1)
    assert totals.chosen == 2
    assert again.begun(2) == ([], 0)
    again.begin(2, [b])
    _, totals = commit(again, 2)
    assert totals.chosen == 1, "of this round only"
    again.close()


def test_begun_round_that_cannot_be_read_begins_anew(tmp_path, caplog):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    store.begin(1, [client("a", 1)])
    path = tmp_path / BEGUN
    path.write_bytes(path.read_bytes()[:-2])
    assert store.begun(1) == ([], 0)
    assert "the round begins anew" in caplog.text
    store.close()


def test_full_disk_as_a_round_begins_is_one_line(tmp_path, monkeypatch):
    store = Store.create(tmp_path, config("owners-mean"), "serve")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(StoreError, match=r"begun.json .*No space left.*--resume at round 1") as it:
        store.begin(1, [client("a", 1)])
    assert "\n" not in str(it.value)
    store.close()


def test_job_was_counted_once_its_round_is_committed(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    list(store.recording(1, [update(client("a", 1), job="1" * 32, digest="d" * 32)]))
    assert not store.was_counted("1" * 32), "not final yet"
    commit(store, 1)
    assert store.was_counted("1" * 32)
    assert not store.was_counted("2" * 32)
    assert not store.was_counted("")
    store.close()


def test_late_update_and_the_own_one_of_a_client_are_both_recorded(tmp_path):
    store = Store.create(tmp_path, config("owners-mean"), "serve")
    a = client("a", 1)
    late = update(a, job="1" * 32, round=1, staleness=1)
    failed = Absence(a, (Segment(first=1, last=2),), "failed", "gone", "left")
    own = update(a, job="2" * 32, round=2)
    passed, totals = commit(store, 2, results=[late, failed, own])
    assert [u.staleness for u in passed] == [1, 0]
    assert (totals.returned, totals.failures) == (2, 0), "it failed, and returned when asked again"
    assert store.was_counted("1" * 32)
    assert store.was_counted("2" * 32)
    store.close()


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
