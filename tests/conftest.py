"""One thread for torch: tiny tensors on a busy machine take several times as long with more. And
what the tests of the coordinator with scripted devices begin with."""

from __future__ import annotations

import importlib
import signal
import sys
import tempfile
from typing import Any

import pytest
import torch

from edge_sdk.agent import trainer_process

pytest_plugins = ["tests.support.crashes"]
torch.set_num_threads(1)
# A shell that runs the tests in the background ignores Ctrl-C for them and all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
collect_ignore = ["chaos"]  # a quarter of an hour; named on the command line it is collected


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test writes to the user's cache. Not XDG_CACHE_HOME: downloads of tests/system stay there
    from one day to the next."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHE_DIRECTORY", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def own_things(monkeypatch):
    """Families, methods, rules and generators that a test registers are forgotten after it."""
    from tests.support.own import forgotten

    with forgotten(monkeypatch):
        yield


@pytest.fixture
def by_variant(own_things, monkeypatch):
    """The method of tests/support/by_variant.py, known in one test only."""
    module = "tests.support.by_variant"
    monkeypatch.delitem(sys.modules, module, raising=False)
    return importlib.import_module(module)


@pytest.fixture
def shards_folder(tmp_path, monkeypatch):
    """Where a Client puts shards; none is left at the end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


@pytest.fixture
def make_coordinator(tmp_path, monkeypatch):
    """Coordinators with CURVE, unless is_insecure; closed in the end."""
    from coordinator.fleet import cohort
    from tests.support.real_coordinator import Coordinator

    monkeypatch.setattr(cohort, "FAREWELL_S", 0.0)  # the devices here do not answer a bye
    monkeypatch.setattr(cohort, "LOOK_S", 0.1)  # what is due is not put off
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
    from coordinator.fleet import flow_control

    monkeypatch.setattr(flow_control, "SLOW_RATE", 0.0)


@pytest.fixture
def impatient(monkeypatch):
    """A link without a sign of life for half a second is dead, whatever its pace."""
    from coordinator.fleet import cohort, flow_control

    monkeypatch.setattr(cohort, "LISTENING_GAP_S", 0.1)
    monkeypatch.setattr(flow_control, "LINK_S", 0.5)
    monkeypatch.setattr(flow_control, "PATIENCE", 0.0)
    monkeypatch.setattr(flow_control, "LEAST_RATE", float("inf"))


@pytest.fixture(scope="module")
def quick_retries():
    """Pauses that are seconds on a board."""
    from edge_sdk.agent import state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "HELLO_S", 0.1)
        patch.setattr(state, "HELLO_MAX_S", 0.5)
        patch.setattr(trainer_process, "RESTART_S", 0.1)
        yield


@pytest.fixture(scope="module")
def pair(quick_retries, tmp_path_factory):
    """A scripted coordinator and a device that has said hello to it."""
    from edge_sdk.protocol.messages import Hello
    from tests.support.agent import running
    from tests.support.coordinator import ScriptedCoordinator
    from tests.support.examples import examples

    coordinator = ScriptedCoordinator()
    data = tmp_path_factory.mktemp("shard") / "shard.npz"
    try:
        with running(coordinator.endpoint, data, examples(24)) as device:
            coordinator.expect(Hello)
            yield coordinator, device
    finally:
        coordinator.close()


@pytest.fixture
def settled(pair):
    """The same, welcome and ready without a job; whatever a test before has left is gone."""
    from tests.support.agent import settle

    settle(*pair)
    return pair


@pytest.fixture
def chooser():
    from edge_sdk.capacity.chooser import Chooser
    from tests.support.costs import COSTS

    made = Chooser()
    made.costs = COSTS
    return made


@pytest.fixture
def gate(tmp_path):
    from tests.support.admission import Gate

    gate = Gate(tmp_path / "keys")
    yield gate
    gate.close()


@pytest.fixture
def member(gate, tmp_path):
    """A device's folder with the keys of the admitted client pi."""
    from coordinator.admission.client_list import add_client
    from edge_sdk.protocol.keys import make_keys
    from tests.support.admission import new_key

    folder = tmp_path / "pi"
    add_client(gate.clients, "first", new_key().encode())
    add_client(gate.clients, "pi", make_keys(folder, "device").public)
    return folder


@pytest.fixture
def short_silence(monkeypatch):
    """A device that says nothing for half a second is gone."""
    from coordinator.fleet import cohort, sessions

    monkeypatch.setattr(cohort, "LISTENING_GAP_S", 0.1)
    for module in (cohort, sessions):
        monkeypatch.setattr(module, "SILENCE_S", 0.5)
