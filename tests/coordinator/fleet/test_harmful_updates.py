"""Real rounds over sockets with one device of five that lies: it is told, the others and the run go
on, and so does a coordinator that is started again without it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from coordinator.links.router import Router
from coordinator.methods.registry import make_method
from coordinator.runs.rounds import run_rounds
from coordinator.store.opening import open_store
from coordinator.store.store import SPOOL
from edge_sdk.protocol.messages import Accepted, Bye, Fault
from tests.support.attackers import ATTACKS, changed, statistic
from tests.support.devices import ANY_PORT, WAIT_S, ScriptedDevice
from tests.support.examples import config
from tests.support.processes import read_rows
from tests.support.real_coordinator import make_cohort

HONEST = ("a", "b", "c", "d")
BAD = "bad"


class Run:
    """A coordinator in a thread of its own, and scripted devices."""

    def __init__(self, folder, made, until, resume):
        self._stopping = threading.Event()
        self._router = Router(ANY_PORT, None, None)
        self.devices: list[ScriptedDevice] = []
        self._thread = ThreadPoolExecutor(1)
        self._state = self._thread.submit(self._work, folder, made, until, resume)

    def _work(self, folder, made, until, resume):
        store = open_store(folder, made, "serve", resume)
        cohort = make_cohort(
            self._router,
            folder / SPOOL,
            min_clients=made.min_clients,
            next_round=store.next_round(),
            should_stop=self._stopping.is_set,
        )
        method = make_method(made)
        try:
            run_rounds(store, method, cohort, None, should_stop=lambda: store.next_round() > until)
        finally:
            cohort.close("test over", is_final=False)
            store.close()
        return method.state_dict()

    def gather(self, *names, **hello_of_bad):
        for name in names:
            device = ScriptedDevice(self._router.endpoint, name)
            self.devices.append(device)
            device.hello(**(hello_of_bad if name == BAD else {}))
            device.ready()

    def moved_by(self, initial):
        """When the run has ended: what every float of the model moved by since `initial`."""
        for device in self.devices:
            device.expect(Bye)
            device.send(Bye())
        state, found = self._state.result(WAIT_S), set()
        for name, tensor in initial.items():
            step = state[f"server/globals/{name}"] - tensor
            found |= {round(number, 3) for number in step.flatten().tolist()}
        return found

    def close(self):
        self._stopping.set()
        self._thread.shutdown()
        for device in self.devices:
            device.close()


@contextmanager
def running(folder, made, *, until, resume=False) -> Iterator[Run]:
    """Rounds up to `until`."""
    with closing(Run(folder, made, until, resume)) as run:
        yield run


def returns(device, change=None, **told):
    """A whole job. change: of each of its tensors; told: in the update. What it is answered."""
    device.take_job()
    if change:
        sent = {name: tensor - 1 for name, tensor in device.trained.items()}
        device.trained = changed(sent, change)
    device.send(device.make_update(**told))
    answer = device.upload()
    device.ready()
    return answer


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_harmful_update_is_refused_told_and_does_not_end_the_run(tmp_path, attack):
    made = config("owners-mean", rounds=3, min_clients=5, quorum=0.5)
    initial = make_method(made).current()
    with running(tmp_path / "run", made, until=2) as run:
        run.gather(*HONEST, BAD)
        for number in (1, 2):
            for device in run.devices:
                answer = returns(device, ATTACKS[attack] if device.name == BAD else None)
                if device.name != BAD:
                    assert isinstance(answer, Accepted)
                elif isinstance(answer, Fault):
                    code = "tensors" if attack == "NaN" else "update"
                    assert (answer.code, answer.round) == (code, number)
                    assert answer.detail.startswith(f"update from {BAD}, round {number}: ")
                else:  # statistics of a first round are compared when the others' are here
                    assert number == 1
                    assert attack == "variance 1e20"
        assert run.moved_by(initial) == {2.0}
    told = "SELECT DISTINCT client_id FROM participations WHERE outcome = 'failed'"
    assert read_rows(tmp_path / "run", told) == [(BAD,)]
    with running(tmp_path / "run", made, until=3, resume=True) as run:
        run.gather(*HONEST, "e")
        for device in run.devices:
            assert isinstance(returns(device), Accepted)
        assert run.moved_by(initial) == {3.0}


def test_two_billion_examples_count_three_times_anothers(tmp_path):
    """Four honest ones of 10 move by 1, the liar by 0, as if it had 30: (40 1 + 30 0) / 70."""
    made = config("owners-mean", rounds=1, min_clients=5, weighting="examples")
    initial = make_method(made).current()
    many = 2**31 - 1
    with running(tmp_path / "run", made, until=1) as run:
        run.gather(*HONEST, BAD, num_examples=many)
        for device in run.devices:
            is_bad = device.name == BAD
            told = {"num_examples": many} if is_bad else {}
            change = statistic("nothing", 0.0) if is_bad else None
            assert isinstance(returns(device, change, **told), Accepted)
        assert run.moved_by(initial) == {0.571}
