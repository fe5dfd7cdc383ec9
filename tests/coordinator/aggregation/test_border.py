"""What an update may do, by hand: a model of two stages, three weights and their statistics."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch
from torch import nn

from coordinator.aggregation.border import FEW, HELD, STATE, Border
from coordinator.cohorts.base import Absence, Client
from edge_sdk.errors import UpdateError
from edge_sdk.models.staged import StagedModel
from edge_sdk.protocol.messages import Segment
from tests.support.examples import client_update

SEGMENTS = (Segment(first=1, last=1),)


def model():
    linear = nn.Linear(1, 3, bias=False)
    heads = [nn.Linear(3, 1, bias=False) for _ in range(2)]
    return StagedModel([nn.Sequential(linear, nn.BatchNorm1d(3, affine=False)), nn.ReLU()], heads)


SENT = {
    "stages.0.0.weight": torch.tensor([[2.0], [2.0], [1.0]]),  # of norm 3
    "stages.0.1.running_mean": torch.zeros(3),
    "stages.0.1.running_var": torch.ones(3),
    "stages.0.1.num_batches_tracked": torch.tensor(7),
    "exits.1.weight": torch.zeros(1, 3),
}
WEIGHT = torch.tensor([[2.0], [2.0], [1.0]]) / 3


def border(factor=10.0, **changes):
    return Border(model(), factor, **({"epochs": 2, "seed": 0} | changes))


def moved(name="a", size=0.0, *, examples=10, known=0, round=1, staleness=0, **values):
    """Stage 1's weights moved by `size`. values: other tensors, by the end of their name."""
    tensors = {key: tensor for key, tensor in SENT.items() if key.startswith("stages")}
    tensors["stages.0.0.weight"] = SENT["stages.0.0.weight"] + size * WEIGHT
    for key in SENT:
        if (end := key.rsplit(".", 1)[-1]) in values and key.startswith("stages.0.1"):
            tensors[key] = values[end]
    who = Client(id=name, exit=1, num_examples=known)
    told = {"round": round, "num_examples": examples, "staleness": staleness}
    return client_update(who, tensors, SEGMENTS, **told)


def screen(guard, *updates, round=1, examples=()):
    sent = {update.client.id: SENT for update in updates}
    return list(guard.screened(round, updates, sent, examples))


def names(results):
    """Of the updates that count, and of those that do not."""
    absent = [result.client.id for result in results if isinstance(result, Absence)]
    counted = [result.client.id for result in results if not isinstance(result, Absence)]
    return "".join(counted), "".join(absent)


def settled(*sizes, factor=10.0, **changes):
    """A border that remembers a round of these movements."""
    guard = border(factor, **changes)
    screen(guard, *(moved(chr(97 + i), size) for i, size in enumerate(sizes)))
    return guard


def test_weights_may_move_ten_medians_of_earlier_rounds():
    # the median of 1, 2, 3 is 2; up to 20 passes, and |sent| + 1 = 4 is less than that
    guard = settled(1.0, 3.0, 2.0)
    guard.check(moved(size=19.9), SENT)
    with pytest.raises(UpdateError) as refused:
        guard.check(moved(size=21.0), SENT)
    assert str(refused.value) == (
        "update from a, round 1: moved the weights of stage 1 by 21, at most 20: 10 medians (2) of "
        "other updates; see --refuse-above"
    )
    assert refused.value.code == "update"


def test_each_of_several_models_is_compared_with_its_own():
    """Model 1 moves by 1 to 3 and model 2 by 40: 10 medians are 20 of the one, 400 of the other."""

    def of(variant, update):
        return dataclasses.replace(
            update, client=dataclasses.replace(update.client, variant=variant)
        )

    guard = border(others=[model()])
    small = [of(1, moved(name, size)) for name, size in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    screen(guard, *small, *(of(2, moved(name, 40.0)) for name in "def"))
    guard.check(of(2, moved("d", 399.0)), SENT)
    guard.check(of(1, moved("a", 19.0)), SENT)
    with pytest.raises(UpdateError, match="weights of stage 1 of model 1 by 40, at most 20"):
        guard.check(of(1, moved("a", 40.0)), SENT)
    with pytest.raises(UpdateError, match="weights of stage 1 of model 2 by 401, at most 400"):
        guard.check(of(2, moved("d", 401.0)), SENT)


def test_whoever_trains_in_earnest_is_not_refused_where_others_hardly_moved():
    # 10 medians are 0.01; |sent| + 1 = 4 is what may always be moved
    guard = settled(0.001, 0.001, 0.001)
    guard.check(moved(size=3.9), SENT)
    with pytest.raises(UpdateError, match=r"by 4\.1, at most 4:"):
        guard.check(moved(size=4.1), SENT)


@pytest.mark.parametrize("size", [1e20, -1e20, 3e38, 1e6])
def test_a_first_round_is_compared_with_itself_whatever_the_order(size):
    honest = [moved(name, 1.0) for name in "bcdef"]
    for place in range(6):
        given = [*honest[:place], moved("a", size), *honest[place:]]
        assert names(screen(border(), *given)) == ("bcdef", "a")


def test_a_first_round_of_one_or_two_has_a_bound_by_what_was_sent():
    # 10 x 10 x (3 + 1) = 400
    assert names(screen(border(), moved("a", 399.0), moved("b", 401.0))) == ("a", "b")


def test_results_keep_their_order_and_few_wait():
    guard, taken = border(), []

    def arriving():
        for number in range(2 * HELD):
            taken.append(number)
            yield moved(chr(97 + number), 1.0)

    sent = {chr(97 + number): SENT for number in range(2 * HELD)}
    passed = []
    for result in guard.screened(1, arriving(), sent, ()):
        passed.append(result.client.id)
        assert len(taken) - len(passed) <= HELD
    assert passed == sorted(passed)
    assert len(passed) == 2 * HELD
    taken.clear()
    for place, _ in enumerate(guard.screened(2, arriving(), sent, ())):
        assert len(taken) == place + 1, "with a memory nobody waits"


def test_when_most_of_a_cohort_moves_further_it_is_let_in():
    """Norms of refused updates are remembered: three that hardly moved do not shut others out."""
    guard = settled(0.001, 0.001, 0.001)
    others = [moved(name, 100.0) for name in "defg"]
    assert names(screen(guard, *others, round=2)) == ("", "defg")
    assert names(screen(guard, *others, round=3)) == ("defg", "")


def test_one_absurd_norm_after_another_moves_no_bound():
    guard = settled(*[1.0] * 6)
    for round in range(2, 30):
        results = screen(guard, *(moved(n, 1.0) for n in "bcdef"), moved("a", 1e38), round=round)
        assert names(results) == ("bcdef", "a")
    assert torch.isfinite(guard.state_dict()[STATE]).all()


@pytest.mark.parametrize("factor", [10.0, 0.0])
def test_a_negative_variance_is_refused_whatever_the_factor(factor):
    bad = moved(running_var=torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(UpdateError, match="running_var reaches -1, a variance is at least 0"):
        border(factor).check(bad, SENT)


def test_statistics_have_bounds_of_their_own():
    # variances moved by 1: 100 medians are 100; means by 0: 10 (|sent| + 1) = 10
    guard = border()
    ones = [moved(n, running_var=torch.tensor([2.0, 1.0, 1.0])) for n in "abc"]
    screen(guard, *ones)
    guard.check(moved(running_var=torch.tensor([99.0, 1.0, 1.0])), SENT)
    guard.check(moved(running_mean=torch.tensor([-9.0, 0.0, 0.0])), SENT)
    with pytest.raises(UpdateError, match=r"variances of stage 1 by 101, at most 100"):
        guard.check(moved(running_var=torch.tensor([102.0, 1.0, 1.0])), SENT)
    with pytest.raises(UpdateError, match=r"statistics of stage 1 by 11, at most 10"):
        guard.check(moved(running_mean=torch.tensor([0.0, 11.0, 0.0])), SENT)


@pytest.mark.parametrize(("count", "fits"), [(6, False), (7, True), (27, True), (28, False)])
def test_a_counter_grows_by_no_more_than_was_trained(count, fits):
    # from 7, by at most 2 epochs of 10 examples
    update = moved(num_batches_tracked=torch.tensor(count))
    if fits:
        border(0.0).check(update, SENT)
        return
    with pytest.raises(UpdateError, match=f"counts {count} batches, expected 7 to 27"):
        border(0.0).check(update, SENT)


def test_other_integers_come_back_as_they_were_sent():
    sent = SENT | {"stages.0.places": torch.tensor([0, 1])}
    update = moved()
    update.tensors["stages.0.places"] = torch.tensor([0, 2**40])
    with pytest.raises(UpdateError, match="places holds integers other than"):
        border().check(update, sent)


def test_more_examples_than_it_said_are_refused():
    with pytest.raises(UpdateError, match="11 examples, it had 10 when it was asked"):
        border().check(moved(examples=11, known=10), SENT)


def test_factor_0_bounds_no_movement():
    guard = settled(1.0, 1.0, 1.0, factor=0.0)
    guard.check(moved(size=1e20, running_var=torch.full((3,), 1e20)), SENT)


def test_a_weight_is_bounded_and_told_once(caplog):
    guard = settled(1.0, 1.0, 1.0)
    asked = [10, 10, 2**31]
    caplog.set_level(logging.INFO)
    for round in (2, 3):
        honest, liar = screen(guard, moved("a"), moved("b", examples=2**31), examples=asked)
        assert (honest.num_examples, liar.num_examples) == (10, 20)
        assert liar.message.num_examples == 2**31, "what it said is what is recorded"
        assert caplog.text.count(f"b counts with 20 of its {2**31} examples") == 1, round


def test_what_was_checked_when_it_arrived_is_not_checked_again_and_counts_once():
    guard = settled(1.0, 1.0, 1.0)
    update = moved("a", 2.0)
    guard.check(update, SENT)
    (passed,) = guard.screened(2, [update], {}, ())
    assert passed.tensors is update.tensors
    assert guard.memory.norms[0, 0, -1].item() == pytest.approx(2.0)
    assert guard.memory.norms[0, 0, -2].item() == pytest.approx(1.0)


def test_a_late_update_is_measured_from_what_it_began_from():
    guard = settled(1.0, 1.0, 1.0)
    far = {name: tensor + 100 for name, tensor in SENT.items()}
    update = dataclasses.replace(moved("a", 1.0), sent=SENT, staleness=1)
    assert names(list(guard.screened(3, [update], {"a": far}, ()))) == ("a", "")


def test_memory_goes_on_from_a_state_and_without_one_begins_anew():
    guard, again, old = settled(1.0, 1.0, 1.0), border(), border()
    again.load_state_dict(guard.state_dict())
    old.load_state_dict({})
    with pytest.raises(UpdateError, match="10 medians"):
        again.check(moved(size=20.0), SENT)
    old.check(moved(size=20.0), SENT)
    assert len([norm for norm in again.memory.norms[0, 0].tolist() if norm > 0]) == FEW
