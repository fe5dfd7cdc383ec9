"""What every task must do: an emulated run learns, an exported model answers as torch does, and
labels that are none are refused in one line. Real devices: test_methods_over_links.py."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace as changed

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from coordinator.cohorts.in_process import InProcessCohort
from coordinator.methods.registry import make_method
from coordinator.runs.rounds import print_round, run_rounds
from coordinator.store.reader import last_rounds
from coordinator.store.store import Store
from edge_sdk.data.examples import check_examples
from edge_sdk.data.loading import load_shard, save_shard
from edge_sdk.errors import ConfigError, DataError
from edge_sdk.infer.early_exit import NEVER, EarlyExit
from edge_sdk.infer.export import export
from edge_sdk.infer.thresholds import choose_thresholds
from edge_sdk.models import build, initial_tensors
from edge_sdk.models.checking import check_family
from edge_sdk.protocol.messages import Plan, Segment
from edge_sdk.tasks.metrics import METRICS
from edge_sdk.tasks.table import TASKS, task_of
from edge_sdk.training.trainer import train
from tests.support.examples import config
from tests.support.task_problems import problem, spec_of

ROUNDS = 4
# At the end of the run: at least, or of an error at most.
LEARNED = {"classify": 0.9, "multilabel": 0.85, "regress": 0.7, "tokens": 0.95}
KEYS = {"classify": "accuracy", "multilabel": "f1", "regress": "rmse", "tokens": "accuracy"}


@pytest.fixture(autouse=True)
def embedded(own_things, monkeypatch):
    """The family of tests/support/tokens_family.py, known in these tests only."""
    module = "tests.support.tokens_family"
    monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(module)


@pytest.fixture(params=METRICS)
def task(request):
    return request.param


def settings_for(task, **changes):
    model = spec_of(problem(task, 10))
    settings = {"rounds": ROUNDS, "epochs": 6, "lr": 0.02, "holdout": 0.2, "model": model}
    return config("stage-rotation", **(settings | changes))


def run(folder, task, **changes):
    """The run's folder and reports, and its method."""
    settings = settings_for(task, **changes)
    shards = {name: problem(task, 60, seed) for seed, name in enumerate("abcd", 1)}
    cohort = InProcessCohort(shards, {"a": 1, "b": 1, "c": 2, "d": 2}, 2)
    store, method, reports = Store.create(folder, settings, "emulate"), make_method(settings), []
    run_rounds(store, method, cohort, problem(task, 80), report=reports.append)
    store.close()
    return reports, method


def test_every_task_has_a_metric():
    assert list(TASKS) == list(METRICS)
    for name, rules in TASKS.items():
        assert rules.metric is METRICS[name]


def test_a_run_learns_and_its_metric_has_its_name(tmp_path, task, capsys):
    metric, key = METRICS[task], KEYS[task]
    reports, _ = run(tmp_path, task)
    before, *_, after = (report.metric[-1] for report in reports)
    assert metric.worse_by(after, LEARNED[task]) <= 0, (before, after)
    assert reports[-1].train_metric[-1] == pytest.approx(LEARNED[task], abs=0.6)
    row = last_rounds(tmp_path, 1)[0]
    assert list(row.metric) == reports[-1].metric
    assert row.task == task
    assert row.holdout_metric == reports[-1].metrics.values[f"holdout_{key}"]
    store = Store.resume(tmp_path)
    (*_, entry) = store.history()
    store.close()
    assert entry.get("perplexity", []) == list(row.perplexity)
    assert bool(row.perplexity) == (task == "tokens")
    print_round(reports[-1])
    said = capsys.readouterr().out
    assert f"{metric.name} per exit " in said
    assert ("perplexity" in said) == (task == "tokens")


def test_training_distils_between_exits_and_its_parts_add_up(task):
    """A batch at once and in parts gives the same update, also with places that do not count."""
    data = problem(task, 24)
    if task == "tokens":
        data.y[::2, :3] = -100  # places that count are not shared equally among the parts
    spec = replace(spec_of(data), family="embedded" if data.vocabulary else "mlp")
    plan = Plan(segments=(Segment(first=1, last=2),), batch_size=24, optimizer="sgd", lr=0.1)
    if not data.vocabulary:  # BatchNorm would see the parts
        data = changed(data, x=data.x[:, :, None])
        spec = replace(spec, input_shape=(4, 1), family="lstm", options={"hidden": 5})
    whole = train(spec, plan, initial_tensors(spec, 0), data)
    parts = train(spec, replace(plan, micro_batch=7), initial_tensors(spec, 0), data)
    for name, tensor in whole.tensors.items():
        assert torch.allclose(tensor, parts.tensors[name], atol=1e-6), name
    taught = replace(plan, distill="deep-to-shallow", distill_weight=3.0)
    other = train(spec, taught, initial_tensors(spec, 0), data).tensors
    bias = max(name for name in other if name.startswith("exits.0.") and name.endswith("bias"))
    assert not torch.equal(other[bias], whole.tensors[bias])


def test_export_and_early_exit_answer_as_torch(tmp_path, task):
    data = problem(task, 40)
    spec, rules = spec_of(data), task_of(task)
    plan = Plan(segments=(Segment(first=1, last=2),), epochs=20, lr=0.02)
    tensors = initial_tensors(spec, 0) | train(spec, plan, initial_tensors(spec, 0), data).tensors
    made = export(spec, tensors, tmp_path / "model", examples=data)
    assert made.spec.task == task
    model = build(spec)
    model.load(tensors)
    with torch.no_grad():
        exits = [found.numpy() for found in model.eval()(torch.from_numpy(data.x))]
    last = EarlyExit.load(tmp_path / "model").predict(data.x)
    assert last.exit.tolist() == [2] * 40
    assert last.label == pytest.approx(rules.answers(exits[1]), abs=1e-4)
    first = EarlyExit.load(tmp_path / "model", threshold=0.0).predict(data.x)
    assert first.exit.tolist() == [1] * 40
    assert first.label == pytest.approx(rules.answers(exits[0]), abs=1e-4)
    chosen = choose_thresholds(tmp_path / "model", data.x, data.y, metric_loss=0.0)
    assert chosen.deepest_metric == pytest.approx(
        rules.figure(rules.counts(rules.answers(exits[1]), data.y).sum(0)), abs=1e-4
    )
    assert METRICS[task].worse_by(chosen.metric, chosen.deepest_metric) <= 1e-9
    assert chosen.measure == METRICS[task].measures[0]
    engine = EarlyExit.load(tmp_path / "model", threshold=0.9)
    some = engine.predict(data.x)
    alone = [engine.predict(data.x[i : i + 1]) for i in range(40)]
    assert some.exit.tolist() == [int(one.exit[0]) for one in alone]
    assert ((some.confidence >= 0.9) | (some.exit == 2)).all()
    assert some.confidence.max() < NEVER


def test_a_shard_comes_back_bit_by_bit(tmp_path, task):
    data = problem(task, 7)
    save_shard(tmp_path / "a.npz", data)
    again = load_shard(str(tmp_path / "a.npz"))
    for name in ("x", "y"):
        assert np.array_equal(getattr(again, name), getattr(data, name))
        assert getattr(again, name).dtype == getattr(data, name).dtype
    told = ("num_classes", "task", "vocabulary", "input_shape", "scaling")
    assert [getattr(again, n) for n in told] == [getattr(data, n) for n in told]


def test_labels_of_another_number_of_examples_are_refused(task):
    data = problem(task, 9)
    with pytest.raises(DataError, match=r"got y of shape .*, expected ") as refused:
        check_examples(changed(data, y=data.y[1:]), "here")
    assert str(refused.value).startswith("here: ")
    assert "\n" not in str(refused.value)


def test_data_of_another_task_do_not_train(task):
    other = "regress" if task != "regress" else "classify"
    data, spec = problem(other, 12), spec_of(problem(task, 12))
    plan = Plan(segments=(Segment(first=1, last=2),))
    if data.vocabulary or spec.vocabulary:
        spec = replace(spec, input_shape=data.input_shape)
    with pytest.raises(DataError, match=f"for the task {other}"):
        train(spec, plan, initial_tensors(spec, 0), data)


def test_the_family_is_tried_with_the_tasks_outputs():
    spec = spec_of(problem("tokens", 10))
    check_family(spec)
    with pytest.raises(
        ConfigError, match=r"has no task 'tokens', only classify.*; take .*llama or"
    ):
        build(replace(spec, family="mlp", vocabulary=0))
    with pytest.raises(ConfigError, match="'mlp' takes floats, got token ids of a vocabulary of 6"):
        build(replace(spec_of(problem("regress", 10)), vocabulary=6))
    for task in ("classify", "multilabel", "regress"):  # of texts
        check_family(replace(spec, task=task))


@pytest.mark.parametrize("task", ["classify", "tokens"])
def test_one_class_is_none(task):
    with pytest.raises(ConfigError, match="got 1 class"):
        build(replace(spec_of(problem(task, 10)), num_classes=1))


@pytest.mark.parametrize(
    ("method", "task", "said"),
    [
        ("lotteryfl", "regress", "--method lotteryfl is for the task classify or multilabel or "),
        ("feddf", "multilabel", "--method feddf is for the task classify, these data are for mul"),
    ],
)
def test_methods_of_other_tasks_are_refused(method, task, said):
    settings = config(method, model=spec_of(problem(task, 10)), holdout=0.2)
    with pytest.raises(ConfigError, match=said):
        make_method(settings)


def test_an_adjustment_for_classes_is_refused_elsewhere():
    """But for a method's own default, which does not count there."""
    model = spec_of(problem("regress", 10))
    settings = config("hypemefed", model=model, logit_adjustment=0.5)
    with pytest.raises(ConfigError, match=r"--logit-adjustment 0\.5 is for classes, these data"):
        make_method(settings)
    assert make_method(replace(settings, logit_adjustment=1.0)).offer().plan.logit_adjustment == 0
