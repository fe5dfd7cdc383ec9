"""Robust aggregation and clipping: numbers by hand, properties, and a run with a harmful client."""

from __future__ import annotations

import dataclasses
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from coordinator import robust
from coordinator.cohort import Absence, ClientUpdate, InProcessCohort
from coordinator.config import AggregationOptions, GeneratorOptions, checked
from coordinator.credit import Credit
from coordinator.desk import Desk
from coordinator.methods import Metrics, make_method
from coordinator.methods.clipping import MEMORY, NormClip
from coordinator.robust import make_kernel
from coordinator.spool import Arrived, Spool
from edge_sdk.data import load_dataset
from edge_sdk.errors import ConfigError, ShapeError
from edge_sdk.tensors import Sender
from edge_sdk.wire import ExitResult, Update
from tests.helpers import answer, client, config, examples
from tools.bench_robust import accuracy

ROBUST = ("trimmed-mean", "median", "norm-bounded")
TRIMMED = AggregationOptions(rule="trimmed-mean", trim=0.25)


def options_of(rule: str, trim: float = 0.1) -> AggregationOptions:
    return AggregationOptions(rule=rule, trim=trim)


def aggregate(options, updates, sent):
    """updates: (values, weight) of the only tensor."""
    kernel = make_kernel(options)
    for values, weight in updates:
        kernel.add_({"w": torch.tensor(values)}, weight)
    return kernel.result({"w": torch.tensor(sent)})["w"].tolist()


# --- rules, by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "trim", "want"), [
    (5, 0.0, 220.0),  # (1 + 2 + 3 + 94 + 1000) / 5
    (5, 0.1, 33.0),  # one at each end: (2 + 3 + 94) / 3
    (5, 0.4, 3.0),  # two at each end
    (5, 0.49, 3.0),  # three would leave nothing: the median
    (4, 0.4, 2.5),  # two would leave nothing: (2 + 3) / 2
    (2, 0.1, 1.5),
    (1, 0.49, 1.0),
])  # fmt: skip
def test_trimmed_mean_by_hand(n, trim, want):
    values = [1.0, 2.0, 3.0, 94.0, 1000.0][:n]
    found = aggregate(options_of("trimmed-mean", trim), [([v], 1.0) for v in values], [0.0])
    assert found == [want]


def test_coordinates_are_trimmed_each_by_itself():
    # columns: 1 2 9 -> 2; 7 -5 0 -> 0
    updates = [([1.0, 7.0], 1.0), ([2.0, -5.0], 1.0), ([9.0, 0.0], 1.0)]
    assert aggregate(TRIMMED, updates, [0.0, 0.0]) == [2.0, 0.0]


def test_shares_that_are_no_binary_numbers_are_not_rounded_up():
    # 0.07 * 100 is 7.000000000000001 in floats: 7 at each end, so 8 large ones of 100 shine through
    updates = [([0.0], 1.0)] * 92 + [([86.0], 1.0)] * 8
    assert aggregate(options_of("trimmed-mean", 0.07), updates, [0.0]) == [1.0]  # 86 / 86


def test_median_by_hand():
    three = [([1.0, 5.0], 1.0), ([1e30, 4.0], 1.0), ([2.0, -1e30], 1.0)]
    assert aggregate(options_of("median"), three, [0.0, 0.0]) == [2.0, 4.0]
    assert aggregate(options_of("median"), [*three, ([4.0, 6.0], 1.0)], [0.0, 0.0]) == [3.0, 4.5]
    assert aggregate(options_of("median"), three[:2], [0.0, 0.0]) == pytest.approx([5e29, 4.5])


def test_norm_bounded_by_hand():
    # sent (1, 1); movements (3, 4), (0, 5), (600, 800): norms 5, 5, 1000, the median 5, so the last
    # becomes (3, 4). Weights 1, 2, 1: (3 + 0 + 3, 4 + 10 + 4) / 4 = (1.5, 4.5)
    updates = [([4.0, 5.0], 1.0), ([1.0, 6.0], 2.0), ([601.0, 801.0], 1.0)]
    found = aggregate(options_of("norm-bounded"), updates, [1.0, 1.0])
    assert found == pytest.approx([2.5, 5.5])


def test_one_of_two_owners_does_not_lift_the_bound():
    # norms 1 and 1000: both to 1
    updates = [([1.0], 1.0), ([-1000.0], 1.0)]
    assert aggregate(options_of("norm-bounded"), updates, [0.0]) == pytest.approx([0.0])
    assert aggregate(options_of("mean"), updates, [0.0]) == [-499.5]


@pytest.mark.parametrize("rule", ROBUST)
def test_an_infinite_value_that_came_after_the_border_has_no_influence(rule):
    """A late update brought forward may overflow: what moved infinitely far counts as unmoved, or
    is left out."""
    updates = [([1.0, 1.0], 1.0), ([math.inf, 1.0], 1.0), ([1.0, 1.0], 1.0)]
    want = 2 / 3 if rule == "norm-bounded" else 1.0
    assert aggregate(options_of(rule), updates, [0.0, 0.0]) == pytest.approx([want, want])


@pytest.mark.parametrize("rule", ["trimmed-mean", "median"])
def test_coordinate_wise_rules_ignore_weights_but_report_them(rule):
    kernel = make_kernel(options_of(rule))
    for value, weight in ((1.0, 1.0), (2.0, 1.0), (1e6, 1e6)):
        kernel.add_({"w": torch.tensor([value])}, weight)
    kernel.add_({"other": torch.zeros(1)}, 5.0)
    for _ in range(2):  # before and after the first result
        assert (kernel.weight("w"), kernel.weight("other"), kernel.weight("?")) == (1e6 + 2, 5, 0)
        found = kernel.result({"w": torch.zeros(1), "other": torch.ones(1)})
        assert (found["w"].item(), found["other"].item()) == (2.0, 0.0)


@pytest.mark.parametrize("rule", ROBUST)
def test_tensors_have_only_their_owners(rule):
    """One owner gives its value, nobody keeps the old one, whatever those without it bring."""
    kernel = make_kernel(options_of(rule))
    kernel.add_({"a": torch.tensor([7.0]), "b": torch.tensor([0.1])}, 3)
    for value in (8.0, 9.0):
        kernel.add_({"a": torch.tensor([value])}, 1)
    old = {"a": torch.tensor([7.5]), "b": torch.tensor([5.0]), "c": torch.tensor([6.0])}
    new = kernel.result(old)
    assert torch.equal(new["b"], torch.tensor([0.1]))
    assert new["c"] is old["c"]
    assert list(new) == list(old)


@pytest.mark.parametrize("rule", ROBUST)
def test_counters_take_the_largest_and_halves_are_wide(rule):
    kernel = make_kernel(options_of(rule))
    for number, half in ((3, 2048.0), (9, 2050.0), (4, 2050.0)):
        kernel.add_({"n": torch.tensor(number), "h": torch.tensor([half]).half()}, 1)
    new = kernel.result({"n": torch.tensor(0), "h": torch.tensor([2048.0]).half()})
    assert new["n"].item() == 9
    assert new["h"].dtype == torch.float16
    assert new["h"].item() == (2050.0 if rule == "median" else pytest.approx(2049, abs=1))


@pytest.mark.parametrize("rule", ROBUST)
def test_refusals_and_weight_zero(rule):
    kernel = make_kernel(options_of(rule))
    with pytest.raises(ValueError, match="negative"):
        kernel.add_({"w": torch.zeros(1)}, -1)
    kernel.add_({"w": torch.ones(1)}, 0)
    old = {"w": torch.zeros(1)}
    assert kernel.result(old)["w"] is old["w"]
    kernel = make_kernel(options_of(rule))
    kernel.add_({"w": torch.zeros(2)}, 1)
    with pytest.raises(ShapeError, match=r"w is \(2,\), expected \(1,\)"):
        kernel.result(old)


@pytest.mark.parametrize("rule", ROBUST)
def test_generated_tensors_are_folded_into_the_result_with_the_owners_weight(rule):
    # aggregate 2 of owners that weigh 3 in all; 10 with weight 1 on top: (3 * 2 + 10) / 4 = 4
    kernel = make_kernel(options_of(rule))
    for value in (1.0, 2.0, 3.0):
        kernel.add_({"w": torch.tensor([value])}, 1)
    sent = {"w": torch.zeros(1)}
    owners = kernel.result(sent)["w"].item()
    kernel.add_({"w": torch.tensor([10.0])}, 1)
    assert kernel.result(sent)["w"].item() == pytest.approx((3 * owners + 10) / 4)
    assert kernel.weight("w") == 4
    assert owners == pytest.approx(5 / 3 if rule == "norm-bounded" else 2.0)  # 1 + 2 + 2 over 3


def test_chunks_do_not_show(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    tensors = [torch.randn(7, 13, generator=rng) for _ in range(5)]
    sent = {"w": torch.zeros(7, 13)}

    def all_rules():
        found = []
        for rule in ROBUST:
            kernel = make_kernel(options_of(rule))
            for tensor in tensors:
                kernel.add_({"w": tensor}, 1)
            found.append(kernel.result(sent)["w"])
        return found

    whole = all_rules()
    monkeypatch.setattr(robust, "CHUNK_BYTES", 100)  # 5 columns of 5 owners
    monkeypatch.setattr(robust, "COLUMNS", 10)
    for one, other in zip(whole, all_rules(), strict=True):
        assert torch.allclose(one, other, rtol=1e-6, atol=0)
    assert torch.equal(whole[1], torch.stack(tensors).median(0).values)


@pytest.mark.parametrize("rule", ROBUST)
def test_updates_may_be_freed_after_the_result(rule):
    kernel = make_kernel(options_of(rule))
    tensor = torch.ones(3)
    kernel.add_({"w": tensor}, 1)
    freed = weakref.ref(tensor)
    del tensor
    assert freed() is not None
    kernel.result({"w": torch.zeros(3)})
    assert freed() is None


def test_memory_beside_the_updates_is_a_chunk(monkeypatch):
    """No array of all owners' entries is made: the largest stack has CHUNK_BYTES."""
    stacked, stack = [], torch.stack

    def watched(rows, *args):
        made = stack(rows, *args)
        stacked.append(made.nbytes)
        return made

    monkeypatch.setattr(robust.torch, "stack", watched)
    monkeypatch.setattr(robust, "CHUNK_BYTES", 4096)
    for n in (3, 50):
        robust.median([torch.zeros(10_000)] * n, [1.0] * n, torch.zeros(10_000))
    assert max(stacked) <= 4096
    assert len(stacked) > 100


# --- rules, properties ------------------------------------------------------------------------

finite = st.floats(-(2.0**100), 2.0**100, width=32)
cohorts = st.integers(1, 9).flatmap(
    lambda n: st.lists(st.lists(finite, min_size=3, max_size=3), min_size=n, max_size=n)
)


def value_of(options, rows, sent=(0.0, 0.0, 0.0)):
    return np.array(aggregate(options, [(row, 1.0) for row in rows], list(sent)), np.float32)


every_coordinate_wise = st.one_of(
    st.floats(0, 0.49).map(lambda trim: options_of("trimmed-mean", trim)),
    st.just(options_of("median")),
)


@settings(deadline=None)
@given(cohorts, every_coordinate_wise, st.randoms())
def test_coordinate_wise_rules_have_no_order_and_stay_in_the_range(rows, options, random):
    found = value_of(options, rows)
    mixed = random.sample(rows, len(rows))
    assert np.array_equal(found, value_of(options, mixed))
    values = np.array(rows, np.float32)
    assert (values.min(0) <= found).all()
    assert (found <= values.max(0)).all()


@settings(deadline=None)
@given(st.lists(finite, min_size=3, max_size=3), st.integers(1, 9), st.sampled_from(ROBUST))
def test_identical_owners_give_themselves_to_the_bit(row, n, rule):
    assert value_of(options_of(rule), [row] * n).tolist() == row
    assert value_of(options_of(rule), [row] * n, sent=(1.0, -2.0, 3.0)).tolist() == row


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=5, max_size=9),
    st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=2),
    st.sampled_from(["trimmed-mean", "median"]),
)
def test_a_minority_cannot_leave_the_honest_range(honest, harmful, rule):
    """Harmful ones are at most `trim` of all, so at each end at least as many are left out."""
    trim = len(harmful) / (len(honest) + len(harmful))
    found = value_of(options_of(rule, trim), honest + harmful)
    values = np.array(honest, np.float32)
    assert (values.min(0) <= found).all()
    assert (found <= values.max(0)).all()


@settings(deadline=None)
@given(
    st.lists(st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3), min_size=5, max_size=9),
    st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=2),
)
def test_a_minority_moves_no_further_than_the_honest_with_bounded_norms(honest, harmful):
    found = value_of(options_of("norm-bounded"), honest + harmful)
    assert np.linalg.norm(found) <= 1.0001 * max(map(np.linalg.norm, honest)) + 1e-30


@pytest.mark.parametrize("rule", ROBUST)
def test_identical_doubles_give_themselves_too(rule):
    """(0.1 + 0.1 + 0.1) / 3 is 0.10000000000000002 in float64."""
    tensor = torch.tensor([0.1], dtype=torch.float64)
    kernel = make_kernel(options_of(rule, 0.0))
    for _ in range(3):
        kernel.add_({"w": tensor.clone()}, 1)
    assert torch.equal(kernel.result({"w": torch.zeros_like(tensor)})["w"], tensor)


def test_the_plain_mean_breaks_down():
    honest, harmful = [[1.0, 2.0, 3.0]] * 9, [[1e30, -1e30, 1e30]]
    assert abs(value_of(options_of("mean"), honest + harmful)).max() > 1e28
    for rule in ROBUST:
        assert abs(value_of(options_of(rule), honest + harmful)).max() < 4


# --- clipping, by hand ------------------------------------------------------------------------

SENT = {
    "stages.0.0.weight": torch.zeros(2),
    "exits.0.0.bias": torch.zeros(1),
    "stages.0.1.running_mean": torch.zeros(1),
    "stages.0.1.num_batches_tracked": torch.tensor(0),
    "stages.1.0.weight": torch.zeros(1),
}
PARAMETERS = ("stages.0.0.weight", "exits.0.0.bias", "stages.1.0.weight")
JOB = make_method(config("owners-mean")).assign(client("a", 1), 1)


def moved(name, size, statistic=1.0, deep=None):
    """Stage 1 moved by `size` (2, 2, 1 have norm 3), its statistic, and stage 2 if `deep`."""
    tensors = {
        "stages.0.0.weight": size * torch.tensor([2.0, 2.0]) / 3,
        "exits.0.0.bias": size * torch.ones(1) / 3,
        "stages.0.1.running_mean": torch.tensor([statistic]),
        "stages.0.1.num_batches_tracked": torch.tensor(5),
    }
    if deep is not None:
        tensors["stages.1.0.weight"] = torch.tensor([deep])
    return dataclasses.replace(answer(client(name, 1), JOB), tensors=tensors)


def clip_round(clip, round, *updates):
    """What comes out, in that order, and how many were clipped."""
    metrics = Metrics()
    out = list(clip.clipped(round, updates, SENT, metrics))
    return out, metrics.values["clipped_updates"]


def size_of(update):
    names = ("stages.0.0.weight", "exits.0.0.bias")
    return math.sqrt(sum(float(update.tensors[name].square().sum()) for name in names))


def test_clip_to_the_median_of_earlier_rounds():
    clip = NormClip(2.0, PARAMETERS, 2, seed=0)
    clip_round(clip, 1, moved("a", 1.0), moved("b", 3.0), moved("c", 2.0))
    # the median is 2, so up to 4 passes; the round's own norms do not count yet
    out, count = clip_round(clip, 2, moved("a", 100.0), moved("b", 4.0), moved("c", 5.0))
    assert [size_of(update) for update in out] == pytest.approx([4.0, 4.0, 4.0])
    assert count == 2
    small = moved("a", 1.0)
    out, count = clip_round(clip, 3, small)
    assert out[0] is small
    assert count == 0
    # norms as they came are remembered: 1 1 2 3 4 5 100, the median 3, twice that 6
    out, _ = clip_round(clip, 4, moved("d", 1e30))
    assert size_of(out[0]) == pytest.approx(6.0)


def test_first_round_is_clipped_by_its_own_median_whatever_the_order():
    updates = [moved("a", 1e6), moved("b", 1.0), moved("c", 2.0)]
    for given_order in (updates, updates[::-1]):
        clip = NormClip(1.0, PARAMETERS, 2, seed=0)
        out, count = clip_round(clip, 1, *given_order)
        assert {u.client.id: round(size_of(u), 5) for u in out} == {"a": 2.0, "b": 1.0, "c": 2.0}
        assert count == 1
        assert sorted(clip.norms[0, 0][-3:].tolist()) == pytest.approx([1.0, 2.0, 1e6])


def test_a_first_update_alone_is_not_clipped():
    alone = moved("a", 1e6)
    out, count = clip_round(NormClip(1.0, PARAMETERS, 2, seed=0), 1, alone)
    assert out[0] is alone
    assert count == 0


def test_stages_are_clipped_each_by_itself():
    clip = NormClip(1.0, PARAMETERS, 2, seed=0)
    clip_round(clip, 1, moved("a", 1.0, deep=50.0))
    out, count = clip_round(clip, 2, moved("a", 1.0, deep=500.0), moved("b", 9.0, deep=-50.0))
    assert [update.tensors["stages.1.0.weight"].item() for update in out] == [50.0, -50.0]
    assert [size_of(update) for update in out] == pytest.approx([1.0, 1.0])
    assert count == 2


def test_a_stage_without_memory_waits_for_its_round_the_others_do_not():
    clip = NormClip(1.0, PARAMETERS, 2, seed=0)
    clip_round(clip, 1, moved("a", 1.0))
    deep = [moved("b", 1.0, deep=1.0), moved("c", 1.0, deep=1e6), moved("d", 1.0, deep=2.0)]
    out, _ = clip_round(clip, 2, *deep, moved("e", 7.0))
    assert [update.client.id for update in out] == ["e", "b", "c", "d"]
    assert size_of(out[0]) == pytest.approx(1.0)
    assert out[2].tensors["stages.1.0.weight"].item() == pytest.approx(2.0)


def test_statistics_have_their_own_median_and_counters_none():
    clip = NormClip(1.0, PARAMETERS, 2, seed=0)
    clip_round(clip, 1, moved("a", 1.0, statistic=4.0))
    out, count = clip_round(clip, 2, moved("a", 1.0, statistic=-1e6), moved("b", 10.0, 4.0))
    found = [update.tensors["stages.0.1.running_mean"].item() for update in out]
    assert found == pytest.approx([-4.0, 4.0])
    assert [size_of(update) for update in out] == pytest.approx([1.0, 1.0])
    assert all(update.tensors["stages.0.1.num_batches_tracked"] == 5 for update in out)
    assert count == 2


def test_memory_has_the_last_updates_in_an_order_of_its_own():
    updates = [moved(f"c{i:03d}", float(i + 1)) for i in range(MEMORY + 36)]
    clips = [NormClip(1.0, PARAMETERS, 2, seed=0) for _ in range(2)]
    clip_round(clips[0], 1, *updates)
    clip_round(clips[1], 1, *updates[::-1])
    assert torch.equal(clips[0].norms, clips[1].norms)
    kept = clips[0].norms[0, 0].clone()
    assert len(set(kept.tolist())) == MEMORY
    assert kept.min() < 20  # a draw, not those whose names come last
    clip_round(clips[0], 2, moved("x", 1e3))
    assert clips[0].norms[0, 0, -1].item() == pytest.approx(1e3)
    assert torch.equal(clips[0].norms[0, 0, :-1], kept[1:])
    assert (clips[0].norms[1] == -1).all()


def test_clipping_the_largest_floats_stays_finite():
    clip = NormClip(1.0, PARAMETERS, 2, seed=0)
    clip_round(clip, 1, moved("a", 3.0))
    sent = SENT | {"stages.0.0.weight": torch.full((2,), -3e38)}
    huge = moved("b", 1.0)
    huge.tensors["stages.0.0.weight"] = torch.full((2,), 3e38)
    (out,) = clip.clipped(2, [huge], sent, Metrics())
    assert torch.isfinite(out.tensors["stages.0.0.weight"]).all()


# --- in a method ------------------------------------------------------------------------------


def test_training_that_diverges_in_this_process_is_an_absence():
    """The network's border has its own test; emulating processes run this same function. The loss
    of the only step is fine, what it makes of the weights is not."""
    method = make_method(config("owners-mean"))
    cohort = InProcessCohort({name: examples(8) for name in "ab"}, {"a": 1, "b": 1}, 3)
    work = {who.id: method.assign(who, 1) for who in cohort.clients()}
    plan = replace(work["b"].plan, optimizer="sgd", lr=3e38, weight_decay=100.0)
    work["b"] = dataclasses.replace(work["b"], plan=plan)
    good, bad = cohort.train(work, 1, 0.0)
    assert isinstance(good, ClientUpdate)
    assert isinstance(bad, Absence)
    assert "NaN or infinite" in bad.detail
    assert method.aggregate(1, [good]).num_updates == 1


@pytest.mark.parametrize(("value", "counts"), [(1.0, True), (math.nan, False), (math.inf, False)])
def test_update_that_is_not_finite_does_not_come_back_from_the_spool(tmp_path, value, counts):
    """Whole and with the right digest, as after a restart of the coordinator."""
    method, sent, spool = make_method(config("fedavg-s")), [], Spool(tmp_path)
    who = dataclasses.replace(client("a", 1), num_examples=10)
    job = method.assign(who, 1)

    def desk():
        return Desk(
            "run", spool, Credit(2**20), lambda name, message, _: bool(sent.append(message))
        )

    desk().give(who, job, 1, 0.0)
    trained = {spec.name: job.tensors[spec.name] for spec in job.returns}
    name = "exits.0.2.bias"
    stream = Sender(trained | {name: torch.full_like(trained[name], value)})
    update = Update(
        job=sent[0].id, digest=stream.digest(), round=1, num_examples=10, num_steps=1, phases={},
        exits=(ExitResult(exit=1, loss=1.0, accuracy=0.5),), peak_memory_bytes=0,
        tensors=stream.specs,
    )  # fmt: skip
    spool.storage(1, "a")(stream.total_bytes).write(0, stream.part(0))
    arrived = Arrived(
        update=update, segments=job.plan.segments, upload_s=0.0, bytes_down=0, bytes_up=0
    )
    spool.keep(1, "a", arrived)
    resumed = desk()
    resumed.give(who, job, 1, 0.0)
    assert [type(found) for found in resumed.finished] == [ClientUpdate] * counts
    assert (sent[-1] == sent[0]) != counts  # the job once more, or Accepted


@pytest.mark.parametrize("rule", ROBUST)
def test_a_round_clipped_and_robust_leaves_out_who_is_far_away(rule):
    """Of four clients that move by 1 one moves by 1e6: the model moves by about 1."""
    options = AggregationOptions(rule=rule, clip=2.0)
    method = make_method(config("fedavg-l", aggregation=options))
    before = method.current()
    jobs = {who: method.assign(client(who, 3), 1) for who in "abcd"}
    shifts = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 1e6}
    updates = [answer(client(who, 3), job, shift=shifts[who]) for who, job in jobs.items()]
    metrics = method.aggregate(1, updates)
    assert metrics.values["clipped_updates"] == 1
    for name, tensor in method.current().items():
        if tensor.is_floating_point():
            assert torch.allclose(tensor, before[name] + 1, atol=1e-3), name
    assert method.state_dict()["clip"].shape == (3, 2, MEMORY)


def test_settings_reach_the_method_and_are_checked():
    for changes, flag in (
        ({"trim": 0.5}, "--trim is 0.5"), ({"clip": -1.0}, "--clip is -1.0"),
        ({"rule": "mode"}, "--aggregation is 'mode'"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=flag):
            checked(config("owners-mean", aggregation=AggregationOptions(**changes)))


def test_gain_keeps_its_meaning_under_a_robust_rule():
    """Generated tensors count as gain x their weight beside the owners' whole weight: with a gain
    of 0 the result is the rule's alone."""
    cohort = [client("a", 1), client("b", 1), client("c", 3), client("d", 3)]
    results = {}
    for gain in (0.0, 1.0):
        generator = GeneratorOptions(
            name="svd-mlp", gain=gain, rank=4, hidden=8, epochs=1, generate="conv"
        )
        method = make_method(
            config("hypemefed", generator=generator, aggregation=options_of("median"))
        )
        updates = [answer(who, method.assign(who, 1)) for who in cohort]
        sent = method.current()
        method.aggregate(1, updates)
        results[gain] = method.current()
    name = "stages.1.0.weight"
    owners = torch.stack([update.tensors[name] for update in updates[2:]]).mean(0)
    assert torch.allclose(results[0.0][name], owners, atol=1e-6)
    assert not torch.allclose(results[1.0][name], owners, atol=1e-6)
    assert not torch.equal(results[0.0][name], sent[name])


DIGITS: dict[str, AggregationOptions] = {
    "trimmed-mean": options_of("trimmed-mean"),
    "median": options_of("median"),
    "norm-bounded": options_of("norm-bounded"),
    "clip": AggregationOptions(clip=1.0),
}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", 0)


def after_six_rounds(digits, options, harmful=("client-010",)):
    return accuracy(digits, "fedavg-l", options, harmful, rounds=6, factor=1e6)[-1]


@pytest.fixture(scope="module")
def undisturbed(digits):
    return after_six_rounds(digits, AggregationOptions(), harmful=())


def test_one_harmful_client_ruins_the_plain_mean(digits, undisturbed):
    assert undisturbed > 0.6
    assert after_six_rounds(digits, AggregationOptions()) < 0.25  # 0.1 is chance


@pytest.mark.parametrize("protection", DIGITS)
def test_one_harmful_client_does_not_ruin_the_others(digits, undisturbed, protection):
    assert after_six_rounds(digits, DIGITS[protection]) > undisturbed - 0.1
