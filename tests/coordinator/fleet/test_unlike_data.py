"""A device whose data are not what the run trains on: refused or told, by both sides."""

from __future__ import annotations

import logging

import pytest

from edge_sdk.data.contract import TrainedOn, names_digest, scaling_of
from edge_sdk.protocol.messages import InputScaling
from tests.support.devices import WAIT_S
from tests.support.jobs_and_results import expect_fault

PIXELS = scaling_of(-1.0, 1.0, (127.5, 1.0))
UNIT = InputScaling(low=0.0, high=1.0)
NAMES = ("cat", "dog", "owl")
RUN = TrainedOn(scaling=PIXELS, class_names=NAMES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"scaling": UNIT},
            "the inputs of this run are integers / 127.5 - 1, those of bad floats as given, 0 to 1;"
            " give the same integers on both sides",
        ),
        ({"scaling": scaling_of(-1, 1, (8.0, 1.0))}, "those of bad integers / 8 - 1"),
        (
            {"class_names": names_digest(NAMES[::-1])},
            "not this run's, which are cat, dog, owl; giv",
        ),
        ({"num_classes": 4}, "with 3; if its labels run from 1, give y - 1"),
    ],
)
def test_what_differs_from_the_test_set_is_refused(make_coordinator, changes, said):
    coordinator = make_coordinator("good", "bad", trained_on=RUN)
    good, bad = coordinator.device("good"), coordinator.device("bad")
    clients = coordinator.clients()
    bad.send(bad.make_hello(**changes))
    assert said in expect_fault(bad, "data", 0)
    welcome = good.hello(scaling=PIXELS, class_names=names_digest(NAMES))
    assert (welcome.scaling, welcome.class_names) == (PIXELS, names_digest(NAMES))
    good.ready()
    bad.join()  # with other data
    assert [client.id for client in clients.result(WAIT_S)] == ["bad", "good"]


def test_what_may_differ_is_told_and_taken(make_coordinator, caplog):
    coordinator = make_coordinator("a", "b", "c", trained_on=RUN)
    coordinator.clients()
    coordinator.device("a").hello()  # one that says nothing of its data
    coordinator.device("b").hello(scaling=scaling_of(-1.0, -0.2, (127.5, 1.0)))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    coordinator.device("c").hello(scaling=InputScaling(low=-1.0, high=0.9))
    assert "those of c floats as given, -1 to 0.9" in caplog.text


def test_without_a_test_set_the_first_device_is_what_others_are_compared_with(
    make_coordinator, caplog
):
    """It is no more right than they: one hostile device must not keep all others out."""
    coordinator = make_coordinator("a", "b", "c")
    coordinator.clients()
    first = coordinator.device("a").hello(scaling=PIXELS, class_names=names_digest(NAMES))
    assert (first.scaling, first.class_names) == (PIXELS, names_digest(NAMES))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    second = coordinator.device("b").hello(scaling=UNIT)
    assert second.scaling == PIXELS  # so that the device can tell too
    assert "those of b floats as given, 0 to 1" in caplog.text
    coordinator.device("c").hello(class_names=names_digest(("x", "y", "z")))
    assert "the class_names of c are not this run's" in caplog.text


def test_names_that_the_test_set_lacks_are_compared_among_devices(make_coordinator, caplog):
    coordinator = make_coordinator("a", "b", trained_on=TrainedOn(scaling=PIXELS))
    coordinator.clients()
    first = coordinator.device("a").hello(class_names=names_digest(NAMES))
    assert (first.scaling, first.class_names) == (PIXELS, names_digest(NAMES))
    coordinator.device("b").hello(class_names=names_digest(NAMES[::-1]))
    assert "the class_names of b are not this run's; give the same names" in caplog.text
