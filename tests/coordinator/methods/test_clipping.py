"""Clipping of updates to the median norm, by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from coordinator.aggregation.movement import MEMORY
from coordinator.methods.base import Metrics
from coordinator.methods.clipping import NormClip
from coordinator.methods.registry import make_method
from tests.support.examples import answer, client, config

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
        assert sorted(clip.memory.norms[0, 0][-3:].tolist()) == pytest.approx([1.0, 2.0, 1e6])


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
    assert torch.equal(clips[0].memory.norms, clips[1].memory.norms)
    kept = clips[0].memory.norms[0, 0].clone()
    assert len(set(kept.tolist())) == MEMORY
    assert kept.min() < 20  # a draw, not those whose names come last
    clip_round(clips[0], 2, moved("x", 1e3))
    assert clips[0].memory.norms[0, 0, -1].item() == pytest.approx(1e3)
    assert torch.equal(clips[0].memory.norms[0, 0, :-1], kept[1:])
    assert (clips[0].memory.norms[1] == -1).all()


def test_clipping_the_largest_floats_stays_finite():
    clip = NormClip(1.0, PARAMETERS, 2, seed=0)
    clip_round(clip, 1, moved("a", 3.0))
    sent = SENT | {"stages.0.0.weight": torch.full((2,), -3e38)}
    huge = moved("b", 1.0)
    huge.tensors["stages.0.0.weight"] = torch.full((2,), 3e38)
    (out,) = clip.clipped(2, [huge], sent, Metrics())
    assert torch.isfinite(out.tensors["stages.0.0.weight"]).all()
