"""The faults of the soak: how often, for how long, how each is done and undone."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import psutil

from tests.chaos.bed import Bed
from tests.support.processes import Running

DEVICES = ("a", "b", "c")
SPARE = len(DEVICES) + 1  # the link of a second device with another's key
SERVER = "coordinator"
Undo: TypeAlias = Callable[[], object]


@dataclass
class Fault:
    """One that was drawn. target: a device or SERVER. pause_s: since the fault before began. way:
    of a link, for a fault of one direction. The rest is what came of it."""

    kind: str
    target: str
    lasts_s: float
    pause_s: float
    way: str
    began: float = 0.0
    round: int = 0  # committed when it began
    next_round_s: float | None = None  # from then to the next commit after its end
    trouble: list[str] = field(default_factory=list)

    @property
    def holds(self) -> set[str]:
        """What nothing else is done to meanwhile."""
        return {self.target, "spare"} if self.kind == "duplicate" else {self.target}


@dataclass(frozen=True)
class Kind:
    """weight: how often, against the others. It lasts from least_s to most_s."""

    weight: int
    least_s: float
    most_s: float
    do: Callable[[Bed, Fault], Undo]


def drawn(num_faults: int, seed: int, pause_s: float) -> list[Fault]:
    """Everything about the faults but what becomes of them. pause_s: mean of an exponential."""
    generator = random.Random(seed)
    weights = [kind.weight for kind in KINDS.values()]
    faults = []
    for name in generator.choices(list(KINDS), weights, k=num_faults):
        device = generator.choice(DEVICES)
        faults.append(
            Fault(
                kind=name,
                target=SERVER if SERVER in name else device,
                lasts_s=generator.uniform(KINDS[name].least_s, KINDS[name].most_s),
                pause_s=generator.expovariate(1 / pause_s),
                way=generator.choice(("up", "down")),
            )
        )
    return faults


def _cut(bed: Bed, fault: Fault) -> Undo:
    link = bed.links[fault.target]
    bed.net.cut(link)
    return lambda: bed.net.mend(link)


def _cut_one_way(bed: Bed, fault: Fault) -> Undo:
    link = bed.links[fault.target]
    bed.net.ask(link, way=fault.way, is_cut=True)
    return lambda: bed.net.mend(link)


def _link_with(name: str, value: float) -> Callable[[Bed, Fault], Undo]:
    """A link that is bad in another way: a field of relay.Direction."""

    def do(bed: Bed, fault: Fault) -> Undo:
        link = bed.links[fault.target]
        before = bed.net.ask()[str(link)]["up"][name]
        bed.net.ask(link, **{name: value})
        return lambda: bed.net.ask(link, **{name: before})

    return do


def _new_address(bed: Bed, fault: Fault) -> Undo:
    bed.net.hosts[bed.links[fault.target]].move()
    return lambda: None


def _kill_agent(bed: Bed, fault: Fault) -> Undo:
    bed.kill_agent(fault.target)
    return lambda: bed.device(fault.target)


def _kill_server(bed: Bed, fault: Fault) -> Undo:
    bed.kill_server()
    return bed.serve_until_listening


def _kill_trainer(number: int) -> Callable[[Bed, Fault], Undo]:
    def do(bed: Bed, fault: Fault) -> Undo:
        _send(_trainers(bed.agents[fault.target]), number)
        return lambda: None

    return do


def _duplicate(bed: Bed, fault: Fault) -> Undo:
    second = bed.second_device(fault.target, SPARE)

    def end() -> None:
        second.process.kill()
        second.process.wait()

    return end


def _agent_stops(bed: Bed, fault: Fault) -> Undo:
    return _stopped([psutil.Process(bed.agents[fault.target].process.pid)])


def _trainer_stops(bed: Bed, fault: Fault) -> Undo:
    return _stopped(_trainers(bed.agents[fault.target]))


def _server_stops(bed: Bed, fault: Fault) -> Undo:
    assert bed.server is not None
    return _stopped([psutil.Process(bed.server.process.pid)])


def _stopped(processes: list[psutil.Process]) -> Undo:
    _send(processes, signal.SIGSTOP)
    return lambda: _send(processes, signal.SIGCONT)


def _trainers(agent: Running) -> list[psutil.Process]:
    """None while it is starting one."""
    return list(psutil.Process(agent.process.pid).children())


def _send(processes: Iterable[psutil.Process], number: int) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


KINDS: dict[str, Kind] = {
    "cut": Kind(5, 1, 15, _cut),
    "long cut": Kind(1, 25, 30, _cut),
    "cut one way": Kind(3, 1, 15, _cut_one_way),
    "loss 30 %": Kind(2, 3, 15, _link_with("loss", 0.3)),
    "1 Mbit/s": Kind(2, 3, 15, _link_with("rate_bit_s", 1e6)),
    "new address": Kind(3, 0, 0, _new_address),
    "kill agent": Kind(4, 0, 5, _kill_agent),
    "kill trainer": Kind(2, 0, 0, _kill_trainer(signal.SIGKILL)),
    "trainer crashes": Kind(2, 0, 0, _kill_trainer(signal.SIGSEGV)),
    "kill coordinator": Kind(3, 0, 5, _kill_server),
    "duplicate": Kind(2, 8, 15, _duplicate),
    "agent stands still": Kind(2, 1, 15, _agent_stops),
    "trainer stands still": Kind(2, 1, 15, _trainer_stops),
    "coordinator stands still": Kind(2, 1, 15, _server_stops),
}
