"""A real coordinator in the middle of a round, its socket replaced, and what must hold there.

Router, ZmqCohort and all behind them are the real ones. Six devices are in six states of a round;
then come the inputs, frames as any of them (or a stranger) could send them; then one more
device, which did nothing but wait, finishes its job. After every input:

- nothing was raised, and every line logged is one line;
- what is not the sender's is as it was, and only the sender was answered;
- an input answered by a Fault changed nothing but, if the Fault is about the job in hand, the
  sender's part: see may_change.

At the end the waiting device's update counted once, as it was sent, and so did everybody's that
counted at all.
"""

from __future__ import annotations

import math
import shutil
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, TypeAlias

import torch

from coordinator.cohorts.base import Assignment, Client, ClientUpdate, Offer
from coordinator.config import RunConfig
from coordinator.fleet.cohort import ZmqCohort
from coordinator.fleet.open_job import make_job
from coordinator.fleet.spool import Spool
from coordinator.links.rate_limit import RateLimits
from coordinator.links.router import Router
from edge_sdk.protocol.codec import encode
from edge_sdk.protocol.messages import (
    PROTOCOL,
    Accepted,
    Bye,
    DeviceProfile,
    ExitResult,
    Fault,
    Fetch,
    Heartbeat,
    Hello,
    Job,
    Message,
    ModelSpec,
    Part,
    Phase,
    Plan,
    Ready,
    Segment,
    TensorSpec,
    Update,
    Welcome,
)
from edge_sdk.protocol.tensors import Sender, Tensors, specs_of
from tools.fuzz.fakes import CLOCK, HONEST, SENDERS, Broken, Frame, Socket, admitted
from tools.fuzz.state import Place, changes, is_owned, shown, snapshot_state

RUN, ROUND = "fuzz", 7
STEP_S = 0.9  # of the clock, between two looks of the coordinator
# Where the spool lies if there is such a thing: a disk is not what is looked at.
MEMORY = "/dev/shm"
JOINED = ("idle", "told", "training", "uploading", "done", HONEST)
UNREACHABLE = 2 * len(SENDERS)  # added to a route: answers cannot be sent
NUM_ROUTES = 2 * UNREACHABLE
# When it listened, which any message changes; sums over clients; what only reads tensors.
NO_STATE = (
    *("_router", "_num_heard", "_listened", "_looked", "_patience", "_used", "_queues"),
    *("_counters", "_spool", "_sessions", "Sender", "repeats"),
)
PROFILE = DeviceProfile(
    platform="generic", memory_total_bytes=2**32, memory_available_bytes=2**31, cores=4, gflops=10.0
)
MODEL = ModelSpec(family="cnn", input_shape=(1, 8, 8), num_classes=3, exit=3)
PLAN = Plan(segments=(Segment(first=1, last=3),))
CONFIG = RunConfig(
    method="owners-mean",
    model=MODEL,
    rounds=ROUND,
    grace_s=1e6,
    quorum=1.0,
    min_clients=len(JOINED),
    staleness_half_life=0.5,
)
OFFER = Offer(MODEL, CONFIG.plan(CONFIG.rounds))

Act: TypeAlias = tuple[int, list[bytes]]  # route, the frames behind it


@dataclass
class Seen:
    """What came of many inputs."""

    inputs: int = 0
    refused: int = 0
    updates: int = 0  # counted, beside those of the waiting and the finished device
    answers: Counter[str] = field(default_factory=Counter)
    kinds: bytearray = field(default_factory=lambda: bytearray(2**16))  # of changes, hashed

    @property
    def changes(self) -> int:
        """Kinds of changes of the state."""
        return len(self.kinds) - self.kinds.count(0)


@lru_cache
def tensors_of(name: str) -> Tensors:
    """160 bytes in three parts; no two devices have the same."""
    start = float(sum(name.encode()))
    return {
        "stages.0.weight": torch.arange(32.0).reshape(8, 4) + start,
        "exits.0.bias": torch.arange(5.0) - start,
        "stages.0.count": torch.tensor([int(start)]),
    }


@lru_cache
def parts_of(name: str) -> list[bytes]:
    sender = Sender(tensors_of(name))
    return [bytes(sender.part(index)) for index in range(sender.num_parts)]


@lru_cache
def specs_of_update() -> tuple[TensorSpec, ...]:
    """Of every device's."""
    return specs_of(tensors_of("down"))


@lru_cache
def encoded(message: Hello | Ready | Fetch | Part | Heartbeat | Bye) -> bytes:
    return encode(message)


@lru_cache
def job_of(name: str) -> Job:
    """What the coordinator gives this device."""
    sender = Sender(tensors_of("down"))
    client = Client(id=name, exit=3)
    return make_job(RUN, client, assignment(), sender, ROUND, 0.0)


@lru_cache
def digest_of(name: str) -> str:
    return Sender(tensors_of(name)).digest()


@lru_cache
def assignment() -> Assignment:
    down = tensors_of("down")
    return Assignment(model=MODEL, plan=PLAN, tensors=down, returns=specs_of_update())


def make_hello(name: str, **changes: Any) -> Hello:
    fields: dict[str, Any] = {"protocol": PROTOCOL, "client_id": name, "session": f"{name} 1"}
    fields |= {"profile": PROFILE, "num_examples": 10, "input_shape": (1, 8, 8), "num_classes": 3}
    return Hello(**(fields | changes))


def make_update(name: str, **changes: Any) -> Update:
    results = tuple(ExitResult(exit=exit, loss=0.5, metric=0.5) for exit in (1, 2, 3))
    fields: dict[str, Any] = {"job": job_of(name).id, "digest": digest_of(name), "round": ROUND}
    fields |= {"num_examples": 10, "num_steps": 2, "exits": results, "peak_memory_bytes": 0}
    fields |= {"phases": {"train": Phase(wall_s=1.0)}, "tensors": specs_of_update()}
    return Update(**(fields | changes))


class World:
    """One coordinator. play() is one round; it may be played again. Only inside small_world()."""

    _router: Router | None = None  # the context and port of a real one are not needed twice

    def __init__(self, *, is_judged: bool = True, seen: Seen | None = None) -> None:
        folder = Path(mkdtemp(dir=MEMORY if Path(MEMORY).is_dir() else None))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        if World._router is None:
            World._router = Router("tcp://127.0.0.1:*", None, None)
            World._router.socket.close()
        # Inputs come without a pause; who broke rules in another world is none the worse in this.
        World._router.limits = RateLimits(burst=math.inf)
        World._router.socket = self.socket = Socket(self._listen)  # type: ignore[assignment]
        World._router._admission = admitted(folder)
        self._spool = Spool(folder / "spool")
        self.cohort = ZmqCohort(World._router, self._spool, CONFIG, OFFER, run=RUN)
        self.seen = seen or Seen()
        self.results: list[Any] = []
        self._is_judged = is_judged
        self._is_played = False
        self._script: Iterator[list[Frame] | None] = iter(())
        self._sender: str | None = None  # of the input in hand
        self._before: bytes | None = None

    def play(self, acts: Iterable[Act]) -> None:
        """Raises Broken, or whatever the coordinator let out."""
        self._spool.delete_before(2**31, set())
        self.results = []
        self._script = self._round(acts)
        self.cohort.clients()
        work = {name: assignment() for name in JOINED if name != "idle"}
        for result in self.cohort.train(work, ROUND, 0.0):
            self.results.append(result)
        self._check_results()

    # -- what is said --------------------------------------------------------------------------

    def _listen(self) -> list[Frame] | None:
        if self._sender is not None:
            self._judge()
        self.socket.is_full = False
        frames = next(self._script)  # looks at what was answered to the last one
        self.socket.sent.clear()
        return frames

    def _round(self, acts: Iterable[Act]) -> Iterator[list[Frame] | None]:
        if self._is_played:
            yield from self._leave(JOINED)  # whoever the round before left
        self._is_played = True
        for name in JOINED:
            yield self._frames(name, make_hello(name))
            self._expect(name, Welcome)
            yield self._frames(name, Ready(exit=3))
        while not any(isinstance(message, Job) for _, message in self.socket.sent):
            yield None  # nothing more to hear: the round may begin
        yield from self._fetch("told", 1)
        for name in ("training", "uploading", "done", HONEST):
            yield from self._fetch(name, 3)
        yield from self._upload("uploading", 1)
        yield from self._upload("done", 3)
        for act in acts:
            if act[1]:
                yield self._begin(act)
            else:
                yield from self._pass_time(2.0 * (1 + act[0] % 8))
        yield self._frames(HONEST, Heartbeat(round=ROUND))
        self._expect(HONEST, Heartbeat)
        yield from self._upload(HONEST, 3)
        yield from self._leave(JOINED[:-1])
        raise Broken("all devices have left, and the round does not end")

    def _begin(self, act: Act) -> list[Frame]:
        """An input. What the coordinator knows before it is what it knew after the last one."""
        route, frames = act
        self.socket.is_full = route >= UNREACHABLE
        route %= UNREACHABLE
        name = self._sender = SENDERS[route // 2]
        if self._is_judged and self._before is None:
            self._before = snapshot_state(self.cohort, NO_STATE)
        return [Frame(f"{name} {route % 2}".encode()), *[Frame(f, name) for f in frames]]

    def _pass_time(self, seconds: float) -> Iterator[list[Frame] | None]:
        """Nobody says anything but the waiting device, which is alive. Steps are short: a
        coordinator that did not listen for long takes nobody for silent."""
        self.seen.inputs += 1
        self._sender = self._before = None
        for _ in range(round(seconds / STEP_S)):
            CLOCK.now_s += STEP_S
            yield None
        yield self._frames(HONEST, Heartbeat(round=ROUND))
        self._expect(HONEST, Heartbeat)

    def _frames(
        self, name: str, message: Any, payload: bytes | None = None, connection: int = 0
    ) -> list[Frame]:
        self._sender = self._before = None
        data = encode(message) if isinstance(message, Update) else encoded(message)
        frames = [Frame(f"{name} {connection}".encode()), Frame(data, name)]
        return frames if payload is None else [*frames, Frame(payload, name)]

    def _leave(self, names: Iterable[str]) -> Iterator[list[Frame] | None]:
        for name in names:
            for connection in (0, 1):
                yield self._frames(name, Bye(), connection=connection)

    def _fetch(self, name: str, count: int) -> Iterator[list[Frame] | None]:
        yield self._frames(name, Fetch(round=ROUND, have=0, first=0, count=count))
        self._expect(name, Part, count)
        if count == 3:
            yield self._frames(name, Fetch(round=ROUND, have=3, first=3, count=0))

    def _upload(self, name: str, count: int) -> Iterator[list[Frame] | None]:
        """Announce, then send the first parts that are asked for."""
        yield self._frames(name, make_update(name))
        asked = self._asked()
        for _ in range(count):
            if not asked:
                raise Broken(f"{name} was not asked for all its parts")
            index = asked.pop(0)
            yield self._frames(name, Part(round=ROUND, index=index), parts_of(name)[index])
            asked += self._asked()
        if count == len(parts_of(name)):
            self._expect(name, Accepted)

    def _asked(self) -> list[int]:
        fetches = [message for _, message in self.socket.sent if isinstance(message, Fetch)]
        return [i for fetch in fetches for i in range(fetch.first, fetch.first + fetch.count)]

    def _expect(self, name: str, kind: type[Message], count: int = 1) -> None:
        """The devices that follow the protocol are served, whatever else goes on."""
        got = [m for _, m in self.socket.sent if not isinstance(m, Job)]
        if [type(m) for m in got] != [kind] * count:
            raise Broken(f"{name} got {got!r:.500}, expected {count} {kind.__name__}")

    # -- what must hold ------------------------------------------------------------------------

    def _judge(self) -> None:
        name, answers = self._sender, [message for _, message in self.socket.sent]
        assert name is not None
        owned = (name, f"{name} 0".encode(), f"{name} 1".encode())
        for route, message in self.socket.sent:
            if route not in owned:
                raise Broken(f"{name} spoke, {route!r} got {message!r:.300}")
        faults = [message for message in answers if isinstance(message, Fault)]
        is_refused = bool(faults) and not any(isinstance(m, Welcome) for m in answers)
        self.seen.inputs += 1
        self.seen.refused += is_refused
        for message in answers:
            label = message.code if isinstance(message, Fault) else type(message).__name__
            self.seen.answers[label] += 1
        if not self._is_judged:
            return
        before, after = self._before, snapshot_state(self.cohort, NO_STATE)
        assert before is not None
        self._before = after
        found = changes(before, after)
        if not found:
            return
        self.seen.kinds[hash(_kind(found)) % len(self.seen.kinds)] = 1
        if is_refused and not all(may_change(place, faults) for place in found):
            raise Broken(f"refused, and yet: {shown(found)}")
        others = {p: values for p, values in found.items() if not is_owned(p, values, owned)}
        if others:
            raise Broken(f"{name} changed what is not its own: {shown(others)}")

    def _check_results(self) -> None:
        counted: dict[str, Tensors] = {}
        for result in self.results:
            if not isinstance(result, ClientUpdate):
                continue
            name = result.client.id
            if name in counted:
                raise Broken(f"two updates of {name} counted")
            counted[name] = result.tensors
            if specs_of(result.tensors) != specs_of_update():
                raise Broken(f"{name}: tensors counted that were not asked for")
            if not all(bool(torch.isfinite(t).all()) for t in result.tensors.values()):
                raise Broken(f"{name}: numbers counted that are not finite")
        for name in (HONEST, "done"):
            want = tensors_of(name)
            if name not in counted or any(not torch.equal(counted[name][k], want[k]) for k in want):
                raise Broken(f"{name}'s update does not count, or not as it was sent")
        if specs_of(tensors_of("down")) != specs_of_update() or digest_of("down") != (
            Sender(tensors_of("down")).digest()
        ):
            raise Broken("the model that was sent was changed")
        self.seen.updates += len(counted) - 2


def may_change(place: Place, faults: list[Fault]) -> bool:
    """Whether a refusal may change what is there: when its sender was heard. A refused update ends
    its sender's part in the round; with code "round" it was not looked at, and all that may be
    noted is that its sender has another job in hand, or none."""
    if place[-1] == "seen":
        return True
    about_job = [fault for fault in faults if fault.round == ROUND]
    return any(fault.code != "round" for fault in about_job) or (
        bool(about_job) and place[-1] == "phase"
    )


def _kind(found: dict[Place, tuple[Any, Any]]) -> frozenset[tuple[Any, ...]]:
    """What tells one change of the state from another, whatever texts and numbers are in it."""
    return frozenset((*place, *map(_telling, values)) for place, values in found.items())


def _telling(value: Any) -> Any:
    is_telling = isinstance(value, bool) or (isinstance(value, str) and len(value) < 12)
    return value if is_telling else type(value).__name__
