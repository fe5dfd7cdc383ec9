"""Training loss and accuracy of a round: means over the participants, weighted by examples."""

from __future__ import annotations

import pytest

from coordinator.runs.training_means import TrainingMeans
from edge_sdk.protocol.messages import ExitResult, Segment
from tests.support.examples import client, client_update


def update(name, examples, **results):
    exits = tuple(
        ExitResult(exit=int(exit[1:]), loss=loss, accuracy=accuracy)
        for exit, (loss, accuracy) in results.items()
    )
    segments = (Segment(first=1, last=1),)
    return client_update(client(name, 1), {}, segments, num_examples=examples, exits=exits)


def test_means_are_weighted_by_examples_and_only_over_who_trained_the_exit():
    means = TrainingMeans()
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
    assert TrainingMeans().by_exit() == ([], [])
    assert TrainingMeans().values() == {}
