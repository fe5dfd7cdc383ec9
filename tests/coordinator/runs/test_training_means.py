"""Training loss and accuracy of a round: means over the participants, weighted by examples."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from coordinator.runs.training_means import TrainingMeans
from edge_sdk.protocol.messages import ExitResult, Holdout, Segment
from tests.support.examples import client, client_update


def update(name, examples, **results):
    exits = tuple(
        ExitResult(exit=int(exit[1:]), loss=loss, metric=accuracy)
        for exit, (loss, accuracy) in results.items()
    )
    segments = (Segment(first=1, last=1),)
    return client_update(client(name, 1), {}, segments, num_examples=examples, exits=exits)


def test_means_are_weighted_by_examples_and_only_over_who_trained_the_exit():
    means = TrainingMeans("classify")
    given = [update("a", 10, e1=(1.0, 0.5), e3=(4.0, 0.1)), update("b", 30, e1=(2.0, 0.9))]
    assert list(means.watched(given)) == given
    loss, accuracy = means.by_exit()
    # exit 1: (10 * 1 + 30 * 2) / 40 and (10 * 0.5 + 30 * 0.9) / 40; exit 3: one alone
    assert loss == [pytest.approx(1.75), None, 4.0]
    assert accuracy == [pytest.approx(0.8), None, 0.1]
    assert means.values() == {
        "loss_exit_1": pytest.approx(1.75),
        "loss_exit_3": 4.0,
        "train_accuracy_exit_1": pytest.approx(0.8),
        "train_accuracy_exit_3": 0.1,
    }


def test_nobody_has_no_means():
    assert TrainingMeans("classify").by_exit() == ([], [])
    assert TrainingMeans("classify").values() == {}


def test_holdouts_are_pooled_over_their_examples_and_spread_over_clients():
    """28 of 40 right in all; the clients' accuracies are 0.5, 0.75 and 1, whose quantile at 0.1
    lies a fifth of the way from the first to the second."""
    told = [(20, 10, 1.0), (8, 6, 0.5), (12, 12, 0.25)]
    given = [
        replace(update("a", 10, e1=(1.0, 0.5)), arrived=with_holdout(*figures)) for figures in told
    ] + [update("b", 30, e1=(2.0, 0.9))]
    means = TrainingMeans("classify")
    assert list(means.watched(given)) == given
    values = {name: v for name, v in means.values().items() if name.startswith("holdout")}
    assert values == {
        "holdout_accuracy": 28 / 40,
        "holdout_loss": pytest.approx((20 * 1 + 8 * 0.5 + 12 * 0.25) / 40),
        "holdout_examples": 40,
        "holdout_clients": 3,
        "holdout_accuracy_q10": pytest.approx(0.5 + 0.2 * 0.25),
        "holdout_accuracy_q50": 0.75,
        "holdout_accuracy_q90": pytest.approx(0.75 + 0.8 * 0.25),
    }


def test_a_holdout_counts_no_more_than_an_update_may():
    """One client says that it got all of two billion right; the others, of 10 each, none: it counts
    for two of them."""
    told = [(10, 0, 1.0), (10, 0, 1.0), (2**31, 2**31, 0.0)]
    means = TrainingMeans("classify")
    list(means.watched(replace(update("a", 10), arrived=with_holdout(*held)) for held in told))
    values = means.values()
    assert values["holdout_examples"] == 40
    assert values["holdout_accuracy"] == values["holdout_loss"] == 20 / 40


def with_holdout(num_examples, num_correct, loss):
    metric = num_correct / num_examples
    held = Holdout(num_examples=num_examples, metric=metric, loss=loss)
    arrived = update("a", 10, e1=(1.0, 0.5)).arrived
    return msgspec.structs.replace(
        arrived, update=msgspec.structs.replace(arrived.update, holdout=held)
    )
