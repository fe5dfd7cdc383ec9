"""One thread for torch: tiny tensors on a busy machine take several times as long with more. And
what the tests of the coordinator with scripted devices begin with."""

import signal
from typing import Any

import pytest
import torch

torch.set_num_threads(1)
# A shell that runs the tests in the background ignores Ctrl-C for them and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
collect_ignore = ["chaos"]  # a quarter of an hour; named on the command line it is collected


@pytest.fixture
def make_coordinator(tmp_path, monkeypatch):
    """Coordinators with CURVE, unless is_insecure; closed in the end."""
    from coordinator import cohort_zmq
    from tests.scripted import Coordinator

    monkeypatch.setattr(cohort_zmq, "FAREWELL_S", 0.0)  # the devices here do not answer a bye
    monkeypatch.setattr(cohort_zmq, "LOOK_S", 0.1)  # what is due is not put off
    made: list[Coordinator] = []

    def make(*names: str, is_insecure: bool = False, **terms: Any) -> Coordinator:
        folder = None if is_insecure else tmp_path / str(len(made))
        made.append(Coordinator(folder, names or ("good", "bad"), **terms))
        return made[-1]

    yield make
    for coordinator in made:
        coordinator.close()
        coordinator.close_devices()


@pytest.fixture
def coordinator(make_coordinator):
    return make_coordinator("good", "bad")


@pytest.fixture
def devices(coordinator):
    """Good and bad, joined and ready."""
    return coordinator.gather()


@pytest.fixture
def quick_links(monkeypatch):
    """No link is slow: eight parts under way, also before it was measured."""
    from coordinator import credit

    monkeypatch.setattr(credit, "SLOW_RATE", 0.0)


@pytest.fixture
def impatient(monkeypatch):
    """A link without a sign of life for half a second is dead, whatever its pace."""
    from coordinator import cohort_zmq, credit

    monkeypatch.setattr(cohort_zmq, "LISTENING_GAP_S", 0.1)
    monkeypatch.setattr(credit, "LINK_S", 0.5)
    monkeypatch.setattr(credit, "PATIENCE", 0.0)


@pytest.fixture
def short_silence(monkeypatch):
    """A device that says nothing for half a second is gone."""
    from coordinator import cohort_zmq, devices

    monkeypatch.setattr(cohort_zmq, "LISTENING_GAP_S", 0.1)
    for module in (cohort_zmq, devices):
        monkeypatch.setattr(module, "SILENCE_S", 0.5)
